"""The one step function: forward and backward over the microbatches, gradient norm, clipping, update. Nothing in it waits for the
device; speed comes from the ops below it.

Parameters, gradients and optimizer state are fp32. In bf16 the model computes with a working copy that the optimizer writes beside
the parameters; the copy enters the graph through one autograd.Function whose backward hands fp32 gradients to the parameters. Each
use of a tied matrix enters on its own, so that the gradients of head and embedding are added in fp32 too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptfast import ops
from gptfast.training.loader import Batch
from gptfast.training.optimizer import AdamW


class StepResult(NamedTuple):
    """loss [] (mean over the step's targets), norm [] of the mean loss's gradient before clipping, finite [1] (0: nothing was
    updated); all fp32, on the device."""

    loss: Tensor
    norm: Tensor
    finite: Tensor


class _Enter(torch.autograd.Function):
    """The working copies as they are, with gradients that go to the parameters, in the parameters' dtype."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [p.dtype for p in params]
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


class _LossSum(nn.Module):
    """model.loss_sum as a module's forward, the form that torch.func.functional_call takes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = self.model.loss_sum(batch.ids, batch.targets, batch.document_ids, batch.positions)
        return loss, count


class Step:
    """One optimizer step of `model`, which has loss_sum(ids, targets, document_ids, position_ids) -> (sum, count).

    Calling it with the microbatches of a step and the learning rate updates the parameters in place. Gradients are those of the
    mean over all targets of the step, whatever the sizes of the microbatches: sums are accumulated, and the division by the count
    is part of the factor that the optimizer multiplies gradients with anyway. A step whose gradient is not finite changes nothing.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, dtype: torch.dtype = torch.float32, clip: float = 1.0) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.params[0].device
        self._lr = torch.zeros(1, device=device)
        self._loss = _LossSum(model)
        self.copies = None if dtype == torch.float32 else [p.detach().to(dtype) for p in self.params]
        place = {id(p): index for index, p in enumerate(self.params)}
        self._frozen = {n: p for n, p in self._loss.named_parameters() if id(p) not in place}
        uses = [(n, place[id(p)]) for n, p in self._loss.named_parameters(remove_duplicate=False) if id(p) in place]
        self._names, self._places = [n for n, _ in uses], [index for _, index in uses]

    def refresh(self) -> None:
        """Rewrites the working copies from the parameters, after something other than a step changed these."""
        if self.copies is not None:
            for copy, parameter in zip(self.copies, self.params, strict=True):
                copy.copy_(parameter.detach())

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the losses, number of targets) of one microbatch, in the working dtype."""
        if self.copies is None:
            return self._loss(batch)  # type: ignore[no-any-return]
        copies = [self.copies[index] for index in self._places]
        entered = _Enter.apply(copies, *(self.params[index] for index in self._places))  # type: ignore[no-untyped-call]
        values = dict(zip(self._names, entered, strict=True))
        dtype = self.copies[0].dtype
        values.update((name, p.detach().to(dtype)) for name, p in self._frozen.items())
        return torch.func.functional_call(self._loss, values, (batch,), tie_weights=False)  # type: ignore[no-any-return]

    def __call__(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """One update from at least one microbatch at the learning rate lr."""
        total = count = None
        for batch in batches:
            loss, targets = self.loss_sum(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
            count = targets if count is None else count + targets
        assert total is not None and count is not None, "a step needs a microbatch"
        with torch.no_grad():
            mean = count.clamp(min=1).float().reciprocal()
            norm, finite = ops.grad_norm([p.grad for p in self.params if p.grad is not None])
            norm = norm * mean
            scale = mean * (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else mean.view(1)
            self.optimizer.update(self._lr.fill_(lr), scale, finite, self.copies)
            self.optimizer.zero_grad(set_to_none=True)
            return StepResult((total * mean).view(()), norm.view(()), finite)
