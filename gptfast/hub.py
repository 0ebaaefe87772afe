"""Hugging Face folders in and out, and downloads from the hub.

A model is a folder with config.json and safetensors, one file or several with an index. Nothing in it is executed: no pickle, no
code that a config names. Every file is checked against config.json before it becomes a model. Only the files in MODEL_FILES and
TOKENIZER_FILES are ever requested from the hub; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they mean everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptfast.config import GPT2Config
from gptfast.errors import Error, LoadError

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_HEADS = ("lm_head.", "score.")


# ------------------------------------------------------------------------------------------------------------------------ folders


def resolve(path: str | Path, revision: str | None = None, files: Sequence[str] = MODEL_FILES + TOKENIZER_FILES) -> Path:
    """The local folder of a model: `path` itself, or what the hub has under that id, downloaded into its cache if it is not there.

    Raises gptfast.LoadError in one line where it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise LoadError(f"{path} is a file; the folder that holds config.json is needed")
    if isinstance(path, Path) or not _HUB_ID.fullmatch(path):
        raise LoadError(f"{path} is no folder, and no name on the hub")
    return _download(path, revision, files)


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors, utils

    class Quiet(utils.tqdm):  # type: ignore
        """A progress bar that is silent where stderr is no terminal."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": not sys.stderr.isatty()})  # type: ignore

    what = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"], tqdm_class=Quiet
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise LoadError(
            f"{what} is no folder here, is not in the cache, and the hub cannot be reached; "
            "offline, a folder written by save_pretrained works, or an id that was downloaded before"
        ) from None
    except errors.GatedRepoError:
        raise LoadError(f"{what} is gated on the hub: accept its terms there and log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise LoadError(f"{what} is no folder here and no model on the hub (a private one needs `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise LoadError(f"{what} is not on the hub") from None
    except Exception as error:  # proxies, certificates, full disks: whatever a network and a cache can raise
        reason = " ".join(str(error).split())[:200]
        raise LoadError(f"{what} cannot be downloaded: {type(error).__name__}: {reason}") from error
    return Path(found)


def read_json(path: Path, limit: int = 1 << 26) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; names may stand in it once. Raises gptfast.LoadError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
        return result

    try:
        if path.stat().st_size > limit:
            raise LoadError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise LoadError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds a {type(value).__name__}; an object is needed")
    return value


def load_config(folder: Path) -> GPT2Config:
    """The GPT2Config in a folder's config.json. Raises gptfast.LoadError that names the file and the key."""
    values = read_json(folder / "config.json")
    try:
        return GPT2Config.from_dict(values)
    except Error as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from None


def load_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json as it stands, or {} where the folder has none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


# ------------------------------------------------------------------------------------------------------------------------ reading


def load_state(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    optional: Sequence[str] = (),
    foreign: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The tensors named in `shapes` (prefix `transformer.`), checked against it, in one dtype (None: that of the token embedding).

    Names with and without the prefix are read, the causal masks in old files are left out. `optional` may be missing, `foreign`
    may be there. A tied head may be stored again if it is equal. Raises gptfast.LoadError that names the tensor and the file.
    """
    wanted = dtype_of(dtype)
    stored: dict[str, str] = {}  # our name -> file that holds it
    state: dict[str, Tensor] = {}
    head: Tensor | None = None
    for file in _weight_files(folder):
        for key, tensor in _read(folder / file):
            name = _canonical(key)
            if name is None or (name in foreign and name not in shapes):
                continue
            if name in stored:
                raise LoadError(f"{folder}: {name} is stored twice, in {stored[name]} and {file}")
            stored[name] = file
            if name == "lm_head.weight" and name not in shapes:
                head = tensor
                continue
            _check_tensor(folder / file, name, tensor, shapes)
            state[name] = tensor
    missing = [name for name in shapes if name not in state and name not in optional]
    if missing:
        raise LoadError(f"{folder}: {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
    table = state["transformer.wte.weight"]
    if head is not None and not torch.equal(head, table):
        raise LoadError(f"{folder}: lm_head.weight differs from wte.weight, but config.json ties them (tie_word_embeddings)")
    wanted = wanted or table.dtype
    return {name: tensor.to(device=device, dtype=wanted) for name, tensor in state.items()}


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name in DTYPES; None stays. Raises gptfast.Error for another."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise Error(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and dtype not in DTYPES.values():
        raise Error(f"dtype is {dtype}; allowed: {', '.join(map(str, DTYPES.values()))}")
    return dtype


def _weight_files(folder: Path) -> list[str]:
    """model.safetensors, or the shards that the index names: plain files of this folder only."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        old = " (it has pytorch_model.bin: `gptfast convert` reads it)" if any(folder.glob("pytorch_model*.bin")) else ""
        raise LoadError(f"{folder} has neither {WEIGHTS} nor {INDEX}{old}")
    entries = read_json(folder / INDEX).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(file, str) for file in entries.values()):
        raise LoadError(f"{folder / INDEX}: weight_map is not an object of tensor names and file names")
    files = sorted(set(entries.values()))
    # the hub's cache keeps a snapshot's files as links into the blobs folder beside snapshots/
    homes = [folder.resolve()] + [(folder.parent.parent / "blobs").resolve()] * (folder.parent.name == "snapshots")
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file) or (folder / file).resolve().parent not in homes:
            raise LoadError(f"{folder / INDEX} names {file!r}; only plain .safetensors files of its own folder are read")
        if not (folder / file).is_file():
            raise LoadError(f"{folder} has no {file}, which {INDEX} names")
    return files


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, Error):
            raise
        raise LoadError(f"{path} is not a whole safetensors file: {error}") from None


def _canonical(key: str) -> str | None:
    """Our name of a stored tensor; None for the causal masks that old checkpoints hold as buffers."""
    if key.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return key if key.startswith(("transformer.", *_HEADS)) else f"transformer.{key}"


def _check_tensor(path: Path, name: str, tensor: Tensor, shapes: Mapping[str, Sequence[int]]) -> None:
    if name not in shapes:
        raise LoadError(f"{path}: {name} belongs to no part of this model")
    if tuple(tensor.shape) != tuple(shapes[name]):
        raise LoadError(f"{path}: {name} has shape {tuple(tensor.shape)}, config.json needs {tuple(shapes[name])}")
    if tensor.dtype not in DTYPES.values():
        raise LoadError(f"{path}: {name} is {tensor.dtype}; allowed: {', '.join(DTYPES)}")


# ------------------------------------------------------------------------------------------------------------------------ writing


def save(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: GPT2Config,
    architecture: str = "GPT2LMHeadModel",
    generation_config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a model's folder. Every file appears whole, by rename; weights of an older model there disappear last.

    A tied head is stored once (as wte); rows that only pad the vocabulary are not stored. Raises gptfast.Error where the folder
    cannot be written.
    """
    limit = _bytes(max_shard_size)
    rows = config.real_vocabulary
    tables = {"transformer.wte.weight", "lm_head.weight"}
    tensors = {
        name: (tensor[:rows] if name in tables else tensor).detach().cpu().contiguous()
        for name, tensor in state.items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    dtype = str(tensors["transformer.wte.weight"].dtype).removeprefix("torch.")
    described = dataclasses.replace(config, vocab_size=rows, real_vocab_size=None).to_dict()
    described = {"architectures": [architecture], **described, "torch_dtype": dtype}
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    ending = {name: value for name, value in ends.items() if value is not None}
    shards = list(_shards(tensors, limit))
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with Writer(Path(folder)) as writer:
        for name, shard in zip(names, shards, strict=True):
            path = writer.path(name)
            path.touch()
            mode = path.stat().st_mode
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors makes files that only their owner may read
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            writer.json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        writer.json("config.json", described)
        writer.json("generation_config.json", dict(generation_config or ending))
    for old in Path(folder).iterdir():
        if _OURS.fullmatch(old.name) and old.name not in writer.names:
            old.unlink()


class Writer:
    """Files of one folder, written under temporary names and renamed together at the end, or removed where anything failed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def __enter__(self) -> Writer:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Error(f"{self.folder} cannot be made: {error.strerror}") from None
        return self

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        self.names.append(name)
        return self.folder / f".{name}.tmp-{os.getpid()}"

    def json(self, name: str, value: Any) -> None:
        """Writes an object as JSON."""
        self.path(name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        names, self.names = self.names, []
        temporary = [self.path(name) for name in names]
        if error is None:
            for source, name in zip(temporary, names, strict=True):
                os.replace(source, self.folder / name)
            return
        for source in temporary:
            source.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise Error(f"{self.folder} cannot be written: {error}") from None


def _bytes(size: int | str) -> int:
    """'5GB' -> 5,000,000,000; KB, MB, GB, TB are powers of 1000, KiB and so on of 1024."""
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"([1-9]\d*)\s*([KMGT]?)(i?)B", str(size))
    if match is None:
        raise Error(f"max_shard_size is {size!r}; a number of bytes or a size such as 5GB is needed")
    base: int = 1024 if match[3] else 1000
    return int(int(match[1]) * base ** " KMGT".index(match[2] or " "))


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def convert_pickle(source: str | Path, folder: str | Path) -> None:
    """Turns a folder with pytorch_model.bin (one file or shards) into one with safetensors: the only place that opens a pickle.

    torch.load(weights_only=True) builds tensors and containers and nothing else. Tokenizer files are copied. Raises
    gptfast.LoadError where the source is no such folder.
    """
    src = Path(source)
    config = load_config(src)
    files = sorted(src.glob("pytorch_model*.bin"))
    if not files:
        raise LoadError(f"{src} has no pytorch_model.bin")
    state: dict[str, Tensor] = {}
    for path in files:
        for key, tensor in _unpickle(path):
            name = _canonical(key)
            if name is not None and name in state:
                raise LoadError(f"{path}: {name} is stored twice")
            if name is not None:
                state[name] = tensor
    if "transformer.wte.weight" not in state:
        raise LoadError(f"{src}: transformer.wte.weight is missing")
    architecture = "GPT2ForSequenceClassification" if "score.weight" in state else "GPT2LMHeadModel"
    save(folder, state, config, architecture, load_generation_config(src))
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, Path(folder) / name)


def _unpickle(path: Path) -> Iterable[tuple[str, Tensor]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors have no common type
        reason = str(error).split("\n")[0]
        raise LoadError(f"{path} holds more than tensors, or is damaged: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in loaded.items()):
        raise LoadError(f"{path} holds no dictionary of tensors")
    return loaded.items()
