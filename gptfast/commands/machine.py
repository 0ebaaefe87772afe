"""Commands about files and this machine: convert, backends, doctor."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gptfast._environment import BACKENDS
from gptfast.commands import FILES, MACHINE, Common, command, running
from gptfast.errors import Error


@command(FILES)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="model folder with pytorch_model.bin", show_default=False)],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="new folder for the result", show_default="required")],
    common: Common,
    given: dict[str, Any],
    to: Annotated[str, typer.Option("--to", metavar="hf", help="hf: a Hugging Face folder with safetensors")] = "hf",
) -> dict[str, Any]:
    """Turn an old pytorch_model.bin into a Hugging Face folder with safetensors; nothing else ever opens a pickle."""
    if to != "hf":
        raise Error(f"--to is {to!r}; allowed: hf")
    from gptfast.data import check_new
    from gptfast.hub import convert_pickle

    check_new(Path(out))
    convert_pickle(source, out)
    if not common.json:
        print(f"{out}: converted from {source}")
    return {"source": source, "out": out}


@command(MACHINE, "device backend")
def backends(
    common: Common,
    given: dict[str, Any],
    proof: Annotated[bool, typer.Option("--proof", help="show where each was last executed instead", show_default="off")] = False,
) -> dict[str, Any]:
    """Show which backend each op takes here and why the others do not, or where each was last executed."""
    if proof:
        from gptfast import proof as proofs

        path = proofs.FILE
        if not path.exists():
            raise Error(f"{path} does not exist: proofs are recorded by the tests in a checkout of the repository")
        rows = proofs.table(proofs.read(path))
    else:
        with running(common) as device:
            from gptfast.backend import table

            rows = table(device)
    if not common.json:
        _print_table(rows, proof)
    return {"proof": proof, "ops": rows}


def _print_table(rows: list[dict[str, Any]], proof: bool) -> None:
    """Ops x backends: a rich table on a terminal, aligned text elsewhere."""
    cells = [[row["op"], *(_cell(row, name, proof) for name in BACKENDS)] for row in rows]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.table import Table

        shown = Table("op", *BACKENDS)
        for line in cells:
            shown.add_row(*(f"[bold green]{text}[/]" if text.startswith("->") else text for text in line))
        Console().print(shown)
        return
    cells.insert(0, ["op", *BACKENDS])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(row: dict[str, Any], name: str, proof: bool) -> str:
    if proof:
        return str(row[name])
    return ("-> " if row["choice"] == name else "") + (row[name] or "yes")


@command(MACHINE)
def doctor(common: Common, given: dict[str, Any]) -> dict[str, Any]:
    """Say what this installation has, what it lacks, and the command that adds it."""
    from gptfast.doctor import findings, text

    found = findings()
    if not common.json:
        print(text(found))
    return {"findings": found}
