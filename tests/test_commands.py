"""What generate, chat and evaluate say beside their answers: speed, the memory's limit, formats beside fp32; packed models."""

from __future__ import annotations

import builtins
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast import benchmark, packed
from gptfast.commands import chat, speed
from gptfast.generation.loading import cpp_reason

Run = Callable[..., tuple[int, str, str]]
FORMATS = ["fp32", "bf16", "int8", "int4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("commands") / "model"
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat. " * 20, "ein Hund läuft über die Straße. " * 20], 300)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def runs_here(dtype: str) -> None:
    reason = None if dtype in ("fp32", "bf16") else cpp_reason(dtype, "cpu")
    if reason is not None:
        pytest.skip(f"{dtype}: {reason}")


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> tuple[str, Path]:
    """A dtype and the model packed in it."""
    runs_here(request.param)
    return request.param, packed.write(model, request.param, tmp_path / "file.gptfast")


# -------------------------------------------------------------------------------------------------------------------------- speed


def test_a_clock_leaves_out_what_the_first_call_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.00001, 1.5, 1.50001, 2.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    clock = speed.Clock()
    for _ in range(5):
        clock.mark(0, 1)
    facts = clock.pace()
    assert facts["seconds"] == 2.0 and facts["first_token_s"] == 1.0
    assert facts["ms_per_token"] == pytest.approx(1e3 / 3, rel=1e-3) and facts["tokens_per_s"] == pytest.approx(3, rel=1e-3)


def test_a_clock_of_several_choices_and_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.00001, 2.0, 2.00001, 3.0, 9.0, 9.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    clock = speed.Clock()
    for choice in (0, 1, 0, 1, 0):
        clock.mark(choice, 1)
    facts = clock.pace()
    assert facts["ms_per_token"] == pytest.approx(1000, rel=1e-3) and facts["tokens_per_s"] == pytest.approx(1.5, rel=1e-3)
    empty = speed.Clock().pace()
    assert empty["seconds"] == 0 and empty["ms_per_token"] is empty["tokens_per_s"] is None
    assert speed.line(0, "length", {**empty, **speed.memory_limit.__annotations__}) == "0 tokens in 0.00 s, ended by length"


def test_generate_says_how_fast_it_was(run: Run, model: Path) -> None:
    code, _, err = run("generate", model, "the cat", "--max-tokens", "8", "--ignore-eos", "--threads", "1")
    assert code == 0 and "8 tokens in " in err.splitlines()[-1] and "fit into the cache" in err and "engine: " in err
    facts = json.loads(run("generate", model, "the cat", "--max-tokens", "8", "--ignore-eos", "--json")[1])["speed"]
    assert facts["ms_per_token"] > 0 and facts["tokens_per_s"] == pytest.approx(1e3 / facts["ms_per_token"])
    assert 0 < facts["first_token_s"] < facts["seconds"] and facts["bytes_per_token"] > 100_000
    assert facts["read_bytes_per_s"] is facts["memory_fraction"] is None


def test_generate_says_what_the_memory_allows(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "cache_bytes", lambda device="cpu": 1)
    code, out, err = run("generate", model, "the", "--max-tokens", "8", "--ignore-eos", "--json")
    facts = json.loads(out)["speed"]
    assert code == 0 and facts["read_bytes_per_s"] > 1e8
    shortest = facts["bytes_per_token"] / facts["read_bytes_per_s"]
    assert facts["memory_fraction"] == pytest.approx(shortest / (facts["ms_per_token"] * 1e-3))
    assert f"{facts['memory_fraction']:.2f} of the memory limit" in err.splitlines()[-1]
    several = json.loads(run("generate", model, "the", "--max-tokens", "4", "--n", "2", "--json")[1])
    assert several["speed"]["memory_fraction"] is None


def test_the_answers_of_a_stream_are_those_of_generate(run: Run, model: Path) -> None:
    arguments = ("the cat", "--max-tokens", "6", "--seed", "3", "--n", "3", "--logprobs", "2", "--device", "cpu")
    found = json.loads(run("generate", model, *arguments, "--json")[1])["completions"]
    with gptfast.Engine(model, device="cpu") as engine:
        wanted = engine.generate("the cat", gptfast.SamplingParams(max_tokens=6, seed=3, n=3, logprobs=2))
    assert [answer["token_ids"] for answer in found] == [answer.token_ids for answer in wanted]
    assert [answer["text"] for answer in found] == [answer.text for answer in wanted]
    assert [len(answer["top_logprobs"]) for answer in found] == [len(answer.token_ids) for answer in wanted]


# ------------------------------------------------------------------------------------ speculation, beams, log-probabilities


def test_speculation_changes_no_text(run: Run, model: Path) -> None:
    arguments = ("the cat sat on the cat sat on", "--max-tokens", "12", "--seed", "3", "--ignore-eos", "--device", "cpu")
    plain = run("generate", model, *arguments)[1]
    for speculation in ("lookup", model):
        code, out, err = run("generate", model, *arguments, "--speculation", speculation)
        assert (code, out) == (0, plain), err
    code, _, err = run("generate", model, "the", "--speculation", "/not/there")
    assert code == 2 and "/not/there" in err and err.count("gptfast: error") == 1


def test_chat_speculates_too(run: Run, model: Path, typed: Callable[..., None]) -> None:
    arguments = ("--max-tokens", "6", "--seed", "7", "--ignore-eos", "--device", "cpu")
    typed("the cat sat on the cat", "")
    plain = run("chat", model, *arguments)[1]
    typed("the cat sat on the cat", "")
    assert run("chat", model, *arguments, "--speculation", "lookup")[:2] == (0, plain)


def test_beams(run: Run, model: Path) -> None:
    arguments = ("the cat", "--max-tokens", "5", "--ignore-eos", "--device", "cpu", "--num-beams", "4", "--length-penalty", "0.5")
    code, out, err = run("generate", model, *arguments, "--n", "3", "--json")
    found = json.loads(out)["completions"]
    assert code == 0, err
    with gptfast.Engine(model, device="cpu") as engine:
        params = gptfast.SamplingParams(max_tokens=5, n=3, ignore_eos=True)
        wanted = engine.beam_search("the cat", 4, params, length_penalty=0.5)
    assert [(a["token_ids"], a["score"]) for a in found] == [(a.token_ids, a.score) for a in wanted]
    _, out, err = run("generate", model, *arguments, "--early-stopping", "never")
    assert out.startswith(f"--- 0 score {wanted[0].score:.4f}\n") and "seed" not in err and "5 tokens in " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-beams", "2", "--temperature", "1"), "--temperature does nothing with --num-beams 2"),
        (("--num-beams", "2", "--stop", "x"), "--stop does nothing with --num-beams 2"),
        (("--num-beams", "2", "--n", "3"), "3 answers from num_beams=2"),
        (("--num-beams", "2", "--speculation", "lookup"), "--num-beams draws nothing"),
        (("--length-penalty", "2"), "it goes with --num-beams of 2 or more"), (("--num-beams", "0"), "--num-beams is 0"),
        (("--num-beams", "2", "--early-stopping", "soon"), "--early-stopping is 'soon'; allowed: false, true, never"),
    ],
)
def test_beams_that_are_refused(run: Run, model: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("generate", model, "the", *arguments)
    assert (code, out) == (2, "") and message in err.splitlines()[-1] and err.count("gptfast: error") == 1


def test_log_probabilities_are_printed(run: Run, model: Path) -> None:
    arguments = ("the cat", "--max-tokens", "3", "--ignore-eos", "--seed", "1", "--logprobs", "2")
    found = json.loads(run("generate", model, *arguments, "--json")[1])["completions"][0]
    text, _, table = run("generate", model, *arguments)[1].partition("      log P  token\n")
    assert text == found["text"] + "\n" and len(table.splitlines()) == 3
    for line, value, top in zip(table.splitlines(), found["logprobs"], found["top_logprobs"], strict=True):
        assert line.split()[0] == f"{value:.4f}" and all(f" {other:.4f}" in line.partition("of ")[2] for other in top.values())
    assert "log P" not in run("generate", model, "the cat", "--max-tokens", "3")[1]


def test_stops_and_allowed_tokens(run: Run, model: Path) -> None:
    arguments = ("the cat", "--max-tokens", "9", "--ignore-eos", "--seed", "1", "--json")
    free = json.loads(run("generate", model, *arguments)[1])["completions"][0]
    stop = free["token_ids"][3]
    stopped = json.loads(run("generate", model, *arguments, "--stop-token-ids", stop)[1])["completions"][0]
    end = free["token_ids"].index(stop) + 1
    assert stopped["finish_reason"] == "stop" and stopped["token_ids"] == free["token_ids"][:end]
    only = ("--allowed-tokens", "5", "--allowed-tokens", "7", "--banned-tokens", "7")
    assert set(json.loads(run("generate", model, *arguments, *only)[1])["completions"][0]["token_ids"]) == {5}


# ------------------------------------------------------------------------------------------------------------------ packed files


@pytest.mark.parametrize("damage", ["truncated", "version", "weights"])
def test_a_bad_packed_file_is_one_line(run: Run, model: Path, tmp_path: Path, damage: str) -> None:
    good = packed.write(model, "fp32", tmp_path / "good.gptfast").read_bytes()
    torch.manual_seed(1)
    other = packed.write(gptfast.GPT2LMHeadModel(packed.config_of(model)), "fp32", tmp_path / "other.gptfast").read_bytes()
    bad = {"truncated": good[:-5000], "version": good[:8] + b"\7" + good[9:], "weights": good[:-40] + other[-40:]}[damage]
    message = {"truncated": "truncated", "version": "version 7", "weights": "name different weights"}[damage]
    (tmp_path / "bad.gptfast").write_bytes(bad)
    for command in (("generate", "the"), ("score", "the"), ("evaluate", "--data", tmp_path / "x.txt"), ("chat",)):
        code, out, err = run(command[0], tmp_path / "bad.gptfast", *command[1:])
        assert (code, out) == (2, "") and "bad.gptfast" in err and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_packed_file_is_a_model(run: Run, model: Path, file: tuple[str, Path], tmp_path: Path) -> None:
    dtype, path = file
    arguments = ("--max-tokens", "6", "--seed", "1", "--device", "cpu")
    code, out, err = run("generate", path, "the cat", *arguments)
    assert code == 0 and dtype in next(line for line in err.splitlines() if line.startswith("engine: ")), "the file's own dtype"
    assert run("generate", model, "the cat", *arguments, "--dtype", dtype)[1] == out, "the folder gives the same text"
    assert run("score", path, "the cat")[1] == run("score", model, "the cat", "--dtype", dtype)[1]
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 9)
    ours = json.loads(run("evaluate", path, "--data", tmp_path / "t.txt", "--json")[1])
    theirs = json.loads(run("evaluate", model, "--dtype", dtype, "--data", tmp_path / "t.txt", "--json")[1])
    assert ours["perplexity"] == theirs["perplexity"] and "fp32" not in ours
    wrong = "bf16" if dtype == "fp32" else "fp32"
    code, _, err = run("generate", path, "the", "--dtype", wrong)
    assert code == 2 and f"dtype is '{wrong}'" in err and f"holds {dtype}" in err


# ---------------------------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("dtype", FORMATS[1:])
def test_evaluate_shows_a_format_beside_fp32(run: Run, model: Path, tmp_path: Path, dtype: str) -> None:
    runs_here(dtype)
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 9)
    plain = json.loads(run("evaluate", model, "--data", tmp_path / "t.txt", "--json")[1])
    assert plain["dtype"] == "fp32" and "fp32" not in plain
    found = json.loads(run("evaluate", model, "--data", tmp_path / "t.txt", "--json", "--dtype", dtype)[1])
    assert found["dtype"] == dtype and found["perplexity"] != plain["perplexity"]
    assert found["fp32"] == {key: plain[key] for key in ("loss", "perplexity", "bits_per_byte")}
    assert found["difference_percent"] == pytest.approx(100 * (found["perplexity"] / plain["perplexity"] - 1), abs=1e-6)
    assert abs(found["difference_percent"]) < {"bf16": 1, "int8": 3, "int4": 15}[dtype]
    _, out, _ = run("evaluate", model, "--data", tmp_path / "t.txt", "--dtype", dtype)
    assert f"{found['perplexity']:.4f} in {dtype}, {plain['perplexity']:.4f} in fp32: {found['difference_percent']:+.3f} %" in out


def test_evaluate_of_shards_in_another_format(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"the cat sat on mat {i}. "}) for i in range(40)))
    assert run("prepare", tmp_path / "in.jsonl", "--out", tmp_path / "data", "--tokenizer", model, "--val", "0.5")[0] == 0
    found = json.loads(run("evaluate", model, "--data", tmp_path / "data", "--dtype", "bf16", "--json")[1])
    assert math.isfinite(found["perplexity"]) and found["fp32"]["perplexity"] == pytest.approx(found["perplexity"], rel=0.05)


def test_evaluate_of_a_packed_file_says_what_it_lacks(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 9)
    code, out, err = run("evaluate", packed.write(model, "bf16", tmp_path / "f"), "--data", tmp_path / "t.txt")
    assert code == 0 and "perplexity" in out and "no fp32 beside it: the file holds bf16 alone" in err


# -------------------------------------------------------------------------------------------------------------------------- chat


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """typed("a line", KeyboardInterrupt(), ...): what input() gives, in order, and then Ctrl-D."""

    def give(*lines: str | BaseException) -> None:
        waiting: Iterator[Any] = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr(builtins, "input", read)

    return give


def test_chat_continues_what_was_typed(run: Run, model: Path, typed: Callable[..., None]) -> None:
    typed("the cat", "", "ein Hund", "/text", "/reset", "/text", "/help", "/x")
    code, out, err = run("chat", model, "--max-tokens", "3", "--seed", "7", "--ignore-eos", "--device", "cpu")
    assert code == 0 and "seed 7" in err and "is a base model" in err and "no role" in err and "Ctrl-D" in err
    with gptfast.Engine(model, device="cpu") as engine:
        text = ""
        for number, line in enumerate(("the cat", "\n", "\nein Hund")):
            text += line.removesuffix("\n") if number == 1 else line
            (answer,) = engine.generate(text, gptfast.SamplingParams(max_tokens=3, seed=7 + number, ignore_eos=True))
            text += answer.text
            assert f"{answer.text}\n" in out
    assert out.endswith(f"{text}\n\n"), "/text shows all of it, and nothing after /reset"
    assert "the text is forgotten" in err and "/x is no command" in err and err.count("is a base model") == 3


def test_chat_as_json_and_its_limits(run: Run, model: Path, typed: Callable[..., None]) -> None:
    typed("the cat " * 30, "the", KeyboardInterrupt(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "\ud800")
    code, out, err = run("chat", model, "--max-tokens", "2", "--seed", "1", "--json")
    result = json.loads(out)
    assert code == 0 and result["answers"] == 1 and result["text"].startswith("the") and len(result["text"]) > 3
    assert "tokens, the model's context is 32" in err and "/reset forgets the text" in err and "Ctrl-D ends the session" in err
    assert "the line is not UTF-8 (byte 0)" in err and "surrogate" in err and "Traceback" not in err
    code, _, err = run("chat", model, "--n", "2")
    assert code == 2 and err == "gptfast: error: --n is 2; chat has one answer to a line\n"


def test_ctrl_c_ends_an_answer_and_not_the_session(run: Run, model: Path, typed: Callable[..., None], monkeypatch: Any) -> None:
    typed("the cat", "/text")
    stream = gptfast.Engine.stream

    def interrupted(self: Any, *given: Any) -> Iterator[Any]:
        for number, piece in enumerate(stream(self, *given)):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(gptfast.Engine, "stream", interrupted)
    code, out, err = run("chat", model, "--max-tokens", "9", "--seed", "7", "--ignore-eos")
    first, second = out.split("\n", 1)[0], out.rstrip("\n").rpartition("the cat")[2]
    assert code == 0 and "(stopped)" in err and first == second.split("\n")[0], "the text holds what was shown"


def test_what_is_typed_comes_in_by_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb"))
    assert list(chat.lines()) == ["a", "", "b"]


# --------------------------------------------------------------------------------------- the model that formats are compared on

ROOT = Path(__file__).parent.parent


def test_the_text_model_is_large_enough_and_its_commands_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    paragraph = "The engine reads every weight once for each token, and nothing that it does not need for it. "
    (tmp_path / "folder/a.txt").write_text("\n\n".join(f"{paragraph} Number {word}." for word in ("one", "two", "three", "one")))
    text = tmp_path / "text.jsonl"
    command = [sys.executable, "-P", ROOT / "bench/machine_text.py", tmp_path / "folder", "--out", text, "--limit-mb", "0.0005"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(text.read_text().splitlines()[0])["text"]
    assert document.count(paragraph.strip()) == 3, "a paragraph that occurs again is dropped"
    config = ("--config", ROOT / "bench/text.yaml")
    shape = json.loads(run("train", *config, "--print-config", "--json")[1])
    names = ("n_positions", "n_embd", "n_layer", "n_head")
    sizes = packed.shapes(gptfast.GPT2Config(vocab_size=16384, **{name: shape[name] for name in names}))
    assert sum(math.prod(size) for size in sizes.values()) > 20_000_000
    text.write_text("\n".join(json.dumps({"text": f"{document} {number}"}) for number in range(40)))
    assert run("prepare", text, "--out", tmp_path / "data", "--train-tokenizer", "300", "--val", "0.1")[0] == 0
    small = ("--steps", "2", "--batch", "2", "--microbatch", "1", "--n-embd", "16", "--n-layer", "1", "--n-head", "1")
    code, _, err = run("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *config, *small, "--context", "32")
    assert code == 0, err
    assert run("evaluate", tmp_path / "run", "--data", tmp_path / "folder/a.txt", "--dtype", "bf16")[0] == 0
