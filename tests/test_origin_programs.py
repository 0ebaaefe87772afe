"""The two programs that the project began with, run as they stand: on a folder, against a stand-in for the hub, and offline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, LoadError, hub

EVALUATE = """
from gptfast import GPT2LMHeadModel, GPT2Tokenizer, AdamW

tokenizer = GPT2Tokenizer.from_pretrained('gpt2')
model = GPT2LMHeadModel.from_pretrained('gpt2')

input_ids = tokenizer.encode("Hello, my dog is cute", return_tensors="pt")
outputs = model(input_ids, labels=input_ids)
loss, logits = outputs[:2]
"""
TRAIN = """
from gptfast import GPT2LMHeadModel, GPT2Tokenizer, AdamW

tokenizer = GPT2Tokenizer.from_pretrained('gpt2')
model = GPT2LMHeadModel.from_pretrained('gpt2')
optimizer = AdamW(model.parameters())

input_ids = tokenizer.encode("Hello, my dog is cute", return_tensors="pt")
outputs = model(input_ids, labels=input_ids)
loss, logits = outputs[:2]
loss.backward()
optimizer.step()
"""
REPORT = """
import json
moved = model.transformer.ln_f.bias.abs().sum().item()
print(json.dumps({"loss": loss.item(), "logits": list(logits.shape), "moved": moved, "ids": input_ids[0].tolist()}))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = {"pytorch_model.bin": b"pickle", "README.md": b"#", "modeling_evil.py": b"raise SystemExit", "onnx/config.json": b"{}"}


def write(path: Path, config: GPT2Config, max_shard_size: str) -> Path:
    """A folder with a random model, and a tokenizer of 300 tokens."""
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(path, max_shard_size)
    GPT2Tokenizer.train(["Hello, my dog is cute", "my cat is not"] * 9, 300).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random model of GPT-2 124M's shape, in two shards: 500 MB, so it goes away afterwards."""
    path = write(tmp_path_factory.mktemp("hub") / "gpt2", GPT2Config(), "300MB")
    yield path
    shutil.rmtree(path)


@dataclass
class Hub:
    """A server with the hub's three calls for a model: its commit, its list of files, a file. Records what is asked for."""

    folder: Path
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()} | OTHERS
        self.hashes = {name: hashlib.sha1(content).hexdigest() for name, content in self.files.items()}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        place = path.split("?")[0].strip("/").split("/")
        if place[:3] == ["api", "models", "gpt2"] and len(place) in (3, 5) and place[3:4] in ([], ["revision"]):
            if place[4:] not in ([], ["main"], [COMMIT]):
                return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}, b"{}"
            described = {"id": "gpt2", "modelId": "gpt2", "sha": COMMIT, "private": False}
            return 200, {}, json.dumps({**described, "siblings": [{"rfilename": name} for name in self.files]}).encode()
        if place[:4] == ["api", "models", "gpt2", "tree"]:
            sizes = {name: len(content) for name, content in self.files.items()}
            tree = [{"type": "file", "path": name, "size": sizes[name], "oid": self.hashes[name]} for name in sizes]
            return 200, {}, json.dumps(tree).encode()
        if place[0] == "gpt2" and place[1] == "resolve":
            name = "/".join(place[3:])
            self.asked.append(name)
            return 200, {"ETag": f'"{self.hashes[name]}"', "X-Repo-Commit": COMMIT}, self.files[name]
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"


@pytest.fixture(scope="module")
def stand_in(full: Path) -> Iterator[Hub]:
    """The stand-in for the hub on loopback, with `gpt2` on it."""
    served = Hub(full)

    class Handler(BaseHTTPRequestHandler):
        def _send(self, body: bool) -> None:
            status, headers, content = served.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self._send(True)

        def do_HEAD(self) -> None:
            self._send(False)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield served
    server.shutdown()
    thread.join()


def run(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A child process in an empty folder, without anything of this process's Hugging Face settings."""
    cwd.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name[:3] != "HF_" and "proxy" not in name.lower()}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=180
    )


def expected(folder: Path, train: bool) -> dict[str, Any]:
    """The same in this process, with torch's own AdamW."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    ids = GPT2Tokenizer.from_pretrained(folder).encode("Hello, my dog is cute", return_tensors="pt")
    outputs = model(ids, labels=ids)
    if train:
        outputs.loss.backward()
        torch.optim.AdamW(model.parameters()).step()
    moved = model.transformer.ln_f.bias.abs().sum().item()  # 0, and after one step of AdamW its learning rate in every place
    return {"loss": outputs.loss.item(), "logits": list(outputs.logits.shape), "moved": moved, "ids": ids[0].tolist()}


def check(output: str, folder: Path, train: bool) -> None:
    got, want = json.loads(output), expected(folder, train)
    assert got["ids"] == want["ids"] and got["logits"] == want["logits"]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5) and got["moved"] == pytest.approx(want["moved"], rel=1e-3)
    assert (got["moved"] > 0) == train


def test_both_programs_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "model", GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300), "50KB")
    for train, program in ((False, EVALUATE), (True, TRAIN)):
        exec(program.replace("'gpt2'", repr(str(folder))) + REPORT, {})
        check(capsys.readouterr().out, folder, train)


def test_both_programs_on_the_hub_and_then_offline(stand_in: Hub, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    stand_in.asked.clear()
    done = run(EVALUATE + REPORT, tmp_path / "a", HF_ENDPOINT=stand_in.url, HF_HOME=cache)
    assert done.returncode == 0, done.stderr
    check(done.stdout, stand_in.folder, False)
    asked = set(stand_in.asked)
    assert asked == {path.name for path in stand_in.folder.iterdir()}  # config, safetensors and tokenizer files, and no others
    assert not asked & OTHERS.keys()
    stand_in.asked.clear()
    done = run(TRAIN + REPORT, tmp_path / "a", HF_HUB_OFFLINE="1", HF_HOME=cache)
    assert done.returncode == 0 and not stand_in.asked, done.stderr
    check(done.stdout, stand_in.folder, True)
    shutil.rmtree(cache)


REFUSED = """
from gptfast import GPT2LMHeadModel, GPT2Tokenizer, LoadError
for kind in (GPT2Tokenizer, GPT2LMHeadModel):
    try:
        kind.from_pretrained("gpt2")
    except LoadError as error:
        print(error)
"""


NO_HUB = [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]


@pytest.mark.parametrize("environment", NO_HUB, ids=["offline", "no network"])
def test_without_network_and_cache_there_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(REFUSED, tmp_path / "a", HF_HOME=str(tmp_path / "cache"), **environment)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2 and not done.stderr, done.stderr
    for line in lines:
        assert "'gpt2'" in line and "cannot be reached" in line and "save_pretrained" in line and "downloaded before" in line


UNKNOWN = """
import sys
from gptfast import GPT2LMHeadModel, GPT2Tokenizer, LoadError
for arguments in ({"path": "someone/absent"}, {"path": "gpt2", "revision": "v9"}):
    try:
        GPT2LMHeadModel.from_pretrained(**arguments)
    except LoadError as error:
        print(error)
GPT2Tokenizer.from_pretrained("gpt2", revision="main")
"""


def test_what_the_hub_does_not_have_is_named(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.asked.clear()
    done = run(UNKNOWN, tmp_path / "a", HF_ENDPOINT=stand_in.url, HF_HOME=str(tmp_path / "cache"))
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert "'someone/absent'" in lines[0] and "no model on the hub" in lines[0]
    assert "'gpt2' at revision 'v9'" in lines[1]
    # no weights for a tokenizer
    assert set(stand_in.asked) == {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}


@pytest.mark.parametrize("name", ["a/b/c", "../x", "/absent", "a b", "https://x/y", "", "-x"])
def test_names_that_cannot_be_on_the_hub_ask_nobody(name: str) -> None:
    with pytest.raises(LoadError, match="is no folder, and no name on the hub"):
        hub.resolve(name) if name else hub.resolve(Path("absent"))
