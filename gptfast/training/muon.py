"""Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon) on the
blocks' matrices, AdamW on everything else.

For a matrix W with gradient g, momentum mu and learning rate lr, as in Liu et al. 2025 (arXiv:2502.16982):

    M = mu M + (1 - mu) g
    N = (1 - mu) g + mu M
    O = X_5,  X_0 = N / |N|,  X_k+1 = a X_k + b (X_k X_k') X_k + c (X_k X_k')^2 X_k
    W = W - lr (0.2 sqrt(max(rows, columns)) O + weight_decay W)

(a, b, c) = (3.4445, -4.7750, 2.0315): the iteration brings every singular value near 1, so O is near the closest orthogonal matrix.
The factor gives the update the size of AdamW's, so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.training.optimizer import AdamW

COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SIZE = 0.2  # root mean square of AdamW's updates (Liu et al. 2025, section 2.2)


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton-Schulz: [rows, columns] -> [rows, columns] with all singular values near 1 (0.7 to 1.2), computed and returned in
    `dtype`. Zeros stay zeros."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / torch.linalg.vector_norm(x).clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(AdamW):
    """Muon for the parameter groups with "muon": True, AdamW for the others; made by of_model().

    Only update() is fast: it takes device scalars and looks at none of them. `products` is the dtype of the iteration: bf16 is
    enough for it and faster where it has hardware. State of a Muon matrix: "momentum".
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, products: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(groups, lr, **options)
        self.products = products
        for group in self.param_groups:
            group.setdefault("muon", False)
            if group["muon"] and any(p.dim() != 2 for p in group["params"]):
                raise ValueError("Muon updates matrices; a parameter of another shape belongs into AdamW's groups")

    def reserve(self) -> None:
        """State for every parameter now and not at the first step."""
        self._of_adamw()
        for _, p in self._matrices():
            self._momentum(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update at the groups' own learning rates; every parameter needs a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        one = torch.ones(1, device=first["params"][0].device)
        self.update(first["lr"] * one, one, one)
        return loss

    @torch.no_grad()
    def update(self, lr: Tensor, scale: Tensor, finite: Tensor, copies: list[Tensor] | None = None) -> None:
        """As AdamW.update: lr, scale, finite [1] on the device; copies in the order of the groups."""
        beside = {} if copies is None else dict(zip(map(id, self._all()), copies, strict=True))
        rest, decay = self._of_adamw()
        if rest:
            self._call(rest, decay, self.param_groups[0], lr, scale, finite, [beside[id(p)] for p in rest] if beside else None)
        for group, p in self._matrices():
            self._move(group, p, lr, scale, finite)
            if beside:
                beside[id(p)].copy_(p)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _matrices(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups if group["muon"] for p in group["params"]]

    def _of_adamw(self) -> tuple[list[Tensor], list[float]]:
        """AdamW's parameters, which have state and share a counter, and the weight decay of each."""
        groups = [group for group in self.param_groups if not group["muon"]]
        params = [p for group in groups for p in group["params"]]
        if params:
            (params,) = self._together(params)
        return params, [group["weight_decay"] for group in groups for _ in group["params"]]

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"]
        return momentum

    def _move(self, group: dict[str, Any], p: Tensor, lr: Tensor, scale: Tensor, finite: Tensor) -> None:
        assert p.grad is not None
        mu, momentum = group["momentum"], self._momentum(p)
        good = finite > 0
        grad = torch.where(good, p.grad * scale, 0)  # 0 * NaN is NaN: it must not reach the momentum
        moved = torch.lerp(grad, momentum, mu)
        direction = orthogonal(torch.lerp(grad, moved, mu), self.products)
        size = SIZE * math.sqrt(max(p.shape))
        momentum.copy_(torch.where(good, moved, momentum))
        shrunk = p * (1 - lr * group["weight_decay"])
        p.copy_(torch.where(good, shrunk - (lr * size) * direction, p))


def of_model(
    named: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float],
    eps: float,
    products: torch.dtype = torch.float32,
) -> Muon:
    """Muon for the matrices of the blocks ("...h.N...."), AdamW with decay for other matrices (embeddings, head), and without for
    biases and layer norms."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    hidden = [p for name, p in trained if p.dim() == 2 and ".h." in f".{name}"]
    inside = set(map(id, hidden))
    others = [p for _, p in trained if id(p) not in inside]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        {"params": hidden, "weight_decay": weight_decay, "muon": True, "momentum": momentum},
    ]
    return Muon([group for group in groups if group["params"]], lr, products, betas=betas, eps=eps)
