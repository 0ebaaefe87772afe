"""Two servers behind nginx by gptfast/serving/nginx.conf: it is well-formed, both are used, and any of them gives the same text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gptfast
from gptfast.testing.live import LiveServer, free_port

CONFIG = Path(gptfast.__file__).parent / "serving/nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def configured(folder: Path, ports: dict[str, int]) -> list[str]:
    """The command that runs the configuration from `folder`, with other ports and nothing of its own outside."""
    text = CONFIG.read_text()
    for name, port in ports.items():
        assert text.count(f"127.0.0.1:{name}") == 1, "the ports that the README names"
        text = text.replace(f"127.0.0.1:{name}", f"127.0.0.1:{port}")
    paths = "".join(f"{kind}_temp_path {folder};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(text.replace("http {", f"http {{\n{paths}access_log off;\n", 1))
    user = "user root; " if os.geteuid() == 0 else ""  # else its worker could not write into the test's folder
    more = f"{user}daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;"
    return [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log"), "-g", more]


@needs_nginx
def test_the_configuration_is_well_formed(tmp_path: Path) -> None:
    done = subprocess.run([*configured(tmp_path, {}), "-t"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[LiveServer]]]:
    """The proxy's address, and the two servers behind it."""
    folder = tmp_path_factory.mktemp("replicas")
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat, and the dog. " * 20], 270)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    gptfast.GPT2LMHeadModel(config).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    ports = {"8000": free_port(), "8001": free_port(), "8002": free_port()}
    with (
        LiveServer(folder / "small", port=ports["8001"]) as one,
        LiveServer(folder / "small", port=ports["8002"]) as two,
        subprocess.Popen(configured(folder, ports)) as proxy,
    ):
        url, end = f"http://127.0.0.1:{ports['8000']}", time.monotonic() + 20
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield url, [one, two]
        proxy.terminate()


def ask(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def made(servers: list[LiveServer]) -> list[float]:
    return [server.metric("gptfast:generation_tokens_total") for server in servers if server.process.poll() is None]


@needs_nginx
def test_replicas_answer_alike_and_one_that_ends_is_not_missed(cluster: tuple[str, list[LiveServer]]) -> None:
    url, servers = cluster
    before = made(servers)
    body = {"prompt": "the cat", "max_tokens": 20, "seed": 5, "temperature": 1.0}
    texts = {ask(url, **body)["choices"][0]["text"] for _ in range(8)}
    assert len(texts) == 1
    assert all(now > then for now, then in zip(made(servers), before, strict=True)), "both replicas were asked"
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({**body, "stream": True}).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as stream:
        pieces = re.findall(rb'"text":"((?:[^"\\]|\\.)*)"', stream.read())
    assert "".join(json.loads(b'"' + piece + b'"') for piece in pieces) in texts
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/metrics", timeout=5)
    servers[0].stop()
    assert {ask(url, **body)["choices"][0]["text"] for _ in range(4)} == texts
