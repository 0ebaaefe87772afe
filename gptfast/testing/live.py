"""`gptfast serve` as a process on a free port, for tests, campaigns and benchmarks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self


def free_port() -> int:
    """A port of the loopback interface that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LiveServer:
    """The server of `folder`, ready when this returns. `process` is it, `url` where it is, without a slash at the end.

    Raises RuntimeError with what it printed where it ends or is not ready within `seconds`.
    """

    def __init__(self, folder: Path, *flags: str, port: int | None = None, seconds: float = 60) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        command = [sys.executable, "-P", "-m", "gptfast", "serve", str(folder), "--port", str(self.port), *flags]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/ready", timeout=5):
                return
            time.sleep(0.05)
        status, said = self.process.poll(), self.log()
        self.close()
        raise RuntimeError(f"{' '.join(command)} was not ready (status {status}): {said[-2000:]}")

    def log(self) -> str:
        """All that it has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def metrics(self) -> dict[str, float]:
        """Name with labels -> value of every line of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (re.fullmatch(r"(\S+) (\S+)", line) for line in lines if not line.startswith("#"))
        return {pair[1]: float(pair[2]) for pair in pairs if pair}

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels. Raises KeyError where there is none of that name."""
        values = [value for key, value in self.metrics().items() if key.partition("{")[0] == name]
        if not values:
            raise KeyError(name)
        return sum(values)

    def resident(self) -> int:
        """Bytes of the process that are in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Ends the process at once; stop() is the polite way."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._log.close()

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and the exit status. Raises subprocess.TimeoutExpired."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
