"""Checkpoints that survive a kill, a full disk and a power cut at any moment; safetensors and JSON only, never pickle.

RUN/checkpoints/step_000000250/ holds files and manifest.json with the size and SHA-256 of each. A save writes into
step_000000250.tmp-<pid>/, fsyncs every file, then the manifest, then the folder, renames the folder to its final name and fsyncs
its parent; only then are older ones deleted. So a folder with a final name is complete, and a reader that checks the manifest
notices damage of any other origin. The newest checkpoint that verifies is loaded; others are skipped with a warning, not repaired.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast.errors import LoadError

VERSION = 1
_NAME = re.compile(r"step_(\d{9})")
_CHUNK = 1 << 24  # bytes written and hashed at once
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}


# ------------------------------------------------------------------------------------------------------------------------- files


def sync_folder(folder: Path) -> None:
    """fsync of a folder: the names in it are on disk afterwards."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(file: BinaryIO, data: Any, digest: Any) -> None:
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _CHUNK):
        piece = view[start : start + _CHUNK]
        file.write(piece)
        digest.update(piece)


def write_json(path: Path, value: Any) -> str:
    """Writes and fsyncs a JSON file; returns the SHA-256 of its bytes in hex."""
    data = (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        _write(file, data, digest)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] | None = None) -> str:
    """Writes and fsyncs a safetensors file (8 bytes header length, JSON header, data); returns its SHA-256 in hex.

    One tensor at a time is copied to the host, so that a save needs no second copy of the model. `whole` puts a sharded tensor
    together, when it is its turn.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        _write(file, len(text).to_bytes(8, "little") + text, digest)
        for tensor in tensors.values():
            if tensor.numel():
                full = tensor.detach() if whole is None else whole(tensor.detach())
                flat = full.to("cpu").contiguous().reshape(-1)
                _write(file, flat.view(torch.uint8).numpy(), digest)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises gptfast.LoadError where it is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path}: not a safetensors file ({error})") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises gptfast.LoadError where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not JSON ({error})") from error


# ----------------------------------------------------------------------------------------------------------------- save and load


class Folder:
    """What a save writes into: each method adds a file and remembers its hash for the manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole: Callable[[Tensor], Tensor] | None = None
        self.files: dict[str, dict[str, Any]] = {}

    def _add(self, name: str, sha256: str) -> None:
        self.files[name] = {"size": (self.path / name).stat().st_size, "sha256": sha256}

    def json(self, name: str, value: Any) -> None:
        """Adds a JSON file."""
        self._add(name, write_json(self.path / name, value))

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds a safetensors file."""
        self._add(name, write_tensors(self.path / name, tensors, self.whole))


def save(run: Path, step: int, fill: Callable[[Folder], None], keep: int = 2) -> Path:
    """Writes run/checkpoints/step_<step> through `fill` by the protocol above, then deletes all but the newest `keep`.

    Returns the checkpoint's folder. Raises OSError where the disk is full or gone; what was there before is then untouched, and
    the half-written folder is removed. A checkpoint of this step that verifies is left as it is.
    """
    parent = run / "checkpoints"
    if not parent.exists():
        parent.mkdir(parents=True)
        sync_folder(run)
        sync_folder(run.absolute().parent)
    final = parent / f"step_{step:09d}"
    if final.exists():
        if verify(final) is None:
            return final
        shutil.rmtree(final)
    remove_stale(parent, "step_*")
    temporary = parent / f"{final.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        folder = Folder(temporary)
        fill(folder)
        write_json(temporary / "manifest.json", {"version": VERSION, "step": step, "files": folder.files})
        sync_folder(temporary)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)
    for _, old in list(steps(run))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def remove_stale(parent: Path, name: str) -> None:
    """Removes folders <name>.tmp-<pid> in `parent` (name: a glob pattern) that processes which no longer run left behind."""
    for path in parent.glob(f"{name}.tmp-*"):
        owner = path.name.rpartition("-")[2]
        if not owner.isdigit() or int(owner) == os.getpid() or not Path("/proc", owner).exists():
            shutil.rmtree(path, ignore_errors=True)


def steps(run: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every published checkpoint of a run, newest first, unverified."""
    found = [(int(match[1]), path) for path in (run / "checkpoints").glob("step_*") if (match := _NAME.fullmatch(path.name))]
    yield from sorted(found, reverse=True)


def verify(folder: Path) -> str | None:
    """None if every file of the manifest is there with its size and hash, else the reason."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["version"] != VERSION:
            return f"version {manifest['version']}, this gptfast reads {VERSION}"
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                return f"the manifest names {name!r}, which is outside the folder"
            path = folder / name
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {expected['size']}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} does not have the manifest's SHA-256"
    except LoadError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is malformed ({error!r})"
    return None


def newest(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that verifies, or None. Each newer one that does not is named in a warning."""
    for step, folder in steps(run):
        reason = verify(folder)
        if reason is None:
            return step, folder
        warnings.warn(f"checkpoint {folder} is skipped: {reason}", stacklevel=2)
    return None


# ----------------------------------------------------------------------------------------------------------------- random states


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of Python's, NumPy's and torch's generators: a JSON value and named tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    numpy = {"name": name, "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)}
    return {"python": [version, list(words), gauss], "numpy": numpy}, tensors


def set_random_state(values: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts back what random_state() returned."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = values["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda."):
            with contextlib.suppress(RuntimeError, IndexError):  # fewer GPUs than before: their noise is not what ran there
                torch.cuda.set_rng_state(state, int(name.partition(".")[2]))
