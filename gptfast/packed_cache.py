"""Where packed folders are kept, so that a folder is packed once and mapped from then on.

A file is found by what its folder holds: place, names, sizes and times of its files, and the version of the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from gptfast import hub, packed
from gptfast.errors import Error, LoadError
from gptfast.packed import DTYPES, Packed

CACHE_FROM = 64 << 20  # bytes of weights a token: less is packed faster than a file is looked after


def cache_folder() -> Path:
    """Where packed folders are kept: gptfast in XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptfast"


def cached(model: str | Path, dtype: str) -> Packed:
    """The packed form of a folder or hub id: packed once into a file of cache_folder() and mapped from there afterwards.

    Models below CACHE_FROM bytes, and all where the folder cannot be written, are packed in memory. A packed file is opened; its
    dtype must be `dtype`. Raises gptfast.LoadError for what cannot be read.
    """
    if packed.is_packed(model):
        return packed.open(model, dtype=dtype)
    if dtype not in DTYPES:
        raise Error(f"dtype is {dtype!r}; allowed in a packed file: {', '.join(DTYPES)}")
    folder = hub.resolve(model)
    if packed.token_bytes(hub.load_config(folder), dtype) < CACHE_FROM:
        return packed.pack(folder, dtype)
    source = packed.fingerprint(folder)
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    stem = f"{folder.resolve().name}-{place}-{dtype}-"
    path = cache_folder() / f"{stem}{source[:16]}.gptfast"
    with contextlib.suppress(LoadError):  # not there, or not whole: packed anew
        return packed.open(path, source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent, stem)
        return packed.open(packed.write(folder, dtype, path), source)
    except LoadError:
        raise
    except (Error, OSError):
        return packed.pack(folder, dtype)


def _clean(home: Path, stem: str) -> None:
    """Removes what the same folder's older weights left, and what processes that no longer run left unfinished."""
    for path in home.iterdir():
        owner = path.name.rpartition("-")[2]
        unfinished = path.name.startswith(".") and ".tmp-" in path.name and owner.isdigit() and not Path("/proc", owner).exists()
        if unfinished or (path.name.startswith(stem) and path.suffix == ".gptfast"):
            path.unlink(missing_ok=True)
