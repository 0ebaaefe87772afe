"""What text is read from: every kind of input gives the same documents, and each bad one a line that names the place."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptfast import Error, LoadError, data, sources
from gptfast.sources import Reader, Source, find

TEXTS = ["plain", "two\nlines", 'a "quoted", text', "naïve 日本 🌍", "", " spaces  ", "tab"]
BAD = '{"text": "fine"}\n{"text": \n{"other": 1}\n[1]\n{"text": null}\n{"text": "\\ud800"}\n\n{"text": "last"}\n'


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    """A file of the kind that its suffix names, with another column beside."""
    rows = [{"id": number, column: text} for number, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with open(path, "w", newline="") as file:
            how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
            writer = csv.writer(file, **how)
            writer.writerow(["id", column])
            writer.writerows([row["id"], row[column]] for row in rows)
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


def saved(folder: Path, texts: list[str], files: int = 2) -> Path:
    """A dataset folder as save_to_disk() of the library `datasets` lays it out."""
    arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        share = texts[len(texts) * number // files : len(texts) * (number + 1) // files]
        table = arrow.table({"text": arrow.array(share, arrow.string()), "label": [0] * len(share)})
        with arrow.OSFile(str(folder / name), "wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def documents(path: Path, **more: Any) -> list[str]:
    reader = Reader(**more)
    return [text for source in find([path]) for text in reader.documents(source)]


# ------------------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_rows_are_documents(tmp_path: Path, name: str) -> None:
    assert documents(write(tmp_path / name, TEXTS)) == TEXTS
    assert documents(write(tmp_path / name, TEXTS, "body"), column="body") == TEXTS


def test_tab_separated_text_has_no_quotes(tmp_path: Path) -> None:
    texts = ['"', 'a "word" b', '"open', "plain"]
    assert documents(write(tmp_path / "a.tsv", texts)) == texts


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\n\r\n\"two\r\nlines\",2\r\n")
    assert documents(tmp_path / "a.csv") == ["one", "two\r\nlines"]


def test_a_dataset_folder(tmp_path: Path) -> None:
    assert documents(saved(tmp_path / "set", TEXTS)) == TEXTS
    saved(tmp_path / "dict/train", TEXTS[:3])
    saved(tmp_path / "dict/test", TEXTS[3:])
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert documents(tmp_path / "dict") == TEXTS[:3], "what is there to test on is not trained on"
    assert documents(tmp_path / "dict/test") == TEXTS[3:]


def test_a_dataset_that_the_library_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed; its format on disk is tested above")
    whole = datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)})
    whole.save_to_disk(tmp_path / "set", num_shards=2)
    assert documents(tmp_path / "set") == TEXTS
    datasets.DatasetDict({"train": whole.select([2, 0]), "test": whole}).save_to_disk(tmp_path / "dict")
    assert documents(tmp_path / "dict") == [TEXTS[2], TEXTS[0]]


def test_a_folder_of_all_kinds_but_not_what_is_being_written(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "sub/c.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, ["x"])
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "e.md").write_text("text")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/merges.txt").write_text("a b")
    found = find([tmp_path], without=tmp_path / "out.partial")
    assert [Path(source.name).name for source in found] == ["a.jsonl", "b.csv", "d.txt", "c.tsv"]
    assert [source.kind for source in find([tmp_path / "e.md", tmp_path / "b.csv"], "txt")] == ["txt", "txt"]


def test_a_character_on_the_edge_of_a_block(tmp_path: Path) -> None:
    text = "aé日🌍" * 9
    (tmp_path / "a.txt").write_text(text)
    for size in range(1, 9):
        assert "".join(Reader().blocks(find([tmp_path / "a.txt"])[0], size)) == text


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x"}\n')))
    (source,) = find(["-"], "jsonl")
    assert list(Reader().documents(source)) == ["x"]
    with pytest.raises(Error, match="standard input can be read once"):
        find(["-", "-"])
    with pytest.raises(Error, match="a Parquet file is read from its end"):
        find(["-"], "parquet")


# -------------------------------------------------------------------------------------------------------------------- what is bad


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "n": 1}\n{"body": "x", "n": 1}', r"a\.jsonl, line 2: .*\"text\" is needed; it has body, n"),
        ("a.jsonl", '{"text": "\\udc00"}', r"a\.jsonl, line 1: .*surrogate pair, U\+DC00"),
        ("a.csv", "id,body\n1,x\n", r"a\.csv: no column 'text'; it has id, body; --column"),
        ("a.csv", "id,text\n1,x\n2\n", r"a\.csv, line 3: 1 fields, the first line names 2"),
        ("a.csv", 'id,text\n1,"x\ny\n', r"a\.csv, line 2: not CSV"),
        ("a.csv", b"id,text\n1,ab\xff\n", r"a\.csv, line 2: not UTF-8 text \(byte 0xff at offset 12\)"),
        ("a.tsv", "1\tx\n", r"a\.tsv: no column 'text'; it has 1, x"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a whole Parquet file"),
        ("a.parquet", b"PAR1" + b"x" * 200 + b"PAR1", r"a\.parquet: not a whole Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="the data extra is not installed")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Error, match=message) as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_and_with_other_values(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(Error, match=r"no column 'text'; it has id, body; --column"):
        documents(write(tmp_path / "a.parquet", TEXTS, "body"))
    parquet.write_table(arrow.table({"text": ["x", None, "y"], "number": [1, 2, 3]}), tmp_path / "b.parquet")
    with pytest.raises(LoadError, match=r"b\.parquet, row 2: 'text' is None; text is needed"):
        documents(tmp_path / "b.parquet")
    assert documents(tmp_path / "b.parquet", skip_bad=True) == ["x", "y"]
    assert documents(tmp_path / "b.parquet", skip_bad=True, column="number") == []


def test_without_pyarrow_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Error, match=r"pip install 'gptfast-torch\[data\]'"):
        documents(tmp_path / "a.parquet")


def test_skipped_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(BAD)
    said: list[str] = []
    reader = Reader(skip_bad=True, say=said.append)
    assert list(reader.documents(find([tmp_path / "a.jsonl"])[0])) == ["fine", "last"] and reader.skipped == 5
    assert len(said) == 3 and all(f"a.jsonl, line {line}" in text for line, text in zip((2, 3, 4), said, strict=True))


def test_a_line_that_never_ends_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LONGEST", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "' + "y" * 1000 + '"}\n{"text": "z"}\n')
    with pytest.raises(LoadError, match=r"line 2: longer than 100 bytes"):
        documents(tmp_path / "a.jsonl")
    assert documents(tmp_path / "a.jsonl", skip_bad=True) == ["x", "z"]
    (tmp_path / "a.csv").write_text("text\n" + "y" * 1000)
    with pytest.raises(LoadError, match=r"a\.csv, line 2: longer than 100 bytes"):
        documents(tmp_path / "a.csv")


STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "indices": (lambda f: (f / "state.json").write_text('{"_indices_files": [{"filename": "x"}]}'), "flatten_indices"),
    "outside": (lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}'), "no file of the folder"),
    "no list": (lambda f: (f / "state.json").write_text("{}"), "no list of data files"),
    "not JSON": (lambda f: (f / "state.json").write_text("{"), "not JSON"),
    "no rows": (lambda f: (f / "state.json").write_text('{"_data_files": []}'), "without rows"),
    "no train": (lambda f: (f / "dataset_dict.json").write_text('{"splits": ["test"]}'), r"\['test'\] and no train"),
    "cut": (lambda f: (f / "data-00000-of-00002.arrow").write_bytes(b"\xff\xff\xff\xff\x10\0\0\0"), "not a whole Arrow file"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_dataset_folder_that_is_none(tmp_path: Path, state: str) -> None:
    change, message = STATES[state]
    change(saved(tmp_path / "set", TEXTS))
    with pytest.raises(Error, match=message):
        documents(tmp_path / "set")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Error, match="format is 'pdf'; allowed: txt, jsonl"):
        find([tmp_path], "pdf")
    with pytest.raises(LoadError, match="No such file"):
        list(Reader().documents(Source("gone.jsonl", "jsonl", tmp_path / "gone.jsonl", 0)))
    with pytest.raises(LoadError, match="no such file"):
        list(data.read_texts(tmp_path / "gone.csv"))
