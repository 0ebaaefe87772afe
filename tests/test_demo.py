"""The demonstration on a small share of its own corpus: what it deals out, prints, writes and moves aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptfast import Error, demo
from gptfast.config import GPT2Config
from gptfast.hub import load_config
from gptfast.plot import curve, draw, plot


@pytest.fixture(scope="module")
def small() -> demo.Corpus:
    whole = demo.corpus()
    return demo.Corpus(whole.train[:30], [text for text in whole.held_out if 1000 < len(text) < 4000][:2])


def test_corpus_is_the_library_without_its_tests() -> None:
    found = demo.corpus()
    total = sum(map(len, found.train)), sum(map(len, found.held_out))
    assert sum(total) > 5e6 and 0.03 < total[1] / sum(total) < 0.25
    assert not set(found.train) & {text for text in found.held_out if len(text) > 500}
    assert any(b"class TestCase" in text for text in found.train + found.held_out)  # unittest is in, test/ is not
    assert not any(text.startswith(b'"""Regression tests') for text in found.train)
    assert demo.corpus() == found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, small: demo.Corpus) -> None:
    monkeypatch.setattr(demo, "corpus", lambda: small)
    monkeypatch.setattr(demo, "VOCABULARY", 300)
    monkeypatch.setattr(demo, "CONTEXT", 32)
    monkeypatch.setattr(demo, "WIDTH", 32)
    monkeypatch.setattr(demo, "LAYERS", 1)
    monkeypatch.setattr(demo, "STEPS_A_MINUTE", 300)


@pytest.mark.usefixtures("quick")
def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs/demo"
    first = demo.run(0.1, out)
    text = capsys.readouterr().out
    assert all(word in text for word in ("backends: ", "gptfast ", "gzip -9", "xz -9", "def read_lines(path):", "Try next:"))
    commands = text.partition("Try next:\n")[2].splitlines()
    assert len(commands) == 3 and all("gptfast " in command for command in commands)
    assert 1 < first["bits_per_byte"] < 8 and 1 < first["xz_bits_per_byte"] < 8 and first["step"] == 30
    assert {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl"} <= {path.name for path in out.iterdir()}
    assert isinstance(load_config(out), GPT2Config)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(record["version"] == 1 for record in records) and records[-1]["bits_per_byte"] == first["bits_per_byte"]
    second = demo.run(0.1, out, quiet=True)
    assert capsys.readouterr().out == ""
    assert second["bits_per_byte"] == first["bits_per_byte"]  # a seed gives the same model
    assert sorted(path.name for path in out.parent.iterdir()) == ["demo", "demo.1"]
    assert demo.run(0.1, out, seed=1, quiet=True)["bits_per_byte"] != first["bits_per_byte"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["demo", "demo.1", "demo.2"]


@pytest.mark.usefixtures("quick")
def test_a_run_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "mine").write_text("kept")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(0.01, out, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"] and (out / "mine").read_text() == "kept"
    for minutes in (0, -1, float("nan")):
        with pytest.raises(Error, match="minutes is"):
            demo.run(minutes, out)


def test_curve_in_the_terminal_and_as_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"version": 1, "event": "step", "step": n, "tokens": 1000 * n, "loss": 5 - n / 10} for n in range(1, 41)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"version": 1, "eve')
    points = curve(tmp_path)
    assert points == [(1000 * n, 5 - n / 10) for n in range(1, 41)]
    text = draw(points, width=40, height=5).splitlines()
    assert len(text) == 7 and text[0].startswith("  4.9") and text[0].rstrip().endswith("*") and "*" not in text[4][:20]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot([tmp_path], tmp_path / "loss.png").is_file is False and not (tmp_path / "loss.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    assert plot([tmp_path], tmp_path / "loss.png").is_file
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error, match=r"no log\.jsonl"):
        plot([tmp_path / "empty"], tmp_path / "x.png")
