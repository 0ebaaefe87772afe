"""The loss curve of one run or several: a picture with matplotlib (the `plot` extra), else drawn in the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptfast.errors import LoadError
from gptfast.training import log

Curve = list[tuple[int, float]]  # (tokens or step, loss)


class Picture(NamedTuple):
    """What plot() made: a file, or text for a terminal."""

    is_file: bool
    text: str


def curve(run: Path | str) -> Curve:
    """(tokens seen, loss) of each logged step of a run. Raises gptfast.LoadError where there is no log with steps in it."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        raise LoadError(f"run {run}: no log.jsonl in it")
    steps = [r for r in log.read(path) if r.get("event") == "step" and isinstance(r.get("loss"), float)]
    points = sorted((int(r["tokens"]), r["loss"]) for r in steps)
    if not points:
        raise LoadError(f"run {run}: its log has no steps")
    return points


def plot(runs: Sequence[Path | str], out: Path | str) -> Picture:
    """The curves of `runs` as a picture in `out` if matplotlib is installed, else as text. Raises gptfast.LoadError for a run
    without a log."""
    curves = {Path(run).name: curve(run) for run in runs}
    if importlib.util.find_spec("matplotlib") is None:
        return Picture(False, "\n\n".join(draw(points, name if len(curves) > 1 else "") for name, points in curves.items()))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot([tokens / 1e6 for tokens, _ in points], [loss for _, loss in points], linewidth=1, label=name)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(out, dpi=120)
    return Picture(True, str(out))


def draw(points: Curve, title: str = "", width: int = 72, height: int = 14) -> str:
    """The curve in characters: each column is the mean loss of its share of the tokens."""
    last = max(tokens for tokens, _ in points) or 1
    columns: list[list[float]] = [[] for _ in range(width)]
    for tokens, loss in points:
        columns[min(tokens * width // (last + 1), width - 1)].append(loss)
    means = [sum(column) / len(column) if column else None for column in columns]
    known = [mean for mean in means if mean is not None]
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    rows = [[" "] * width for _ in range(height)]
    for place, mean in enumerate(means):
        if mean is not None:
            rows[round((high - mean) / span * (height - 1))][place] = "*"
    labels = [high - span * row / (height - 1) for row in range(height)]
    lines = [f"{label:7.3f} |{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    axis = f"{'':7s} +{'-' * width}\n{'':9s}0{f'{last / 1e6:.1f} M tokens':>{width - 1}s}"
    return "\n".join([*([title] if title else []), *lines, axis])
