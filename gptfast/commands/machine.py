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


@command(FILES, "dtype")
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="model folder (pytorch_model.bin too), hub id, packed file", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="new folder or file for the result", show_default="required")],
    common: Common,
    given: dict[str, Any],
    to: Annotated[
        str, typer.Option("--to", metavar="hf|packed", help="hf: a folder with safetensors; packed: one file for the C++ engine")
    ] = "hf",
) -> dict[str, Any]:
    """Turn a model into one packed file; a packed file, an old pytorch_model.bin or peft's LoRA into a Hugging Face folder.

    A packed file of --dtype fp32 or bf16 gives back its weights bit for bit; int8 and int4 do not. Nothing else opens a pickle.
    """
    if to not in ("hf", "packed"):
        raise Error(f"--to is {to!r}; allowed: hf, packed")
    from gptfast import packed
    from gptfast.data import check_new

    facts: dict[str, Any] = {"source": source, "out": out, "to": to}
    if to == "packed":
        if os.path.lexists(out):
            raise Error(f"output {out} exists already; a new file is needed")
        dtype = common.dtype or (packed.open(source).dtype if packed.is_packed(source) else "fp32")
        facts |= {"dtype": dtype, "bytes": packed.write(source, dtype, out).stat().st_size}
    else:
        if common.dtype is not None:
            raise Error(f"--dtype is {common.dtype!r}; it goes with --to packed, a folder keeps the numbers that SRC has")
        check_new(Path(out))
        _to_folder(source, out)
    if not common.json:
        print(f"{out}: converted from {source}" + (f", {dtype}, {facts['bytes']:,} bytes" if to == "packed" else ""))
    return facts


def _to_folder(source: str, out: str) -> None:
    """A Hugging Face folder from a packed file, from a folder with adapters (merged into their model) or with a pickle."""
    from gptfast import packed

    if (Path(source) / "adapter_config.json").is_file():
        from gptfast.training import lora

        lora.export(Path(source), Path(out))
        return
    if not packed.is_packed(source):
        from gptfast.hub import convert_pickle

        convert_pickle(source, out)
        return
    from gptfast.hub import save

    found = packed.open(source)
    save(out, found.state(), found.config, generation_config=found.generation_config)
    if found.has_tokenizer:
        found.tokenizer().save_pretrained(out)


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
def doctor(
    common: Common,
    given: dict[str, Any],
    verify: Annotated[
        str | None,
        typer.Option("--verify", metavar="FILE", help="read a packed file or data folder and check all of it", show_default="none"),
    ] = None,
) -> dict[str, Any]:
    """Say what this installation has, what it lacks, and the command that adds it; or whether a file or data folder is whole."""
    if verify is not None and Path(verify).is_dir():
        from gptfast.data import verify as read

        meta = read(verify)
        counts = {split: meta[split]["tokens"] for split in ("train", "val")}
        if not common.json:
            print(f"{verify}: whole; {counts['train']:,} tokens to train on, {counts['val']:,} held out")
        return {"folder": verify, "vocabulary": meta["vocabulary"], **counts}
    if verify is not None:
        from gptfast import packed

        whole = packed.verify(verify)
        facts = {"file": verify, "dtype": whole.dtype, "parameters": whole.parameters, "sha256": whole.payload_sha256}
        if not common.json:
            print(f"{verify}: whole; {whole.dtype}, {whole.parameters / 1e6:.1f} M parameters, SHA-256 {whole.payload_sha256}")
        return facts
    from gptfast.doctor import findings, text

    found = findings()
    if not common.json:
        print(text(found))
    return {"findings": found}
