"""Loss and throughput of one run or several: a picture with matplotlib (the `plot` extra), or drawn in the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptfast.errors import LoadError
from gptfast.training import log

Curve = list[tuple[int, float]]  # (tokens seen, value)


class Picture(NamedTuple):
    """What plot() made: a file, or text for a terminal."""

    is_file: bool
    text: str


class Run(NamedTuple):
    """What a run's log says, each over tokens seen: training loss, tokens/s, held-out loss; the last two may be empty."""

    loss: Curve
    throughput: Curve
    held_out: Curve


def _points(records: list[dict[str, Any]], event: str, key: str, tokens_a_step: float) -> Curve:
    found = []
    for record in records:
        value, step = record.get(key), record.get("step")
        if record.get("event") == event and isinstance(value, (int, float)) and isinstance(step, int):
            tokens = record.get("tokens")
            found.append((tokens if isinstance(tokens, int) else round(step * tokens_a_step), float(value)))
    return sorted(found)


def read(run: Path | str) -> Run:
    """The curves of a run. Raises gptfast.LoadError where there is no log with steps in it."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        raise LoadError(f"run {run}: no log.jsonl in it")
    records = log.read(path)
    steps = [r for r in records if r.get("event") == "step" and isinstance(r.get("tokens"), int) and isinstance(r.get("step"), int)]
    loss = _points(steps, "step", "loss", 0.0)
    if not loss:
        raise LoadError(f"run {run}: its log has no steps")
    ratio = steps[-1]["tokens"] / max(steps[-1]["step"], 1)
    return Run(loss, _points(steps, "step", "tokens_per_s", ratio), _points(records, "eval", "val_loss", ratio))


def curve(run: Path | str) -> Curve:
    """(tokens seen, loss) of each logged step of a run. Raises gptfast.LoadError where there is no log with steps in it."""
    return read(run).loss


def named(runs: Sequence[Path | str]) -> dict[str, Run]:
    """The runs by their folders' names, or by their paths where two folders have one name."""
    names = [Path(run).name for run in runs]
    alike = len(set(names)) < len(names)
    return {str(run) if alike else name: read(run) for run, name in zip(runs, names, strict=True)}


def plot(runs: Sequence[Path | str], out: Path | str) -> Picture:
    """The curves of `runs` as a picture in `out` (its ending says which format) if matplotlib is installed, else as text. Raises
    gptfast.LoadError for a run without a log and for a file that cannot be written."""
    found = named(runs)
    if importlib.util.find_spec("matplotlib") is None:
        return Picture(False, text(found))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, run in found.items():
        (line,) = above.plot(*_axes(run.loss), linewidth=1, label=name)
        if run.held_out:
            above.plot(*_axes(run.held_out), "o--", markersize=4, linewidth=1, color=line.get_color(), label=f"{name}, held out")
        below.plot(*_axes(run.throughput), linewidth=1, color=line.get_color())
    above.set_ylabel("loss (nats per token)")
    below.set_ylabel("tokens/s")
    below.set_ylim(bottom=0)
    below.set_xlabel("million tokens")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    if len(found) > 1 or any(run.held_out for run in found.values()):
        above.legend()
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise LoadError(f"picture {out}: {' '.join(str(error).split())}") from error
    return Picture(True, str(out))


def _axes(points: Curve) -> tuple[list[float], list[float]]:
    return [tokens / 1e6 for tokens, _ in points], [value for _, value in points]


def text(found: dict[str, Run]) -> str:
    """Loss and throughput of the runs for a terminal, one below the other."""
    parts = []
    for name, run in found.items():
        title = f"{name}: " if len(found) > 1 else ""
        parts.append(draw(run.loss, f"{title}training loss (nats per token)" if title or run.throughput else ""))
        if run.throughput:
            parts.append(draw(run.throughput, f"{title}tokens/s", height=6, floor=0.0))
    return "\n\n".join(parts)


def draw(points: Curve, title: str = "", width: int = 72, height: int = 14, floor: float | None = None) -> str:
    """The curve in characters: each column is the mean value of its share of the tokens. floor: the axis starts at most there."""
    last = max(tokens for tokens, _ in points) or 1
    columns: list[list[float]] = [[] for _ in range(width)]
    for tokens, value in points:
        columns[min(tokens * width // (last + 1), width - 1)].append(value)
    means = [sum(column) / len(column) if column else None for column in columns]
    known = [mean for mean in means if mean is not None]
    low, high = min(known if floor is None else [*known, floor]), max(known)
    span = (high - low) or 1.0
    rows = [[" "] * width for _ in range(height)]
    for place, mean in enumerate(means):
        if mean is not None:
            rows[round((high - mean) / span * (height - 1))][place] = "*"
    labels = [high - span * row / (height - 1) for row in range(height)]
    places = 3 if high < 100 else 0
    lines = [f"{label:7.{places}f} |{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    axis = f"{'':7s} +{'-' * width}\n{'':9s}0{f'{last / 1e6:.1f} M tokens':>{width - 1}s}"
    return "\n".join([*([title] if title else []), *lines, axis])
