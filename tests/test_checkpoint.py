"""Checkpoints: what is published is complete, damage is noticed, and what was there before survives a failed save."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptfast import LoadError, checkpoint


def fill(folder: checkpoint.Folder) -> None:
    folder.tensors("a.safetensors", {"x": torch.arange(1000.0), "n": torch.tensor(3)})
    folder.json("state.json", {"value": 1})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_saves_are_published_and_old_ones_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        path = checkpoint.save(tmp_path, step, fill)
        assert checkpoint.verify(path) is None
    assert names(tmp_path) == ["step_000000002", "step_000000030"]
    assert checkpoint.newest(tmp_path) == (30, tmp_path / "checkpoints/step_000000030")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 1 and manifest["files"].keys() == {"a.safetensors", "state.json"}


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_files_are_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.randn(7, 5) * 3).to(dtype), "strided": torch.randn(6, 4).to(dtype).t(),
        "scalar": torch.ones((), dtype=dtype), "empty": torch.zeros(0, 3, dtype=dtype),
    }
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    for read in (load_file(tmp_path / "t.safetensors"), checkpoint.read_tensors(tmp_path / "t.safetensors")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("harm", ["flip", "shorten", "remove", "no manifest", "cut manifest", "version", "outside", "list"])
def test_damage_is_skipped_with_a_warning(tmp_path: Path, harm: str) -> None:
    checkpoint.save(tmp_path, 1, fill)
    bad = checkpoint.save(tmp_path, 2, fill)
    data, manifest = bad / "a.safetensors", bad / "manifest.json"
    if harm == "flip":
        data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    elif harm == "shorten":
        data.write_bytes(data.read_bytes()[:-1])
    elif harm == "remove":
        data.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "cut manifest":
        manifest.write_bytes(manifest.read_bytes()[:20])
    elif harm == "list":
        manifest.write_text("[1]")
    else:
        values = json.loads(manifest.read_text())
        values["version" if harm == "version" else "files"] = 9 if harm == "version" else {"../x": {"size": 1, "sha256": ""}}
        manifest.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="step_000000002 is skipped"):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found[0] == 1
    checkpoint.save(tmp_path, 2, fill)  # a damaged one of the same step is replaced
    assert checkpoint.newest(tmp_path) == (2, bad)


def test_a_half_written_folder_is_not_seen_and_is_removed_by_the_next_save(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, fill)
    stale = tmp_path / "checkpoints/step_000000002.tmp-999999999"
    stale.mkdir()
    (stale / "manifest.json").write_text("{}")
    assert checkpoint.newest(tmp_path) == (1, tmp_path / "checkpoints/step_000000001")
    checkpoint.save(tmp_path, 3, fill)
    assert names(tmp_path) == ["step_000000001", "step_000000003"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, fill)

    def fail(folder: checkpoint.Folder) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, fail)
    assert names(tmp_path) == ["step_000000001"] and checkpoint.newest(tmp_path) is not None


def test_random_states_come_back() -> None:
    state, tensors = checkpoint.random_state()
    state = json.loads(json.dumps(state))
    first = random.random(), float(np.random.rand()), torch.rand(3).tolist(), random.gauss(0, 1), float(np.random.randn())
    checkpoint.set_random_state(state, tensors)
    assert first == (random.random(), float(np.random.rand()), torch.rand(3).tolist(), random.gauss(0, 1), float(np.random.randn()))


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7fgarbage")
    with pytest.raises(LoadError, match="not a safetensors file"):
        checkpoint.read_tensors(tmp_path / "x")
    with pytest.raises(LoadError, match="not JSON"):
        checkpoint.read_json(tmp_path / "x")
    with pytest.raises(LoadError, match="No such file"):
        checkpoint.read_json(tmp_path / "y")
