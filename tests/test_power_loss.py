"""Power cuts, simulated: the file operations of saves are recorded, and whatever a disk may have kept of any prefix of them is
built.

The disk of this simulation promises what POSIX does and no more. What was written to a file is there after fsync of that file;
without one it is there, missing, torn or zeros. A name in a folder is there after fsync of that folder; without one each
creation, removal and rename may or may not have happened, whatever happened to the others. A rename is one change.

What has to hold at every point: a checkpoint whose save had returned is there and verifies unless a newer one does, and a
folder with a final name is complete, up to the moment where its removal begins.
"""

from __future__ import annotations

import builtins
import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gptfast import checkpoint

WAYS = ("kept", "dropped", "torn", "zeros")
SAVES, KEEP = (1, 2, 3), 2


class Op(NamedTuple):
    """mkdir, create, write, fsync (of a file or folder), rename, unlink, rmdir; "returned" is the end of a save."""

    kind: str
    path: str = ""
    data: bytes = b""
    target: str = ""
    step: int = 0


# ---------------------------------------------------------------------------------------------------------------------- recording


class Recorder:
    """Stands for `os`, `shutil`, `open` and Path.mkdir in gptfast/checkpoint.py: does what they do and writes it down."""

    def __init__(self, root: Path) -> None:
        self.root, self.ops, self.handles = root, list[Op](), dict[int, str]()

    def name(self, path: Any) -> str:
        return str(Path(path).absolute().relative_to(self.root.parent))

    def add(self, kind: str, path: Any, **more: Any) -> None:
        self.ops.append(Op(kind, self.name(path), **more))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def replace(source: Any, target: Any) -> None:
            os.replace(source, target)
            self.add("rename", source, target=self.name(target))

        def fsync(handle: int) -> None:
            os.fsync(handle)
            self.ops.append(Op("fsync", self.handles[handle]))

        def open_handle(path: Any, flags: int) -> int:
            handle = os.open(path, flags)
            self.handles[handle] = self.name(path)
            return handle

        def remove(path: Path, ignore_errors: bool = False) -> None:
            for folder, _, files in os.walk(path, topdown=False):
                for file in sorted(files):
                    self.add("unlink", Path(folder, file))
                self.add("rmdir", folder)
            shutil.rmtree(path, ignore_errors=ignore_errors)

        mkdir = Path.mkdir

        def make(path: Path, *arguments: Any, **options: Any) -> None:
            missing = [parent for parent in (path, *path.parents) if not parent.exists()]
            mkdir(path, *arguments, **options)
            for made in reversed(missing):
                self.add("mkdir", made)

        system = SimpleNamespace(**{name: getattr(os, name) for name in ("close", "getpid", "O_RDONLY")})
        system.replace, system.fsync, system.open = replace, fsync, open_handle
        patch.setattr(checkpoint, "os", system)
        patch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=remove))
        patch.setattr(checkpoint, "open", self.open_file, raising=False)
        patch.setattr(Path, "mkdir", make)

    def open_file(self, path: Any, mode: str = "r") -> Any:
        file = builtins.open(path, mode)  # noqa: SIM115 - closed by whom it is for
        if "w" not in mode:
            return file
        self.add("create", path)
        self.handles[file.fileno()] = self.name(path)
        return Recorded(file, self)


class Recorded:
    """A file whose writes are written down."""

    def __init__(self, file: Any, recorder: Recorder) -> None:
        self.file, self.recorder = file, recorder

    def write(self, data: Any) -> int:
        self.recorder.add("write", self.file.name, data=bytes(data))
        return int(self.file.write(data))

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fill(folder: checkpoint.Folder) -> None:
    folder.tensors("model.safetensors", {"a": torch.arange(40.0), "b": torch.ones(3, 3)})
    folder.tensors("optimizer.safetensors", {"a": torch.arange(80.0)})
    folder.json("state.json", {"value": list(range(9))})


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> list[Op]:
    """The operations of three saves into a new run, of which the last removes the oldest checkpoint."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    recorder = Recorder(run)
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        run.mkdir()
        for step in SAVES:
            checkpoint.save(run, step, fill, KEEP)
            recorder.ops.append(Op("returned", step=step))
    return recorder.ops


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all disks, so that equal ones are looked at once."""
    return tmp_path_factory.mktemp("power") / "disk"


# --------------------------------------------------------------------------------------------------------------------- simulation


class Inode:
    """A file (data, and what of it was written since its last fsync) or a folder (names on disk, and changes since its fsync)."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.safe, self.waiting = b"", list[bytes]()
        self.names, self.live, self.changes = dict[str, Inode](), dict[str, Inode](), list[Any]()

    def change(self, change: tuple[str, str, Inode | None]) -> None:
        self.changes.append(change)
        self.live = changed(self.live, [change])

    def sync(self) -> None:
        self.safe, self.waiting = self.safe + b"".join(self.waiting), []
        self.names, self.changes = dict(self.live), []

    def data(self, way: str) -> bytes:
        loose = b"".join(self.waiting)
        shapes = {"kept": loose, "dropped": b"", "torn": loose[: len(loose) // 2], "zeros": bytes(len(loose))}
        return self.safe + shapes[way]


def changed(names: dict[str, Inode], changes: list[Any]) -> dict[str, Inode]:
    """(name, "", inode): made; (name, "", None): removed; (name, new name, None): renamed, if it is there."""
    names = dict(names)
    for name, new, inode in changes:
        if inode is not None:
            names[name] = inode
        elif name in names:
            moved = names.pop(name)
            if new:
                names[new] = moved
    return names


class Disk:
    """The disk as it is while the operations run."""

    def __init__(self) -> None:
        self.root = Inode(True)
        self.returned = 0
        self.leaving = set[str]()  # checkpoints whose removal has begun

    def find(self, path: str) -> Inode:
        place = self.root
        for part in Path(path).parts:
            place = place.live[part]
        return place

    def do(self, op: Op) -> None:
        if op.kind == "returned":
            self.returned = op.step
            return
        parent, name = (self.find(str(Path(op.path).parent)) if op.path != "." else self.root), Path(op.path).name
        if op.kind in ("mkdir", "create"):
            parent.change((name, "", Inode(op.kind == "mkdir")))
        elif op.kind == "write":
            self.find(op.path).waiting.append(op.data)
        elif op.kind == "fsync":
            self.find(op.path).sync()
        elif op.kind == "rename":
            parent.change((name, Path(op.target).name, None))
        else:
            self.leaving.add(name if op.kind == "rmdir" else Path(op.path).parent.name)
            parent.change((name, "", None))

    def changes(self) -> list[tuple[Inode, Any]]:
        found, todo = [], [self.root]
        while todo:
            inode = todo.pop()
            found += [(inode, change) for change in inode.changes]
            todo += [child for child in {**inode.names, **inode.live}.values() if child.folder]
            gone = [child for _, _, child in inode.changes if child is not None and child not in inode.live.values()]
            todo += [child for child in gone if child.folder]
        return found

    def tree(self, way: str, kept: list[tuple[Inode, Any]]) -> dict[str, bytes | None]:
        """path -> contents, None for a folder: what is on the disk if these changes of names happened and writes went that way."""
        files: dict[str, bytes | None] = {}

        def walk(inode: Inode, path: str) -> None:
            happened = [change for owner, change in kept if owner is inode]
            for name, child in changed(inode.names, happened).items():
                below = f"{path}/{name}" if path else name
                files[below] = None if child.folder else child.data(way)
                if child.folder:
                    walk(child, below)

        walk(self.root, "")
        return files

    def crashes(self) -> Iterator[dict[str, bytes | None]]:
        """Every way for writes, with all changes of names, none, each alone, and all but each."""
        changes = self.changes()
        subsets = [changes, [], *([one] for one in changes), *([c for c in changes if c is not one] for one in changes)]
        for way, kept in itertools.product(WAYS, subsets):
            yield self.tree(way, kept)


def build(files: dict[str, bytes | None], root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in files.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


class Found(NamedTuple):
    """What a disk holds after a crash: the newest step that verifies (0: none), and why checkpoints do not verify."""

    step: int
    incomplete: dict[str, str]


@cache
def look(files: frozenset[tuple[str, bytes | None]], root: Path) -> Found:
    build(dict(sorted(files)), root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = checkpoint.newest(root / "run")
    reasons = {folder.name: checkpoint.verify(folder) for _, folder in checkpoint.steps(root / "run")}
    return Found(newest[0] if newest else 0, {name: reason for name, reason in reasons.items() if reason is not None})


def loss(ops: list[Op], root: Path) -> tuple[str | None, int]:
    """(what is lost at the first point where something is, number of different disks that were looked at)."""
    disk, seen = Disk(), set[Any]()
    for number, op in enumerate(ops):
        disk.do(op)
        for files in {frozenset(tree.items()) for tree in disk.crashes()}:
            seen.add(files)
            found, place = look(files, root), f"after operation {number} ({op.kind} {op.path})"
            if found.step < disk.returned:
                return f"{place} step {disk.returned} is lost, there is {found.step}", len(seen)
            for name in found.incomplete.keys() - disk.leaving:
                return f"{place} {name} is incomplete: {found.incomplete[name]}", len(seen)
    return None, len(seen)


# -------------------------------------------------------------------------------------------------------------------------- tests


def test_no_power_cut_loses_a_checkpoint(ops: list[Op], root: Path) -> None:
    kinds = [op.kind for op in ops]
    assert kinds.count("rename") == 3 and kinds.count("returned") == 3 and "rmdir" in kinds and kinds.count("write") == 21
    lost, disks = loss(ops, root)
    print(f"{len(ops)} operations, {disks} different disks")
    assert lost is None and disks > 150


def fsyncs(ops: list[Op]) -> list[int]:
    return [number for number, op in enumerate(ops) if op.kind == "fsync"]


def test_every_fsync_is_needed(ops: list[Op], root: Path) -> None:
    places = fsyncs(ops)
    assert len(places) >= 3 * 6
    needless = []
    for place in places:
        lost, _ = loss([op for number, op in enumerate(ops) if number != place], root)
        if lost is None:
            needless.append(ops[place])
    assert needless == []


def test_a_rename_before_the_manifest_is_noticed(ops: list[Op], root: Path) -> None:
    """The last save's manifest is written, and synced, into the folder that has its final name already."""
    rename = max(number for number, op in enumerate(ops) if op.kind == "rename")
    manifest = [n for n, op in enumerate(ops) if op.path == f"{ops[rename].path}/manifest.json"]
    tail = [n for n in range(manifest[0], rename) if n not in manifest]
    moved = [op._replace(path=op.path.replace(ops[rename].path, ops[rename].target)) for op in (ops[n] for n in (*manifest, *tail))]
    swapped = [*ops[: manifest[0]], ops[rename], *moved, *ops[rename + 1 :]]
    assert sorted(op.kind for op in swapped) == sorted(op.kind for op in ops)
    lost, _ = loss(swapped, root)
    assert lost is not None and "is incomplete" in lost
