"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with torch.optim.AdamW's constructor, defaults and state, on ops.adamw_."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step is one call of ops.adamw_ a parameter group; its state_dict is torch's.

    `amsgrad`, `maximize`, `capturable`, `differentiable`, `foreach`, `fused`, a learning rate in a tensor, and complex or sparse
    gradients take PyTorch's own step. Parameters that step together share one step counter, a tensor [1] on their device that
    ops.adamw_ advances; each one's state["step"] is a view of it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        if not all(self._plain(group) for group in self.param_groups):
            self._separate_steps()
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in self._together([p for p in group["params"] if p.grad is not None]):
                dtype = torch.promote_types(torch.float32, params[0].dtype)
                one = torch.ones(1, dtype=dtype, device=params[0].device)
                self._call(params, [group["weight_decay"]] * len(params), group, group["lr"] * one, one, one, None)
        return loss

    @torch.no_grad()
    def update(self, lr: Tensor, scale: Tensor, finite: Tensor, copies: list[Tensor] | None = None) -> None:
        """The trainer's form: one call for all groups, with device scalars and no look at their values.

        lr [1]; scale [1] multiplies every gradient; nothing happens where finite [1] is 0; copies: one tensor a parameter, in the
        order of the groups, that receives the new value in its own dtype. betas and eps are the first group's; every parameter
        needs a gradient.
        """
        groups = self.param_groups
        params = [p for group in groups for p in group["params"]]
        decay = [group["weight_decay"] for group in groups for _ in group["params"]]
        (together,) = self._together(params)
        self._call(together, decay, groups[0], lr, scale, finite, copies)

    def reserve(self) -> None:
        """State for every parameter now and not at the first step, so that it lies apart from what a step allocates and frees."""
        self._together([p for group in self.param_groups for p in group["params"]])

    def _call(
        self, params: list[Tensor], decay: list[float], group: dict[str, Any], lr: Tensor, scale: Tensor, finite: Tensor,
        copies: list[Tensor] | None,
    ) -> None:
        states = [self.state[p] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step = states[0]["step"].view(1)
        ops.adamw_(params, grads, means, squares, copies, lr, step, scale, finite, decay, beta1, beta2, group["eps"])

    @staticmethod
    def _plain(group: dict[str, Any]) -> bool:
        special = ("amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused")
        odd = any(p.grad is not None and (p.grad.is_sparse or p.is_complex()) for p in group["params"])
        return not odd and not any(group.get(name) for name in special) and not isinstance(group["lr"], Tensor)

    def _together(self, params: list[Tensor]) -> list[list[Tensor]]:
        """The parameters by shared step counter, with state for those that have none. Where only some that share a counter step
        now, they get a counter of their own."""
        fresh: dict[torch.device, Tensor] = {}
        for p in params:
            if not self.state[p]:
                step = fresh.setdefault(p.device, torch.zeros(1, device=p.device))
                self.state[p] = {"step": step.view(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        by_counter: dict[int, list[Tensor]] = {}
        for p in params:
            by_counter.setdefault(self.state[p]["step"].data_ptr(), []).append(p)
        if len(params) != len(self.state):
            stepping = set(map(id, params))
            shared = {s["step"].data_ptr() for p, s in self.state.items() if "step" in s and id(p) not in stepping}
            for pointer in shared & by_counter.keys():
                own = self.state[by_counter[pointer][0]]["step"].clone()
                for p in by_counter[pointer]:
                    self.state[p]["step"] = own
        return list(by_counter.values())

    def _separate_steps(self) -> None:
        """Gives every parameter its own counter, as PyTorch's step expects: it advances each one."""
        for p, state in self.state.items():
            if state:
                on_device = any(g.get("capturable") or g.get("fused") for g in self.param_groups)
                state["step"] = state["step"].clone().to(p.device if on_device else "cpu")

    def state_dict(self) -> dict[str, Any]:
        """torch's, with a counter for every parameter: whoever reads it may advance them one by one."""
        made = super().state_dict()
        clones = ((i, {k: v.clone() if k == "step" else v for k, v in values.items()}) for i, values in made["state"].items())
        return {**made, "state": dict(clones)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """torch's, after which parameters with equal step counts share a counter again."""
        super().load_state_dict(state_dict)
        counters: dict[tuple[torch.device, float], Tensor] = {}
        for p, state in self.state.items():
            if "step" in state:
                count = float(state["step"])
                step = counters.setdefault((p.device, count), torch.full((1,), count, device=p.device))
                state["step"] = step.view(())


def groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on matrices only: biases and layer norms have none."""
    params = [p for _, p in named if p.requires_grad]
    matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
