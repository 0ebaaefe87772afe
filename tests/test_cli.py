"""The command line from end to end, in this process but for one real one: results, streams, exit codes, help."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import gptfast
from gptfast import cli, doctor, options
from gptfast import commands as shared

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("score", folder, ...) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and a tokenizer of 300 ids."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat. " * 20, "ein Hund läuft über die Straße. " * 20], 300)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "lines.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i}: the cat sat on mat {i * i}. " * 3}) + "\n" for i in range(200)))
    assert cli.main(["prepare", str(text), "--out", str(folder / "shards"), "--train-tokenizer", "280", "--val", "0.2"]) == 0
    return folder / "shards"


def _standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# ------------------------------------------------------------------------------------------------------------------------- help


def test_help_is_fast_and_imports_no_torch() -> None:
    """The one real process: the installed command's module, its exit code and its imports."""
    code = "import sys; sys.argv = ['gptfast', '--help']; from gptfast import cli; c = cli.main(); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules, 'yaml' in sys.modules, file=sys.stderr); sys.exit(c)"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and done.stderr.split() == ["False"] * 3, done.stderr
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1, f"{min(seconds):.2f} s"
    for group in (shared.START, shared.TRAIN, shared.RUN, shared.FILES, shared.MACHINE):
        assert group in done.stdout, "help groups its commands"


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_commands_are_those_that_exist() -> None:
    assert set(_commands()) == {
        "demo", "prepare", "train", "generate", "score", "evaluate", "chat", "serve", "convert", "backends", "doctor",
    }


@pytest.mark.parametrize("name", sorted(_commands()))
def test_every_option_has_help_and_shows_a_default(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for parameter in _commands()[name].params:
        if parameter.name != "help":
            assert parameter.help, parameter.name
            is_switch = getattr(parameter, "param_type_name", "") == "argument" and parameter.required
            assert is_switch or isinstance(parameter.show_default, str) or parameter.default is not None, parameter.name
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = run(name, "--help")
    assert code == 0 and "--json" in out and "--debug" in out
    assert out.count("[default: ") >= len(_commands()[name].params) - 2


def test_model_is_always_the_first_argument() -> None:
    for name, command in _commands().items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        if any(p.metavar == "MODEL" for p in arguments):
            assert arguments[0].metavar == "MODEL", name


def test_common_options_are_the_same_everywhere() -> None:
    common = options.keys(shared.Common)
    for name, command in _commands().items():
        for parameter in command.params:
            if parameter.name in ("device", "threads", "backend", "json", "debug"):
                assert parameter.opts == [common[parameter.name].flag], (name, parameter.name)


def test_version_and_no_arguments(run: Run) -> None:
    assert run("--version") == (0, f"gptfast {gptfast.__version__}\n", "")
    assert "Usage: gptfast" in "".join(run()[1:])


# -------------------------------------------------------------------------------------------------------------------- exit codes


def test_usage_errors_are_one_line(run: Run) -> None:
    for arguments, message in (
        (["frain"], "'frain'"), (["score"], "MODEL"), (["generate", "m", "--top-q", "1"], "--top-q"), (["prepare", "x"], "--out"),
        (["demo", "--minutes", "long"], "--minutes"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.startswith("gptfast: error: ") and err.count("\n") == 1 and message in err, err


@pytest.fixture
def broken_doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def set_error(error: BaseException) -> None:
        def findings() -> None:
            raise error

        monkeypatch.setattr(doctor, "findings", findings)

    return set_error


def test_a_defect_is_one_line_and_a_traceback_in_a_file(
    run: Run, broken_doctor: Callable[[BaseException], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken_doctor(KeyError("oh\nno"))
    code, out, err = run("doctor")
    (file,) = tmp_path.iterdir()
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("gptfast: internal error: KeyError: ") and str(file) in err and "--debug" in err
    assert "Traceback" in file.read_text() and "KeyError" in file.read_text()
    code, _, err = run("doctor", "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("gptfast: internal error: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (gptfast.Error("bad\n thing"), 2, "gptfast: error: bad thing\n"),
        (gptfast.LoadError("no file"), 2, "gptfast: error: no file\n"),
        (OSError(28, "No space left on device"), 2, "gptfast: error: No space left on device\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "gptfast: error: /x: Permission denied\n"),
    ],
)
def test_what_the_user_can_mend_is_exit_code_2(
    run: Run, broken_doctor: Callable[[BaseException], None], error: Exception, code: int, line: str
) -> None:
    broken_doctor(error)
    assert run("doctor") == (code, "", line)


def test_ctrl_c_and_sigterm_keep_their_codes(run: Run, broken_doctor: Callable[[BaseException], None]) -> None:
    broken_doctor(KeyboardInterrupt())
    code, out, err = run("doctor")
    assert code == 130 and "Traceback" not in err and out == ""
    broken_doctor(SystemExit(75))
    with pytest.raises(SystemExit) as stopped:
        run("doctor")
    assert stopped.value.code == 75


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from gptfast import cli; sys.exit(cli.main(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert "Traceback" not in done.stderr and "error" not in done.stderr, done.stderr


def test_warnings_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def findings() -> list[Any]:
        warnings.warn("a checkpoint\nis skipped", stacklevel=1)
        return []

    monkeypatch.setattr(doctor, "findings", findings)
    assert run("doctor", "--json") == (0, '{"findings": []}\n', "gptfast: warning: a checkpoint is skipped\n")


@pytest.mark.parametrize("command", [["-m", "gptfast"], ["-c", "import sys; sys.argv[0] = '/x/bin/gptfast'; import gptfast"]])
def test_a_wrong_environment_is_one_line_too(command: list[str]) -> None:
    environment = {**os.environ, "GPTFAST_BACKEND": "cup"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("gptfast: error: unknown backend 'cup'") and done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- generate, score, evaluate


def test_generate_streams_only_the_answer(run: Run, model: Path) -> None:
    code, out, err = run("generate", model, "the cat", "--max-tokens", "6", "--seed", "5", "--device", "cpu")
    assert code == 0 and "seed 5" in err and "engine: " in err and "tokens in" in err
    code, text, _ = run("generate", model, "the cat", "--max-tokens", "6", "--seed", "5", "--json")
    result = json.loads(text)
    (answer,) = result["completions"]
    assert out == answer["text"] + "\n" and len(answer["token_ids"]) <= 6 and text.count("\n") == 1
    assert result["seed"] == 5 and result["prompt"] == "the cat" and all(value <= 0 for value in answer["logprobs"])


def test_generate_prints_a_fresh_seed_that_repeats_the_answer(run: Run, model: Path) -> None:
    seeds, first = [], ""
    for _ in range(2):
        _, first, err = run("generate", model, "the", "--max-tokens", "8")
        seeds.append(next(line.split()[1] for line in err.splitlines() if line.startswith("seed ")))
    assert seeds[0] != seeds[1]
    assert run("generate", model, "the", "--max-tokens", "8", "--seed", seeds[1])[1] == first


def test_generate_reads_standard_input(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _standard_input(monkeypatch, "die Straße".encode())
    result = json.loads(run("generate", model, "-", "--json", "--max-tokens", "2")[1])
    assert result["prompt"] == "die Straße"
    _standard_input(monkeypatch, b"\xff")
    assert run("generate", model, "-")[::2] == (2, "gptfast: error: standard input is not UTF-8 (byte 0)\n")


def test_generate_without_prompt_and_several_answers(run: Run, model: Path) -> None:
    code, out, _ = run("generate", model, "--max-tokens", "3", "--n", "2", "--seed", "1")
    assert code == 0 and out.startswith("--- 0\n") and "\n--- 1\n" in out


def test_generate_options_reach_the_sampler(run: Run, model: Path) -> None:
    arguments = ("generate", model, "the", "--json", "--max-tokens", "4", "--temperature", "0", "--logprobs", "2")
    greedy = json.loads(run(*arguments)[1])["completions"][0]
    best = greedy["token_ids"][0]
    assert len(greedy["top_logprobs"][0]) == 2
    banned = json.loads(run(*arguments, "--banned-tokens", best)[1])["completions"][0]
    assert best not in banned["token_ids"]
    forced = json.loads(run(*arguments, "--logit-bias", "7=1e6", "--logit-bias", "8=1")[1])["completions"][0]
    assert forced["token_ids"] == [7] * 4


def test_a_model_that_gives_nan_is_an_error(run: Run, model: Path, tmp_path: Path) -> None:
    broken = gptfast.GPT2LMHeadModel.from_pretrained(model)
    with torch.no_grad():
        broken.transformer.wpe.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path)
    gptfast.GPT2Tokenizer.from_pretrained(model).save_pretrained(tmp_path)
    code, _, err = run("generate", tmp_path, "the", "--max-tokens", "3")
    assert code == 2 and "NaN" in err.splitlines()[-1] and err.splitlines()[-1].startswith("gptfast: error: ")


def test_score_is_a_chain_that_sums(run: Run, model: Path, tmp_path: Path) -> None:
    result = json.loads(run("score", model, "the cat über", "--json")[1])
    assert "".join(result["tokens"]).startswith("the cat") and result["bytes"] == 13
    assert result["total"] == pytest.approx(sum(result["logprobs"]), abs=1e-4)
    assert result["bits_per_byte"] == pytest.approx(-result["total"] / math.log(2) / 13)
    code, out, _ = run("score", model, "the cat über")
    lines = out.splitlines()
    assert code == 0 and len(lines) == len(result["tokens"]) + 3
    assert f"{result['total']:.4f}" in lines[-2] and f"bits per byte {result['bits_per_byte']:.4f}" in lines[-1]
    (tmp_path / "t.txt").write_text("the cat über")
    assert json.loads(run("score", model, "--file", tmp_path / "t.txt", "--json")[1]) == result
    assert json.loads(run("score", model, "the cat über", "--no-bos", "--json")[1])["logprobs"][0] is None
    for arguments in ((), ("text", "--file", "f")):
        code, _, err = run("score", model, *arguments)
        assert code == 2 and "either TEXT" in err


def test_evaluate_is_score_over_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    text = "the cat sat on the mat. " * 8
    (tmp_path / "t.txt").write_text(text)
    found = json.loads(run("evaluate", model, "--data", tmp_path / "t.txt", "--json", "--stride", "8")[1])
    scored = json.loads(run("score", model, text, "--json", "--stride", "8")[1])
    assert found["bits_per_byte"] == pytest.approx(scored["bits_per_byte"]) and found["bytes"] == len(text)
    assert found["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-5)
    code, out, _ = run("evaluate", model, "--data", tmp_path / "t.txt")
    assert code == 0 and "perplexity" in out and "bits per byte" in out


# ------------------------------------------------------------------------------------------------------------- train and convert

SMALL = ("--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--n-positions", "16", "--batch", "2", "--eval-every", "0")


def test_train_resume_and_use(run: Run, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "c.yaml").write_text("steps: 7\nlr: 1e-2\nwarmup: 2\nsave_every: 2\n")
    arguments = ("train", "--data", shards, "--out", out, "--config", tmp_path / "c.yaml", *SMALL)
    code, text, err = run(*arguments, "--steps", "4", "--json")
    result = json.loads(text)
    assert code == 0 and result["step"] == 4 and "backends: " in err, "the command line is stronger than the file"
    assert run(*arguments)[0] == 2 and "--resume" in run(*arguments)[2]
    printed = run("train", "--resume", "--out", out, "--print-config")[1]
    assert "lr: 0.01" in printed and "steps: 4" in printed and "n_embd: 16" in printed, "recorded with the run"
    result = json.loads(run("train", "--resume", "--out", out, "--steps", "6", "--json")[1])
    assert result["step"] == 6
    assert json.loads(run("generate", out, "the", "--max-tokens", "2", "--json")[1])["completions"]
    assert run("evaluate", out, "--data", shards)[0] == 0


def test_printed_config_is_what_config_reads(run: Run, tmp_path: Path) -> None:
    _, printed, _ = run("train", "--print-config", *SMALL, "--lr", "3e-5", "--init", "none")
    (tmp_path / "c.yaml").write_text(printed)
    assert run("train", "--print-config", "--config", tmp_path / "c.yaml")[1] == printed
    assert json.loads(run("train", "--print-config", "--json", "--lr", "3e-5")[1])["lr"] == 3e-5


def test_a_new_models_options_do_not_go_with_init(run: Run) -> None:
    code, _, err = run("train", "--init", "gpt2", "--n-layer", "3", "--data", "d", "--out", "o")
    assert code == 2 and err == "gptfast: error: --n-layer describes a new model, but --init gpt2 brings its own\n"


def test_convert_reads_an_old_pickle(run: Run, model: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    state = gptfast.GPT2LMHeadModel.from_pretrained(model).state_dict()
    torch.save(state, old / "pytorch_model.bin")
    for name in ("config.json", "vocab.json", "merges.txt"):
        (old / name).write_bytes((model / name).read_bytes())
    code, _, err = run("score", old, "the")
    assert code == 2 and "gptfast convert" in err
    assert run("convert", old, "--to", "hf", "--out", new)[0] == 0
    assert run("score", new, "the cat")[1] == run("score", model, "the cat")[1]
    assert run("convert", old, "--out", new)[0] == 2, "a folder that is not empty is not written into"
    assert "allowed: hf" in run("convert", old, "--to", "gguf", "--out", tmp_path / "x")[2]


# ------------------------------------------------------------------------------------------------------------------ this machine


def test_backends_shows_reasons_and_the_choice(run: Run) -> None:
    rows = json.loads(run("backends", "--json")[1])["ops"]
    names = {row["op"] for row in rows}
    assert "layer_norm" in names and all(row["eager"] is None for row in rows)
    _, out, err = run("backends")
    assert out.count("-> ") == len(rows) and out.split()[:5] == ["op", "eager", "cpp", "cuda", "triton"] and "\x1b" not in out
    forced = json.loads(run("backends", "--backend", "layer_norm=eager", "--json")[1])["ops"]
    assert next(row for row in forced if row["op"] == "layer_norm")["choice"] == "eager"
    assert "threads" in err


def test_backends_proof(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfast import proof

    monkeypatch.setattr(proof, "FILE", tmp_path / "proof.json")
    code, _, err = run("backends", "--proof")
    assert code == 2 and "proof.json does not exist" in err
    proof.write([proof.record("layer_norm", "cuda", "cpu shim"), proof.record("layer_norm", "cuda", "sm_90a", False)], proof.FILE)
    code, out, _ = run("backends", "--proof")
    line = next(line for line in out.splitlines() if line.startswith("layer_norm "))
    assert code == 0 and "cpu shim" in line and "stale" not in line
    proof.FILE.write_text(proof.FILE.read_text().replace(proof.source_hash("layer_norm", "cuda") or "?", "0"))
    assert "stale" in run("backends", "--proof")[1]


def test_doctor_lists_everything(run: Run) -> None:
    found = json.loads(run("doctor", "--json")[1])["findings"]
    assert [f["group"] for f in found if f["name"] in ("torch", "GPTFAST_BACKEND", "gptfast._C", "plot", "nvcc", "platform")]
    assert {f["group"] for f in found} == {"versions", "hardware", "build tools", "extensions", "extras", "environment"}
    code, out, _ = run("doctor")
    assert code == 0 and torch.__version__ in out and "Linux x86-64" in out


def test_doctor_works_without_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import statement then finds is an ImportError
    code, out, _ = run("doctor")
    assert code == 0 and "cannot be imported (ModuleNotFoundError" in out and "pip install 'torch>=2.11'" in out
    assert doctor.build_command() in out


def test_threads_are_put_back(run: Run, model: Path) -> None:
    before = torch.get_num_threads()
    _, _, err = run("score", model, "the", "--threads", "1")
    assert "1 threads" in err and torch.get_num_threads() == before


def test_demo_hands_its_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import gptfast.demo

    def demo(**options: Any) -> dict[str, Any]:
        print("progress on standard output")
        return options

    monkeypatch.setattr(gptfast.demo, "run", demo)
    code, out, err = run("demo", "--minutes", "0.5", "--seed", "7", "--json")
    assert code == 0 and json.loads(out) == {"minutes": 0.5, "out": "runs/demo", "seed": 7} and "progress on" in err
    assert run("demo")[1] == "progress on standard output\n"
