"""English prose that is on this machine already, as .jsonl for `gptfast prepare`: docstrings of the installed Python packages, man
pages, Perl's manual, and text files below the folders given. A paragraph that occurs again is dropped, so that nothing is held out
that was trained on; none of it is Wikipedia, so WikiText stays unseen.

    python bench/machine_text.py --out text.jsonl [FOLDER ...] [--limit-mb 60]
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

MAN, PERL = Path("/usr/share/man"), Path("/usr/share/perl")
LONGEST = 1 << 22  # bytes of a file that is read
_ROFF = (
    (re.compile(r"\\f[A-Z]|\\f\[\w*\]|\\f\(\w\w|\\s[+-]?\d|\\&|\\c"), ""),
    (re.compile(r"\\\(aq|\\\(cq|\\\(oq|\\\["), "'"), (re.compile(r"\\-|\\\(em|\\\(en"), "-"), (re.compile(r"\\e|\\\(rs"), r"\\"),
    (re.compile(r"\\\(\w\w|\\\*\(\w\w|\\."), " "),
)  # fmt: skip


def files(root: Path, pattern: str) -> Iterator[Path]:
    """Files below root in a fixed order."""
    for folder, inside, names in os.walk(root):
        inside.sort()
        yield from (Path(folder, name) for name in sorted(names) if re.search(pattern, name))


def docstrings(root: Path) -> Iterator[str]:
    """All docstrings of a file as one document."""
    for path in files(root, r"\.py$"):
        if "test" in str(path.relative_to(root)) or path.stat().st_size > LONGEST:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
        yield "\n\n".join(inspect.cleandoc(text) for text in found if text)


def man_pages(root: Path) -> Iterator[str]:
    """The running text of the English manual: roff's macro lines and escapes are taken out."""
    for section in sorted(root.glob("man[1-9]*")):
        for path in files(section, r"\.\d\w*(\.gz)?$"):
            try:
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                    data = file.read(LONGEST)
            except (OSError, EOFError):
                continue
            lines = []
            for line in data.decode("utf-8", "ignore").splitlines():
                macro = re.match(r"[.'](\w\w?)\b ?(.*)", line)
                text = line if macro is None else macro[2].replace('"', "") if macro[1] in ("B", "I", "BR", "IR") else ""
                lines.append("" if text.startswith((".", "'")) else text)
            text = "\n".join(lines)
            for pattern, put in _ROFF:
                text = pattern.sub(put, text)
            yield text


def perl_manual(root: Path) -> Iterator[str]:
    """The paragraphs of .pod and .pm files' documentation that are not code."""
    for path in files(root, r"\.(pod|pm)$"):
        text = path.read_bytes()[:LONGEST].decode("utf-8", "ignore")
        inside, kept = False, []
        for paragraph in re.split(r"\n\s*\n", text):
            if paragraph.startswith("="):
                inside = not paragraph.startswith("=cut")
            elif inside and not paragraph[:1].isspace():
                kept.append(re.sub(r"[A-Z]<+ ?([^<>]*) ?>+", r"\1", paragraph))
        yield "\n\n".join(kept)


def texts(folder: Path) -> Iterator[str]:
    """The .txt files below a folder, as they are."""
    for path in files(folder, r"\.txt$"):
        yield path.read_bytes().decode("utf-8", "ignore")


def prose(documents: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Documents of at least 200 characters, of paragraphs that are mostly letters and were not seen before."""
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document):
            text = re.sub(r"\s+", " ", paragraph).strip()
            letters = sum(char.isalpha() or char == " " for char in text)
            digest = hashlib.sha256(text.encode("utf-8", "ignore")).digest()[:12]
            if len(text) < 60 or letters < 0.85 * len(text) or digest in seen:
                continue
            seen.add(digest)
            kept.append(text)
        joined = "\n".join(kept)
        if len(joined) >= 200:
            yield joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of further .txt files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit-mb", type=float, default=1e6)
    arguments = parser.parse_args()
    paths = sysconfig.get_paths()
    sources = {str(folder): texts(folder) for folder in arguments.folders}
    sources |= {"man pages": man_pages(MAN), "Perl's manual": perl_manual(PERL)}
    sources |= {f"docstrings in {place}": docstrings(Path(place)) for place in dict.fromkeys((paths["stdlib"], paths["purelib"]))}
    seen: set[bytes] = set()
    total = 0
    with open(arguments.out, "w", encoding="utf-8") as file:
        for name, documents in sources.items():
            size = 0
            for text in prose(documents, seen):
                if total + size > arguments.limit_mb * 1e6:
                    break
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
            total += size
            print(f"{size / 1e6:8.2f} MB  {name}", flush=True)
    print(f"{total / 1e6:8.2f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
