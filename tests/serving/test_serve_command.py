"""`gptfast serve` as a user starts and ends it: one real process, and what it refuses before it starts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from gptfast import cli, serving

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def start(folder: Path, *flags: str, **environment: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """The process, its URL, and the lines it has printed so far and will print."""
    command = [sys.executable, "-P", "-m", "gptfast", "serve", str(folder), "--port", "0", "--threads", "1", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            threading.Thread(target=lines.extend, args=[process.stderr], daemon=True).start()
            return process, found[0], lines
    raise AssertionError(f"it does not start: {''.join(lines)}")


def test_a_process_serves_until_sigterm(folder: Path) -> None:
    process, url, lines = start(folder, "--api-key-env", "SERVER_KEYS", "--name", "mine", SERVER_KEYS="secret")
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=5) as client:  # the client waits while it loads
            assert client.models.list().data[0].id == "mine"
            answer = client.completions.create(model="mine", prompt="The quick", max_tokens=4, seed=1)
            assert answer.usage is not None and answer.usage.completion_tokens <= 4
            extra: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "stream_options": {"include_usage": True}}
            stream = client.completions.create(model="mine", prompt="fox", max_tokens=200, stream=True, **extra)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            *_, last = stream
            assert last.usage is not None and last.usage.completion_tokens == 200
        assert process.wait(20) == 0
    finally:
        process.kill()
    text = "".join(lines)
    assert "engine: " in text and "secret" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000"), (["--template", "jinja"], "--template is 'jinja'; allowed: plain"),
        (["--api-key-file", "/no/such"], "API key file /no/such"), (["--api-key-env", "NO_SUCH_NAME"], "NO_SUCH_NAME"),
        (["--host", "256.0.0.1", "--port", "0"], "--host 256.0.0.1"), (["--max-n", "0"], "--max-n is 0"),
        (["--batch", "x"], "--batch"),
    ],
)
def test_what_it_cannot_start_with_is_one_line(run: Run, folder: Path, arguments: list[str], message: str) -> None:
    code, out, err = run("serve", folder, *arguments)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("gptfast: error: ") and message in last


def test_a_port_that_is_taken_and_a_model_that_is_not_there(run: Run, folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", folder, "--port", port)
        assert code == 2 and f"--port {port} cannot be listened on: Address already in use" in err
    code, _, err = run("serve", tmp_path / "absent", "--port", 0)
    assert code == 2 and "absent" in err.strip().splitlines()[-1] and "Traceback" not in err


def test_a_warning_where_everybody_may_come(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Any] = []
    monkeypatch.setattr(serving, "run", lambda app, host, port, told: served.append((app, host, port)), raising=False)
    code, _, err = run("serve", folder, "--host", "0.0.0.0", "--port", 1234)
    assert code == 0 and "--host is 0.0.0.0 and there is no API key" in err
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    code, _, err = run("serve", folder, "--host", "0.0.0.0", "--api-key-file", keys, "--max-n", 3)
    assert code == 0 and "warning" not in err
    assert [entry[1:] for entry in served] == [("0.0.0.0", 1234), ("0.0.0.0", 8000)]
    assert served[1][0].state.service.limits.max_n == 3


def test_without_the_extra_it_names_the_command_that_installs_it(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serving.find_spec
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    code, _, err = run("serve", folder)
    assert code == 2 and "the server needs uvicorn, which is not installed: pip install 'gptfast-torch[serve]'" in err
