"""What a run prints and logs: plain lines where stderr is no terminal, one JSON object a line, what a crash cut off left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gptfast.training import log


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log.time, "monotonic", clock)
    return clock


def test_a_plain_line_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with log.Line() as line:
        for second in range(31):
            clock.now = 100.0 + second
            line.show(f"second {second}")
        line.say("stays")
        line.show("last", now=True)
    output = capsys.readouterr()
    assert output.out == "" and output.err.splitlines() == ["second 1", "second 11", "second 21", "stays", "last"]


def test_no_colour_and_no_live_line_with_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    with log.Line() as line:
        line.show("text", now=True)
    assert capsys.readouterr().err == "text\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    with log.Line() as line:
        line.show("live", now=True)
    assert "live" in capsys.readouterr().err


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with log.Line(enabled=False) as line:
        line.show("a", now=True)
        line.say("b")
    assert capsys.readouterr() == ("", "")


def test_the_log_is_json_and_survives_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = log.Log(path)
    first.write("step", step=1, loss=2.0)
    first.write("step", step=2, loss=math.nan)
    path.write_text(path.read_text() + '{"version": 1, "event": "step", "st')
    second = log.Log(path)
    second.write("step", step=2, loss=1.5)
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            assert json.loads(line)["version"] == log.VERSION
    assert [(r["step"], r["loss"]) for r in log.read(path)] == [(1, 2.0), (2, 1.5)]


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    lost = log.Log(tmp_path / "gone/log.jsonl")
    assert "No such file" in (lost.write("step", step=1) or "") and lost.write("step", step=2) is None
    assert log.Log(None).write("step") is None


def test_duration() -> None:
    assert [log.duration(s) for s in (-1, 5.9, 65, 3600 + 61)] == ["0:00", "0:05", "1:05", "1:01:01"]
