"""The four environment variables, read and checked once at import. No torch here: `gptfast --help` must not wait for it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from gptfast.errors import Error

VARIABLES = {
    "GPTFAST_BACKEND": "backend for every op that has it (triton), and/or for single ops (attention=cuda), comma-separated",
    "GPTFAST_CPU_ISA": "instruction set of the C++ kernels: plain, avx2 or avx512 (default: the best this CPU has)",
    "GPTFAST_DATA": "folder with the data sets that tests and examples read",
    "GPTFAST_REQUIRE": "proofs whose absence fails the tests instead of skipping them, comma-separated",
}
BACKENDS = ("eager", "cpp", "cuda", "triton")
ISAS = ("plain", "avx2", "avx512")
OPS = tuple(sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem[0] != "_"))


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def check_backend(name: str) -> str:
    """`name`, if it is one of the four backends; else raises gptfast.Error with the nearest one."""
    if name not in BACKENDS:
        raise Error(f"unknown backend {name!r}{_nearest(name, BACKENDS)}; backends are {', '.join(BACKENDS)}")
    return name


def check_op(name: str) -> str:
    """`name`, if it is an op; else raises gptfast.Error with the nearest one."""
    if name not in OPS:
        raise Error(f"unknown op {name!r}{_nearest(name, OPS)}; `gptfast backends` lists the ops")
    return name


def parse_backend(text: str) -> tuple[str | None, dict[str, str]]:
    """'triton,attention=cuda' -> ('triton', {'attention': 'cuda'}): what is asked for everywhere, and what is forced per op."""
    asked: str | None = None
    forced: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        op, equals, name = part.partition("=")
        if equals:
            forced[check_op(op.strip())] = check_backend(name.strip())
        elif asked is not None:
            raise Error(f"GPTFAST_BACKEND names two backends for every op: {asked}, {part}; give one, and op=name for single ops")
        else:
            asked = check_backend(part)
    return asked, forced


def check(environment: Mapping[str, str] = os.environ) -> tuple[str | None, dict[str, str]]:
    """Checks every GPTFAST_ variable and returns what GPTFAST_BACKEND asks for and forces. Raises gptfast.Error."""
    for name in environment:
        if name.startswith("GPTFAST_") and name not in VARIABLES:
            raise Error(f"unknown variable {name}{_nearest(name, VARIABLES)}; gptfast reads {', '.join(VARIABLES)}")
    isa = environment.get("GPTFAST_CPU_ISA", "")
    if isa and isa not in ISAS:
        raise Error(f"GPTFAST_CPU_ISA is {isa!r}; allowed: {', '.join(ISAS)}")
    return parse_backend(environment.get("GPTFAST_BACKEND", ""))


def check_at_import() -> None:
    """check(), for `import gptfast`: raises gptfast.Error. In the `gptfast` command an error is its one line and exit code 2 here,
    because this runs before any code of the command could catch it."""
    try:
        check()
    except Error as error:
        program = sys.argv[0] if sys.argv else ""
        if Path(program).stem == "gptfast" or (program == "-m" and "gptfast" in sys.orig_argv):
            print(f"gptfast: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        raise
