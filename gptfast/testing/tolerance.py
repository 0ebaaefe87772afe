"""When a kernel's result counts as right, and the wrong results that this rule must reject.

    |fast - ref| <= k |eager - ref| + c eps |ref|

`ref` is eager in float64 on the same (rounded) inputs, `eager` is eager in the case's own dtype, eps that of the output's dtype.
k = 2, and 3 for gradients; c = 1 for 16-bit outputs, 2 for fp32, 8 for fp32 sums over more than 64 terms. The rule holds for the
largest absolute value and for the Euclidean norm, for every named slice. There is no absolute floor: with one, zeros would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Slices = Callable[[Tensor], Mapping[str, Tensor]]


def _allowed_factor(dtype: torch.dtype, long_sum: bool) -> float:
    return (8.0 if long_sum else 2.0) if dtype == torch.float32 else 1.0


def _compare(label: str, fast: Tensor, eager: Tensor, ref: Tensor, gradient: bool, long_sum: bool) -> None:
    if fast.numel() == 0:
        return
    fast_bits, eager_bits = fast.double().cpu(), eager.double().cpu()
    reference = ref.double().cpu()
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(fast_bits) != test(eager_bits)
        if differs.any():
            place = tuple(differs.nonzero()[0].tolist())
            count = f"{int(differs.sum())} of {fast.numel()}"
            raise AssertionError(f"{label}: {what} in other places than eager, {count}, first at {place}")
    finite = torch.isfinite(eager_bits) & torch.isfinite(reference)
    error, own, size = ((t[finite]) for t in (fast_bits - reference, eager_bits - reference, reference))
    if error.numel() == 0:
        return
    factor, rounding = (3.0 if gradient else 2.0), _allowed_factor(fast.dtype, long_sum) * torch.finfo(fast.dtype).eps
    for norm, measure in (("max", lambda t: t.abs().max()), ("L2", torch.linalg.vector_norm)):
        found, allowed = float(measure(error)), factor * float(measure(own)) + rounding * float(measure(size))
        if not found <= allowed:
            worst = torch.where(finite, (fast_bits - reference).abs(), torch.zeros_like(reference)).argmax()
            index = tuple(int(i) for i in torch.unravel_index(worst, reference.shape))
            raise AssertionError(
                f"{label}: {norm} error {found:.3g} is above {allowed:.3g} (eager's own error {float(measure(own)):.3g}, "
                f"|ref| {float(measure(size)):.3g}); worst at {index}: {fast_bits[index]:.9g}, not {reference[index]:.9g}"
            )


def assert_close_to_reference(
    fast: Tensor,
    eager: Tensor,
    ref: Tensor,
    *,
    name: str = "y",
    gradient: bool = False,
    long_sum: bool = False,
    slices: Slices | None = None,
) -> None:
    """Raises AssertionError unless `fast` is as close to `ref` as the rule in this module's docstring demands.

    fast, eager: equal shapes and dtypes; ref: fp64 of that shape. `gradient` chooses k, `long_sum` c. `slices` maps a tensor to
    named parts that are compared apart, so that small values are not judged by the size of large ones (default: the whole).
    NaN, +inf and -inf must stand exactly where eager has them.
    """
    if fast.dtype != eager.dtype or fast.shape != eager.shape or ref.shape != eager.shape:
        found, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (fast, eager))
        raise AssertionError(f"{name}: is {found}, eager gives {wanted}, the reference has shape {tuple(ref.shape)}")
    mine, own, exact = (dict(slices(t)) if slices else {"": t} for t in (fast, eager, ref))
    for part, value in mine.items():
        _compare(f"{name}{f'[{part}]' if part else ''}", value, own[part], exact[part], gradient, long_sum)


def wrong_results(right: Tensor, block: int = 16) -> dict[str, Tensor]:
    """Ways to be wrong that fit any op, made from a right result [..., C]: name -> wrong tensor.

    Zeros; the last partial block of columns unwritten (0); one row holding its neighbour's values; everything off by one column.
    An op's test adds its own (a term missing, the bias ignored).
    """
    rows = right.reshape(-1, right.shape[-1])
    columns = rows.shape[-1]
    unwritten = rows.clone()
    unwritten[:, columns - (columns % block or min(block, columns)) :] = 0
    wrong = {"zeros": torch.zeros_like(rows), "last block unwritten": unwritten}
    if columns > 1:
        wrong["off by one column"] = rows.roll(1, -1)
    if rows.shape[0] > 1:
        stale = rows.clone()
        stale[-1] = stale[-2]
        wrong["stale row"] = stale
    return {name: value.reshape(right.shape) for name, value in wrong.items()}


def assert_rejected(what: str, wrong: Tensor, eager: Tensor, ref: Tensor, **rule: object) -> None:
    """Raises AssertionError if the rule lets the wrong result `what` pass. `rule` as in assert_close_to_reference."""
    try:
        assert_close_to_reference(wrong, eager, ref, **rule)  # type: ignore[arg-type]
    except AssertionError:
        return
    raise AssertionError(f"the tolerance lets a wrong result pass: {what}")
