"""gptfast/options.py: one conversion for flags and YAML, the order of sources, and errors that name the place."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptfast import Error, LoadError, options
from gptfast.config import GPT2Config, TrainConfig, option
from gptfast.generation.parameters import SamplingParams


@dataclass
class Sample:
    whole: int = option(3, "a count", low=1, high=10)
    rate: float = option(0.5, "a rate", low=0.0, high=1.0)
    free: float = option(0.0, "any number")
    name: str = option("cosine", "a name", choices=("cosine", "constant"))
    text: str = option("", "any text")
    flag: bool = option(False, "a switch")
    maybe: int | None = option(None, "a count or nothing (default: all)")
    words: tuple[str, ...] = option((), "words")
    ids: list[int] = dataclasses.field(default_factory=list, metadata={"help": "ids"})
    bias: dict[int, float] | None = option(None, "id=value")  # noqa: RUF009 - ruff does not know option() for a field
    mode: Literal["raw", "processed"] = option("raw", "a literal")
    hidden: object = None


KEYS = options.keys(Sample)


def test_keys_leave_out_fields_without_help_and_know_the_types() -> None:
    assert list(KEYS) == [f.name for f in dataclasses.fields(Sample)][:-1]
    assert [KEYS[n].shape for n in ("whole", "words", "ids", "bias")] == ["one", "list", "list", "mapping"]
    assert KEYS["mode"].choices == ("raw", "processed") and KEYS["maybe"].optional and not KEYS["whole"].optional
    with pytest.raises(TypeError, match="two classes declare the option whole"):
        options.keys(Sample, Sample)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("whole", "7", 7), ("rate", "1e-3", 1e-3), ("free", "-inf", float("-inf")), ("name", "constant", "constant"),
        ("maybe", "4", 4), ("maybe", "none", None), ("words", ["a", "b c"], ("a", "b c")), ("words", ["none"], ("none",)),
        ("ids", ["1", "-2"], [1, -2]), ("ids", 5, [5]), ("bias", ["50256=-inf", "1=2"], {50256: float("-inf"), 1: 2.0}),
        ("bias", {"3": 1}, {3: 1.0}), ("bias", ["none"], None), ("text", "none", "none"),
        ("rate", 1, 1.0),        ("flag", True, True), ("mode", "processed", "processed"),
    ],
)
def test_convert(name: str, text: Any, value: Any) -> None:
    result = options.convert(KEYS[name], text, name)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("whole", "x", "--whole is 'x'; a whole number is needed"),
        ("whole", 2.0, "--whole is 2.0; a whole number is needed"),
        ("whole", True, "--whole is True; a whole number is needed"),
        ("whole", "11", "--whole is 11; allowed: 1 to 10"),
        ("whole", None, "--whole has no value; a whole number is needed"),
        ("rate", "nan", "--rate is nan; allowed: 0.0 to 1.0"),
        ("rate", "-1", "--rate is -1; allowed: 0.0 to 1.0"),
        ("name", "cosin", "--name is 'cosin' (did you mean cosine?); allowed: cosine, constant"),
        ("flag", "yes", "--flag is 'yes'; true or false is needed"),
        ("text", 3, "--text is 3; text is needed"),
        ("text", ["a"], "--text is ['a']; text is needed"),
        ("ids", ["1", "z"], "--ids is 'z'; a whole number is needed"),
        ("bias", ["7"], "--bias is ''; a whole number is needed"),
        ("bias", ["7=x"], "--bias is 'x'; a number is needed"),
        ("whole", "9" * 5000, "a whole number is needed"),
    ],
)
def test_wrong_values_are_named(name: str, text: Any, message: str) -> None:
    with pytest.raises(Error, match=re.escape(message)):
        options.convert(KEYS[name], text, KEYS[name].flag)


def test_order_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("whole: 4\nrate: 1e-2\nwords: [x, y]\n")
    found = options.layers({"whole": 5, "other": 1}, file, {"whole": 6, "rate": 0.25, "text": "old"}, KEYS)
    assert found.command_line == {"whole": 5}, "what belongs to no class here is not its configuration"
    made = found.build(Sample)
    assert (made.whole, made.rate, made.text, made.words, made.name) == (5, 0.01, "old", ("x", "y"), "cosine")
    assert found.build(Sample, whole=9).whole == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("whol: 4", "unknown key 'whol' (did you mean whole?)"),
        ("whole: 4.5", "whole is 4.5; a whole number is needed"),
        ("whole: true", "whole is True; a whole number is needed"),
        ("hidden: 1", "unknown key 'hidden'"),
        ("- 1", "holds list; a mapping of option names to values is needed"),
        ("a: [", "line 1: not YAML"),
        ("a: !!python/object/apply:os.system [echo]", "not YAML"),
        ("whole:", "whole has no value"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(Error, match=re.escape(message)) as caught:
        options.layers({}, file, None, KEYS)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_config_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(LoadError, match=re.escape(str(path))):
            options.read_yaml(path, KEYS)
    (tmp_path / "empty").write_text("# nothing\n")
    assert options.read_yaml(tmp_path / "empty", KEYS) == {}


plain_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None)
@example(sample=Sample(text="a\x85b\u2028\u2029", words=("\x85",)))
@given(
    sample=st.builds(
        Sample,
        whole=st.integers(1, 10), rate=st.floats(0, 1), free=st.floats(allow_nan=False), text=plain_text, flag=st.booleans(),
        name=st.sampled_from(["cosine", "constant"]), maybe=st.none() | st.integers(), ids=st.lists(st.integers(), max_size=3),
        words=st.lists(plain_text, max_size=3).map(tuple), mode=st.sampled_from(["raw", "processed"]),
        bias=st.none() | st.dictionaries(st.integers(), st.floats(allow_nan=False), max_size=3),
    )
)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> None:
    file = tmp_path_factory.mktemp("yaml") / "c.yaml"
    file.write_text(options.to_yaml("Sample", sample, KEYS), encoding="utf-8")
    assert options.layers({}, file, None, KEYS).build(Sample) == sample


@pytest.mark.parametrize("cls", [GPT2Config, TrainConfig, SamplingParams])
def test_real_classes_round_trip_and_every_option_has_a_help(tmp_path: Path, cls: type) -> None:
    file = tmp_path / "c.yaml"
    known = options.keys(cls)
    file.write_text(options.to_yaml("Defaults", cls(), known))
    assert options.layers({}, file, None, known).build(cls) == cls()
    assert all(len(key.help) > 5 for key in known.values())


def _app(seen: list[dict[str, Any]]) -> Any:
    app = typer.Typer()

    @app.command()
    @options.accept({"Sample": KEYS})
    def run(given: dict[str, Any], target: str = "t") -> None:
        seen.append({"target": target, **given})

    return typer.main.get_command(app)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--whole", "3"], {"whole": 3}),
        (["--flag"], {"flag": True}),
        (["--no-flag", "--target", "u"], {"flag": False, "target": "u"}),
        (["--words", "a", "--words", "b"], {"words": ("a", "b")}),
        (["--maybe", "none"], {"maybe": None}),
        (["--free", "-1"], {"free": -1.0}),
        (["--bias", "5=-1.5"], {"bias": {5: -1.5}}),
    ],
)
def test_only_given_flags_count(arguments: list[str], expected: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []
    _app(seen).main(arguments, standalone_mode=False)
    assert seen == [{"target": "t", **expected}], "a default that nobody typed would override the config file"


def test_help_shows_flag_help_and_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _app([]).main(["--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    for piece in ("--whole", "a count", "(3)", "--no-flag", "(off)", "cosine, constant", "or nothing", "(all)", "INT=NUMBER"):
        assert piece in shown, piece
    assert "(default:" not in shown


def test_options_do_not_import_torch() -> None:
    code = "import sys, gptfast.options, gptfast.config, gptfast.generation.parameters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
