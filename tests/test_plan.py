"""estimate and plot: the memory that is said is the memory that is held, and pictures of what a log holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptfast import Error, GPT2Config, GPT2LMHeadModel, TrainConfig, backend, cli, estimate, plot, testing
from gptfast.cache import KVCache
from gptfast.data import TokenData
from gptfast.training import Trainer

CONFIG = GPT2Config(vocab_size=512, real_vocab_size=500, n_positions=96, n_embd=64, n_layer=3, n_head=2)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def nbytes(tensors: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_what_is_held(dtype: str) -> None:
    config = TrainConfig(batch=2, dtype=dtype, device="cpu")
    model = GPT2LMHeadModel(CONFIG)
    trainer = Trainer(model, torch.randint(500, (400,)), None, config, quiet=True)
    said = estimate.memory(CONFIG, config)
    assert estimate.parameters(CONFIG) == sum(p.numel() for p in model.parameters())
    assert said["weights"] == nbytes(model.parameters()) == said["gradients"]
    states = [state for p in model.parameters() for name, state in trainer.step.optimizer.state[p].items() if name != "step"]
    assert said["optimizer"] == nbytes(states)
    assert said["copies"] == nbytes(trainer.step.copies or [])
    cache = KVCache(CONFIG, 1, 96, torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert said["kv_cache"] == nbytes([*cache.keys, *cache.values])
    parts = ("weights", "gradients", "optimizer", "copies", "activations", "head")
    assert said["total"] == sum(said[part] for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_the_blocks_keep(dtype: torch.dtype) -> None:
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    model = GPT2LMHeadModel(CONFIG).to(dtype)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned and tensor.dtype != torch.int64:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    blocks = model.transformer.h
    x = torch.randn(2, 96, 64).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        from gptfast.forward import Pass

        now, stream, out = Pass(None, x, torch.arange(96).expand(2, 96)), x, None
        for block in blocks:
            stream, out = block(stream, out, now)
    assert nbytes(kept.values()) == estimate.kept_bytes(CONFIG, 2 * 96, dtype.itemsize)


def test_speed_is_near_what_a_run_reaches() -> None:
    """Loosely: other programs run beside the tests. bench/estimate.py compares on a quiet machine."""
    config = TrainConfig(batch=4, context=64, steps=60, warmup=1, device="cpu", log_every=60)
    ids = torch.randint(500, (4000,))
    said = estimate.calibrate(CONFIG, config, TokenData.from_ids(ids), seconds=0.5)
    reached = Trainer(GPT2LMHeadModel(CONFIG), ids, None, config, quiet=True).fit()["tokens_per_s"]
    assert 1 / 3 < said["tokens_per_s"] / reached < 3
    assert said["seconds_per_step"] * said["tokens_per_s"] == pytest.approx(4 * 64)


def test_a_step_from_steps_of_one_and_two_microbatches() -> None:
    calls: list[tuple[int, int]] = []

    def timed(count: int, size: int) -> float:
        calls.append((count, size))
        return 3.0 + 0.5 * count * size  # an update of 3 s, half a second a sequence

    assert estimate._from_two(timed, 2, None, 16, 0.0) == pytest.approx(3.0 + 8.0)
    assert estimate._from_two(timed, 1, 3.5, 16, 0.0) == pytest.approx(3.0 + 8.0)
    assert calls == [(1, 2), (1, 2), (2, 2), (2, 1)]


def test_estimate_of_options_and_of_a_model(run: Run, tmp_path: Path) -> None:
    shape = ("--n-layer", 3, "--n-embd", 64, "--n-head", 2, "--n-positions", 96, "--vocab-size", 512)[:-2]
    training = ("--batch", 2, "--steps", 100, "--device", "cpu")
    code, out, _ = run("estimate", *shape, *training, "--json")
    found = json.loads(out)
    assert code == 0 and found["tokens"] == 100 * 2 * 96 and found["eta_s"] == pytest.approx(100 * found["seconds_per_step"])
    GPT2LMHeadModel(CONFIG).save_pretrained(tmp_path / "model")
    code, out, _ = run("estimate", tmp_path / "model", *training)
    assert code == 0 and "optimizer (fp32)" in out and "tokens/s" in out and "100 steps: 19,200 tokens" in out
    for wrong, word in (((tmp_path / "model", "--n-layer", 2), "brings its own"), (("--data", tmp_path), "dataset.json")):
        code, out, err = run("estimate", *wrong)
        assert code == 2 and word in err and out == ""
    with pytest.raises(Error, match="context is 100; the model has 96"):
        estimate.estimate(CONFIG, TrainConfig(context=100, device="cpu"))


def log(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {"version": 1, "event": "step", "step": n, "tokens": 1000 * n, "loss": 5 - n / 10, "tokens_per_s": 900 + n}
        for n in range(1, count + 1)
    ]
    evaluations = [{"version": 1, "event": "eval", "step": n, "val_loss": 5.5 - n / 10} for n in (20, 40)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, [*steps, *evaluations])))
    return folder


def test_plot_in_the_terminal_and_as_a_picture(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = log(tmp_path / "a/run"), log(tmp_path / "b/run")
    assert plot.read(first).held_out == [(20_000, 3.5), (40_000, 1.5)]
    code, out, _ = run("plot", first)
    assert code == 0 and "training loss" in out and "tokens/s" in out and out.count("0.0 M tokens") == 2
    code, out, _ = run("plot", first, second, "--json")
    assert code == 0 and set(json.loads(out)["runs"]) == {str(first), str(second)}, "two folders of one name stay apart"
    code, _, err = run("plot", first, tmp_path / "gone")
    assert code == 2 and "gone: no log.jsonl" in err
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    assert run("plot", first, second, "--out", tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for bad, word in ((tmp_path, "is a folder"), (tmp_path / "x.abc", "abc"), (tmp_path / "no/x.png", "No such file")):
        code, _, err = run("plot", first, "--out", bad)
        assert code == 2 and word in err and "Traceback" not in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("plot", first, "--out", tmp_path / "y.png")
    assert code == 2 and "pip install 'gptfast-torch[plot]'" in err and not (tmp_path / "y.png").exists()
