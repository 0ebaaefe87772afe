"""One candidate in a process of its own: reads commands from its standard input and answers each with a line of JSON.

    python -P bench/peers/serve.py KIND FORMAT PATH THREADS

KIND names peer_KIND.py beside this one, whose class Peer does the work. A process of its own has its own pool of threads, and its
parent stops it (SIGSTOP) while another is timed: threads that spin for a while after a call, as some libraries' do, take nothing
from it. The clock is read here, around the call alone: pipes and JSON are not timed.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of this process that are in memory, mapped files included."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class Server:
    """Answers the commands. `opened` seconds and `before` bytes are those of the first opening."""

    def __init__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self.module, self.arguments = module, arguments
        module.load_library()
        self.before = resident()
        start = time.perf_counter()
        self.peer = module.Peer(*arguments)
        self.opened = time.perf_counter() - start

    def about(self) -> dict[str, Any]:
        return {"open_seconds": self.opened, "settings": self.peer.settings, "version": self.module.version()}

    def run(self, prompts: list[list[int]], new: int, mode: str, seed: int, keep: bool = False) -> dict[str, Any]:
        """Seconds of a call that makes `new` tokens for each prompt; the tokens too with `keep`."""
        given = self.peer.prepare(prompts)
        start = time.perf_counter()
        made = self.peer.generate(given, new, mode, seed)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": self.peer.tokens(made) if keep else []}

    def score(self, ids: list[int]) -> dict[str, Any]:
        return {"logprobs": self.peer.score(ids)}

    def memory(self) -> dict[str, Any]:
        gc.collect()
        return {"before": self.before, "now": resident()}

    def reopen(self) -> dict[str, Any]:
        """Seconds to open the model once more, its file in the system's cache."""
        self.peer.close()
        self.peer = None
        gc.collect()
        start = time.perf_counter()
        self.peer = self.module.Peer(*self.arguments)
        return {"seconds": time.perf_counter() - start}


def load(kind: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"gptfast_peer_{kind}", Path(__file__).parent / f"peer_{kind}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    kind, form, path, threads = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process would outlive its parent
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        server = Server(load(kind), (path, form, int(threads)))
    except Exception as error:  # a peer that cannot run here is left out, whatever its reason
        return answer({"absent": f"{type(error).__name__}: {error}"})
    answer(server.about())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(server, command.pop("do"))(**command))
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
