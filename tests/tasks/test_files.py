"""Task files: the same examples from every format, and a bad line named by file and line or counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gptfast import Error, LoadError
from gptfast.tasks.classification import Classification, Labelled
from gptfast.tasks.files import collect

ROWS = [('a "film"', "good"), ("no, not it", "bad"), ("été", "good")]
FORMS = {
    "plain.tsv": "".join(f"{text}\t{label}\n" for text, label in ROWS),
    "header.tsv": "Label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in ROWS),
    "dos.tsv": "\ufeff" + "".join(f"{text}\t{label}\r\n" for text, label in ROWS) + "\r\n",
    "plain.csv": 'a "film",good\n"no, not it",bad\nété,good\n',
    "header.csv": 'id,text,label\n1,"a ""film""",good\n2,"no, not it",bad\n3,été,good\n',
    "lines.jsonl": "\n\n".join(json.dumps({"text": text, "label": label, "more": 1}) for text, label in ROWS),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_formats(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(FORMS[name].encode()) if packed else FORMS[name].encode())
    examples = Classification().read(path)
    assert [(example.text, example.label) for example in examples] == ROWS and examples.skipped == 0


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",good\n\nshort,bad\n')
    assert [example.line for example in Classification().read(tmp_path / "a.csv")] == [2, 5]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    read = Classification().read(tmp_path / "a.txt", labelled=False)
    assert read.items == [Labelled(line=1, text="one"), Labelled(line=3, text="two")]


BAD = {
    "json.jsonl": ('{"text": "x", "label": "a"}\n{"text": \n', 2, "not JSON"),
    "list.jsonl": ('{"text": "x", "label": "a"}\n\n[1]\n', 3, "no object"),
    "label.jsonl": ('{"text": "x"}\n{"text": "x", "label": "a"}\n', 1, "label is missing"),
    "kind.jsonl": ('{"text": "x", "label": "a"}\n{"text": "x", "label": [1]}\n', 2, "label is [1]"),
    "empty.tsv": ("x\ta\n  \tb\n", 2, "text is empty"),
    "blank.tsv": ("x\ta\ny\t \n", 2, "label is empty"),
    "short.csv": ("x,a\ny\n", 2, "label is missing"),
    "wide.tsv": ("x\ta\ny\ta\tb\n", 2, "3 columns"),
    "number.jsonl": ('{"text": 3, "label": "a"}\n{"text": "x", "label": "a"}\n', 1, "text is 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, name: str) -> None:
    text, line, problem = BAD[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LoadError) as caught:
        Classification().read(path)
    assert f"{path}, line {line}: " in str(caught.value) and problem in str(caught.value) and "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=f"1 bad lines are skipped; the first: .*line {line}"):
        examples = Classification().read(path, skip_bad=True)
    assert examples.skipped == 1 and [(e.text, e.label) for e in examples] == [("x", "a")]


def test_labels_that_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x\tgood\ny\tawful\n")
    with pytest.raises(LoadError, match=r"a\.tsv, line 2: label is 'awful'; the model's classes: bad, good"):
        Classification(labels=["bad", "good"]).read(tmp_path / "a.tsv")
    (tmp_path / "n.jsonl").write_text('{"text": "x", "label": 10}\n{"text": "y", "label": 9}\n')
    examples = Classification().read(tmp_path / "n.jsonl")
    assert Classification().prepare(examples.items).labels == ["9", "10"], "numbers in their own order"
    with pytest.raises(Error, match="every example has the label '10'"):
        Classification().prepare(examples.items[:1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "no examples"),
        ("a.jsonl", b"\n\n", "no examples"),
        ("a.tsv", b"x\ta\n\xff\tb\n", "line 2: not UTF-8"),
        ("a.tsv.gz", gzip.compress(b"x\ta\n" * 99)[:20], "not a whole .gz"),
        ("a.tsv.gz", b"x\ta\n", "not a whole .gz"),
        ("a.csv", b'x,a\n"y', "line 2: not CSV"),
        ("a.parquet", b"x", r"allowed are \.jsonl, \.tsv, \.csv"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for skip in (False, True):
        with pytest.raises(Error, match=message):
            Classification().read(tmp_path / name, skip_bad=skip)


def test_no_such_file_and_nothing_but_bad_lines(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"absent\.tsv: no such file"):
        collect(tmp_path / "absent.tsv", ("text",), lambda record: record)
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(LoadError, match=r"no examples in it; the first bad line: .*line 1"):
        Classification().read(tmp_path / "a.jsonl", skip_bad=True)
