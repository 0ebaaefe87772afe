"""Are the tests strict enough? Changes a kernel in one place at a time and runs the op's tests: `make mutate`, or

    python -P tests/mutate.py --file csrc/cpu/layer_norm_kernel.h --count 12 --seed 0 --list

The changes are drawn by rules over the source's tokens (a bound, lanes, a stride, a term, a sign, a cast, a constant, min and max),
the same ones for the same seed. Each is compiled and tested in a private copy of the checkout. A change that does not compile does
not count; one that no test notices is a survivor: explained in tests/mutants.json (an equivalent program: file, before, after,
reason) or a gap in the tests. Ends with 1 where fewer than 95 % of a file's changes are noticed, explained survivors aside, with 2
where the tests fail without a change. Results: tests/campaigns.json. Kernels in csrc/cuda and kernels/ are taken with --file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import json
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptfast import proof
from gptfast._environment import OPS
from gptfast.testing import campaigns

ROOT = campaigns.ROOT
EXPLAINED = ROOT / "tests/mutants.json"
ISAS = ("plain", "avx2", "avx512")
NEEDED = 0.95


class Mutant(NamedTuple):
    """source[start:end] becomes `text`; `before` and `after` are that line, stripped."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}\n    - {self.before}\n    + {self.after or '(nothing)'}"


# ------------------------------------------------------------------------------------------------------------------ the changes

# What is no program, or only says how the work is cut: comments, strings, preprocessor, declarations, tile sizes, hints
_CPP_BLANK = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*|\bstatic_assert\s*\([^;]*;'
    r"|\btemplate\s*<[^\n]*?>(?=\s*\n|\s+\w)"
    r"|^[ \t]*(?:static )?constexpr (?:int|int64_t|size_t|bool)\b[^;]*;|__builtin_prefetch[^;]*;"
    r"|^[ \t]*(?:using|typedef|namespace) [^\n]*"
    r"|\bGPTFAST_PER_ISA\([^\n]*|__attribute__\(\([^)]*\)*|#?\bpragma [^\n]*|\boperator\S+",
    re.MULTILINE | re.DOTALL,
)


def _spaces(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def blanked(name: str, source: str) -> str:
    """The source with everything that is not changed as spaces; offsets stay."""
    if name.endswith(".py"):
        return _blanked_python(source)
    if name.startswith("csrc/cpu/"):  # above it are declarations that the front ends see too
        head = source.find("#ifdef GPTFAST_ISA")
        source = re.sub(r"[^\n]", " ", source[: max(head, 0)]) + source[max(head, 0) :]
    return _CPP_BLANK.sub(_spaces, source)


def _blanked_python(source: str) -> str:
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = list(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for place in range(starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]):
                text[place] = "\n" if source[place] == "\n" else " "
    declarations = r"^[ \t]*(?:import|from|@|def|class|assert|raise)\b[^\n]*|^[A-Z_]+ = [^\n]*|^[ \t]*\w+: tl\.constexpr[^\n]*"
    skip = re.compile(declarations, re.MULTILINE)
    return skip.sub(_spaces, "".join(text))


_NAME = r"[A-Za-z_][\w.]*"
_STRIDES = rf"\b(?:\w*(?:columns|stride|width|rows|size|heads|length|lines?|step)\w*|[A-Z]|{_NAME}_(?:n|k|m))\b"


def _other(literal: str) -> str:
    suffix = "f" if literal.endswith("f") else ""
    return f"1.0{suffix}" if float(literal.rstrip("f")) == 0 else f"(1.01{suffix} * {literal})"


# kind, pattern, what the match becomes
Rule = tuple[str, str, Callable[[re.Match[str]], str]]
RULES: list[Rule] = [
    ("bound", r"(?<=\s)<(?=\s)", lambda m: "<="),
    ("bound", r"(?<=\s)<=(?=\s)", lambda m: "<"),
    ("bound", r"(?<=\s)>(?=\s)", lambda m: ">="),
    ("bound", r"(?<=\s)>=(?=\s)", lambda m: ">"),
    ("bound", rf"(?<=\s<\s){_NAME}(?=[;)])", lambda m: f"{m[0]} - 1"),
    ("bound", r"(?<=\bint \w = )0(?=;)|(?<=\bint64_t \w = )0(?=;)|(?<=\bint64_t row = )\w+(?=;)", lambda m: f"{m[0]} + 1"),
    ("lanes", r"(?<!int )\blanes\b(?=[),])", lambda m: "(lanes - 1)"),
    ("lanes", r"(?<![\w] )\b(\w*mask\w*)\b(?=[,)\]])", lambda m: f"~({m[0]})"),
    ("lanes", r"\bkeep_first(?=\()", lambda m: "([](auto v, int) { return v; })"),
    ("stride", rf"(?<=\* ){_STRIDES}(?![\w(])", lambda m: f"({m[0]} + 1)"),
    ("stride", rf"{_STRIDES}(?= \* )", lambda m: f"({m[0]} + 1)"),
    ("stride", r"(?<=\+ )\d+(?= \* k)", lambda m: str(int(m[0]) + 1)),
    ("sign", r"(?<=\s)\+(?=\s)", lambda m: "-"),
    ("sign", r"(?<=\s)-(?=\s)", lambda m: "+"),
    ("sign", r"(?<=\s)\+=(?=\s)", lambda m: "-="),
    ("sign", r"(?<=\s)-=(?=\s)", lambda m: "+="),
    ("sign", r"(?<=[(,=?:] )-(?=[\w(])|(?<=\()-(?=[\w(])|(?<=return )-(?=[\w(])", lambda m: ""),
    # a cast to float or int that is dropped happens all the same, implicitly
    ("cast", r"\bstatic_cast<(?:bf16|fp16|T|To)>(?=\()|\b(?:to_bf16|to_fp16)(?=\()", lambda m: ""),
    ("cast", r"\b\w*round\w*(?:<[^<>()]*>)?(?=\()", lambda m: ""),
    ("cast", r"\.to\((?:tl\.\w+|\w+\.dtype(?:\.element_ty)?)\)", lambda m: ""),
    ("call", r"\b(?:__builtin_\w*sqrtf?|rsqrt\w*|\w*exp2?f?|\w*log\w*|\w*abs\w*)(?=\()", lambda m: ""),
    ("constant", r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?f?(?![\w.])", lambda m: _other(m[0])),
    ("constant", r"(?<![\w.\[<])\d+(?![\w.\]>])(?!:)(?= [-+*/]|[);,])", lambda m: str(int(m[0]) + 1)),
    ("min/max", r"(?<![a-z])min(?=\w*\(|imum\()", lambda m: "max"),
    ("min/max", r"(?<![a-z])max(?=\w*\(|imum\()", lambda m: "min"),
    ("logic", r"(?<=\s)==(?=\s)", lambda m: "!="),
    ("logic", r"(?<=\s)!=(?=\s)", lambda m: "=="),
    ("logic", r"(?<=\s)&&(?=\s)", lambda m: "||"),
    ("logic", r"(?<=\s)\|\|(?=\s)", lambda m: "&&"),
    ("statement", r"(?<=\n)[ \t]+[\w.\[\] +*]+ (?:[-+*/|&^]=) [^;{}\n]*;(?=\n)", lambda m: " ;"),
    ("statement", r"(?<=\n)[ \t]+(?!return)\w+(?:<[^<>()]*>)?\([^;{}\n]*\);(?=\n)", lambda m: " ;"),
]
KINDS = sorted({"term", *(kind for kind, _, _ in RULES)})


def _operand_end(text: str, place: int) -> int:
    """Where the product that begins at `place` ends: names, numbers, calls, indices and parentheses joined by * and /."""
    while True:
        unary = re.compile(r"[-~!*&]?").match(text, place)
        word = re.compile(r"[\w.:]+(?:<[\w: ,]*>(?=\())?|(?=\()").match(text, unary.end() if unary else place)
        if word is None:
            return -1
        place = word.end()
        while place < len(text) and text[place] in "([":
            depth, start = 0, place
            while place < len(text):
                depth += (text[place] in "([{") - (text[place] in ")]}")
                place += 1
                if depth == 0:
                    break
            if depth or text[start:place].count("\n") > 3:
                return -1
            member = re.compile(r"(?:\.|->)\w+").match(text, place)
            place = member.end() if member else place
        more = re.compile(r" [*/] ").match(text, place)
        if more is None:
            return place
        place = more.end()


def _dropped(text: str) -> Iterator[tuple[int, int, str]]:
    """Terms ' + x' and factors ' * x' that can be left out."""
    for match in re.finditer(r" [-+*] (?=[\w(~-])", text):
        end = _operand_end(text, match.end())
        if end > 0:
            yield match.start(), end, ""


def mutants(name: str, source: str, seed: int) -> list[Mutant]:
    """Every change that the rules find, in the order in which they are tried: drawn by the seed, the kinds in turn."""
    text = blanked(name, source)
    found: list[tuple[str, int, int, str]] = [("term", *place) for place in _dropped(text)]
    for kind, pattern, become in RULES:
        for match in re.finditer(pattern, text):
            line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
            if kind == "sign" and re.search(r"\bfor \(.*;.*;", line):
                continue  # a loop that runs backwards only costs the time limit
            found.append((kind, match.start(), match.end(), become(match)))
    draw = random.Random(f"{seed} {name}")
    by_kind: dict[str, list[Mutant]] = {}
    for kind, start, end, changed in sorted(found):
        first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
        before, after = source[first:last], source[first:start] + changed + source[end:last]
        made = Mutant(name, source.count("\n", 0, start) + 1, kind, before.strip(), after.strip(), start, end, changed)
        by_kind.setdefault(kind, []).append(made)
    for several in by_kind.values():
        draw.shuffle(several)
    kinds, ordered, taken = draw.sample(sorted(by_kind), len(by_kind)), [], set()
    while any(by_kind.values()):
        for kind in kinds:
            while by_kind[kind]:
                one = by_kind[kind].pop()
                if one.start not in taken:  # one change a place
                    taken.add(one.start)
                    ordered.append(one)
                    break
    return ordered


# --------------------------------------------------------------------------------------------------------- compiling and testing


def family(name: str) -> tuple[list[str], str]:
    """The tests of a kernel file and the -k expression that selects what runs that file."""
    stem = Path(name).stem.removesuffix("_kernel")
    if name.startswith("csrc/cuda/"):
        return [f"tests/ops/test_{stem}_cuda.py"], ""
    if name.startswith("kernels/"):
        return [f"tests/ops/test_{stem}.py"], "triton-interpret"
    users = [stem] if stem in OPS else [op for op in OPS if ROOT / name in proof.sources(op, "cpp")]
    return [f"tests/ops/test_{op}.py" for op in users], "not triton and not cuda"


class Build(NamedTuple):
    """The extension's own commands, taken from the ninja file of a checkout or of the copy that `make asan` built."""

    root: Path
    compile: dict[str, list[str]]  # by instruction set, without the source and the object
    link: list[str]

    @classmethod
    def read(cls, root: Path, how: str) -> Build:
        folder = root / f"build/ninja-{sys.version_info.major}.{sys.version_info.minor}"
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        made = subprocess.run([*ninja, "-C", str(folder), "-t", "compdb", "cxx", "link"], capture_output=True, text=True)
        rules = json.loads(made.stdout) if made.returncode == 0 else []
        entries = {Path(rule["output"]).name: shlex.split(rule["command"]) for rule in rules}
        link = next((words for name, words in entries.items() if name.startswith("_C.")), None)
        objects = [Path(word) for word in link or [] if word.endswith(".o")]
        if link is None or not all(path.exists() and path.is_relative_to(folder) for path in objects):
            sys.exit(f"mutate: the extension is not built in {root}: {how}")
        compilers = {}
        for isa in ISAS:
            words = entries[f"kernels_{isa}.o"]
            keep = [w for i, w in enumerate(words) if w != "-MMD" and not {"-MF", "-o", "-c"} & {w, words[i - 1]}]
            compilers[isa] = keep
        return cls(root, compilers, link)


class Worker:
    """A private copy of the checkout, in which one change at a time is compiled and tested."""

    def __init__(self, folder: Path, build: Build, isas: tuple[str, ...], environment: dict[str, str] | None = None) -> None:
        self.folder, self.build, self.isas, self.environment = folder, build, isas, environment or {}
        campaigns.copy_checkout(folder)
        record = json.loads((ROOT / "gptfast/_build.json").read_text())
        record["extensions"].pop("_C_cuda", None)
        record["skipped"]["_C_cuda"] = "left out"
        (folder / "gptfast/_build.json").write_text(json.dumps(record))
        place = self.build.link.index("-o") + 1
        self.extension = folder / "gptfast" / Path(self.build.link[place]).name
        shutil.copyfile(self.build.link[place], self.extension)

    def compile(self, name: str) -> str | None:
        """Links the extension with this header as it is in the copy; returns the compiler's message where it does not compile.

        A header of its own is a unit of its own, whose functions stand before those of the checkout's objects; one that other
        headers include is compiled with all kernels.
        """
        header, objects, link = Path(name).name, [], list(self.build.link)
        others = [path for path in (ROOT / "csrc/cpu").glob("*.h") if path.name not in ("kernels.h", header)]
        alone = not any(f'"cpu/{header}"' in path.read_text() for path in others)
        for isa in self.isas:
            unit, target = self.folder / f"unit_{isa}.cpp", self.folder / f"unit_{isa}.o"
            unit.write_text(f'#define GPTFAST_ISA {isa}\n#include "cpu/{header if alone else "kernels.h"}"\n')
            flags = [word.replace(f"-I{self.build.root}/csrc", f"-I{self.folder}/csrc") for word in self.build.compile[isa]]
            done = subprocess.run([*flags, "-w", "-c", str(unit), "-o", str(target)], capture_output=True, text=True)
            if done.returncode:
                return done.stderr
            objects.append(str(target))
        link[link.index("-o") + 1] = str(self.extension)
        first = next(i for i, word in enumerate(link) if word.endswith(".o"))
        done = subprocess.run([*link[:first], *objects, *link[first:], "-Wl,-z,muldefs"], capture_output=True, text=True)
        return done.stderr if done.returncode else None

    def test(self, name: str, select: str | None, limit: float) -> tuple[str, float]:
        """('passed' | 'failed' | 'crashed' | 'too slow', seconds)."""
        tests, expression = family(name)
        words = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        wanted = " and ".join(f"({part})" for part in (expression, select) if part)
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "GPTFAST_REQUIRE": "", **self.environment}
        start = time.monotonic()
        process = subprocess.Popen(
            [*words, *(["-k", wanted] if wanted else [])], cwd=self.folder, env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self.printed = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "too slow", limit
        status = process.returncode
        crashed = status < 0 or status >= 99
        if status in (4, 5) or not (crashed or re.search(r"\d+ (?:passed|failed|error)", self.printed)):
            sys.exit(f"mutate: nothing was tested: {shlex.join(words)}\n{self.printed[-2000:]}")
        result = "passed" if status == 0 else "crashed" if crashed else "failed"
        return result, time.monotonic() - start

    def try_change(self, mutant: Mutant, select: str | None, limit: float) -> str:
        """'passed' (it survived), how it was noticed, or 'not compiled'."""
        source, copy = (ROOT / mutant.file).read_text(), self.folder / mutant.file
        copy.write_text(mutant.apply(source))
        try:
            if mutant.file.startswith("csrc/cpu/") and self.compile(mutant.file) is not None:
                return "not compiled"
            return self.test(mutant.file, select, limit)[0]
        finally:
            copy.write_text(source)


def baseline(worker: Worker, name: str, select: str | None) -> float:
    """Seconds of the tests without a change, on objects made the way a change's are; ends the run where they fail."""
    if name.startswith("csrc/cpu/"):
        problem = worker.compile(name)
        if problem is not None:
            sys.exit(f"mutate: {name} does not compile as it is: {problem}")
    result, seconds = worker.test(name, select, 1800)
    if result != "passed":
        print(worker.printed[-3000:])
        print(f"mutate: the tests of {name} {result} without a change", file=sys.stderr)
        sys.exit(2)
    return seconds


def explanation(mutant: Mutant) -> str | None:
    known = json.loads(EXPLAINED.read_text())["mutants"] if EXPLAINED.exists() else []
    same = [m["reason"] for m in known if (m["file"], m["before"], m["after"]) == (mutant.file, mutant.before, mutant.after)]
    return same[0] if same else None


def campaign(name: str, options: argparse.Namespace, workers: queue.Queue[Worker], watched: Worker | None) -> dict[str, Any]:
    """Tries changes of one file until `count` of them compiled; prints and returns what became of them."""
    tried = [m for m in mutants(name, (ROOT / name).read_text(), options.seed) if m.kind in options.kind]
    first = workers.get()
    seconds = baseline(first, name, options.select)
    workers.put(first)
    limit = options.limit or max(60.0, 4 * seconds)
    print(f"{name}: {len(tried)} changes known, tests take {seconds:.0f} s, a change {limit:.0f} s at most", flush=True)

    def attempt(mutant: Mutant) -> str:
        worker = workers.get()
        try:
            return worker.try_change(mutant, options.select, limit)
        finally:
            workers.put(worker)

    results: list[tuple[Mutant, str]] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        while tried and (missing := options.count - sum(result != "not compiled" for _, result in results)) > 0:
            now, tried = tried[:missing], tried[missing:]
            for mutant, result in zip(now, pool.map(attempt, now), strict=True):
                if result == "passed" and watched is not None:
                    result = watched.try_change(mutant, options.select, 10 * limit)
                    result = result if result == "passed" else "sanitizer"
                results.append((mutant, result))
                print(f"  {'SURVIVED' if result == 'passed' else result:12} {mutant}", flush=True)
    counts = Counter("killed" if result in ("failed", "crashed", "too slow", "sanitizer") else result for _, result in results)
    survivors = [m._asdict() | {"reason": explanation(m)} for m, result in results if result == "passed"]
    unexplained = [s for s in survivors if s["reason"] is None]
    return {
        "seed": options.seed, "killed": counts["killed"], "survived": len(unexplained),
        "explained": len(survivors) - len(unexplained),
        "not_compiled": counts["not compiled"], "isas": list(options.isa),
        "by_sanitizer": sum(result == "sanitizer" for _, result in results),
        "survivors": [{key: s[key] for key in ("line", "kind", "before", "after", "reason")} for s in survivors],
    }


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P tests/mutate.py", description="Mutation testing of the kernels.")
    parser.add_argument("--file", action="append", help="a kernel file (default: every csrc/cpu/*_kernel.h)")
    parser.add_argument("--count", type=int, default=12, help="changes a file that compile (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="draws the changes (default: 0)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these kinds of changes (default: all)")
    parser.add_argument("--list", action="store_true", help="only print the changes")
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time, each in a copy of its own (default: 1)")
    parser.add_argument("--isa", action="append", choices=ISAS, help="instruction sets that get the change (default: all)")
    parser.add_argument("--asan", action="store_true", help="survivors run once more under the sanitizers (`make asan` first)")
    parser.add_argument("--select", "-k", help="pytest's -k: only these tests")
    parser.add_argument("--limit", type=float, help="seconds until a change counts as noticed (default: 4 x the tests', >= 60)")
    parser.add_argument("--output", type=Path, default=campaigns.FILE, help="where the record goes (default: tests/campaigns.json)")
    options = parser.parse_args(words)
    options.isa, options.kind = tuple(options.isa or ISAS), options.kind or KINDS
    options.file = options.file or sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*_kernel.h"))
    for name in options.file:
        if not (ROOT / name).is_file() or not re.match(r"csrc/cpu/\w+_kernel\.h$|csrc/cuda/\w+\.cuh$|kernels/[a-z]\w*\.py$", name):
            parser.error(f"{name} is not a kernel file of this checkout (csrc/cpu/*_kernel.h, csrc/cuda/*.cuh, kernels/*.py)")
    return options


def main(words: list[str]) -> int:
    options = arguments(words)
    if options.list:
        for name in options.file:
            known = [m for m in mutants(name, (ROOT / name).read_text(), options.seed) if m.kind in options.kind]
            print(*known[: options.count], sep="\n")
        return 0
    total = len(options.file) * options.count
    print(f"mutate: {len(options.file)} files x {options.count} changes, about 15 s each: {max(total // 4, 1)} min", flush=True)
    build, failed, watched = Build.read(ROOT, "make build"), False, None
    with tempfile.TemporaryDirectory(prefix="gptfast-mutate-") as folder:
        workers: queue.Queue[Worker] = queue.Queue()
        for number in range(options.jobs):
            workers.put(Worker(Path(folder, str(number)), build, options.isa))
        if options.asan:
            instrumented = Build.read(ROOT / "build/asan", "make asan")
            environment = campaigns.sanitizer_environment(Path(folder, "report"))
            watched = Worker(Path(folder, "asan"), instrumented, options.isa, environment)
        for name in options.file:
            facts = campaign(name, options, workers, watched)
            counted = facts["killed"] + facts["survived"]
            good = counted == 0 or facts["killed"] >= NEEDED * counted
            failed |= not good
            verdict = "" if good else ": NOT ENOUGH"
            print(f"{name}: {facts['killed']} of {counted} noticed, {facts['explained']} explained{verdict}", flush=True)
            numbers = ["--count", str(options.count), "--seed", str(options.seed)]
            command = ["python", "-P", "tests/mutate.py", "--file", name, *numbers]
            command += [word for kind in options.kind for word in ("--kind", kind)] if len(options.kind) < len(KINDS) else []
            command += ["--select", options.select] if options.select else []
            command += ["--asan"] if options.asan else []
            campaigns.write(f"mutate {name}", {"command": shlex.join(command), **facts}, [name, *family(name)[0]], options.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
