"""The one step function: forward and backward over the microbatches, gradient norm, clipping, update. Nothing in it waits for the
device; speed comes from the ops below it.

Parameters, gradients and optimizer state are fp32. In bf16 and fp16 the model computes with a working copy that the optimizer
writes beside the parameters; the copy enters the graph through one autograd.Function whose backward hands fp32 gradients to the
parameters. Each use of a tied matrix enters on its own, so that the gradients of head and embedding are added in fp32 too. In fp16
the loss is scaled before the backward pass. On a CPU the large tensors of a step come from memory that is kept for the next one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import gptfast.backend as backend
from gptfast.training.loader import Batch
from gptfast.training.optimizer import AdamW
from gptfast.training.parallel import Parallel


class StepResult(NamedTuple):
    """loss [] (mean over the step's targets), norm [] of the mean loss's gradient before clipping, finite [1] (0: nothing was
    updated), all fp32, on the device; numbers [B] int64 on the CPU: the samples whose gradients the step was made of, or None."""

    loss: Tensor
    norm: Tensor
    finite: Tensor
    numbers: Tensor | None = None


class Sums(NamedTuple):
    """What a step's microbatches add up to, beside the parameters' .grad: sum of the losses [], number of targets [], and the
    numbers of the samples, if all microbatches have them."""

    loss: Tensor
    targets: Tensor
    numbers: Tensor | None


class LossScale:
    """fp16's factor on the loss (Micikevicius et al. 2018, arXiv:1710.03740), which keeps small gradients above fp16's smallest
    number: halved by a step that is not finite, doubled after `interval` finite ones in a row. All on the device.

    It multiplies the sum of the losses, not the mean, so it starts lower than is usual, by the number of targets.
    """

    def __init__(self, device: torch.device, start: float = 2.0**6, interval: int = 1000) -> None:
        self.scale = torch.full((1,), start, device=device)
        self.good = torch.zeros(1, device=device)  # finite steps since the last change
        self.interval = interval

    def update(self, finite: Tensor) -> None:
        """After a step; finite [1]."""
        good = (self.good + 1) * finite
        grown = good >= self.interval
        factor = torch.where(grown, 2.0, torch.where(finite > 0, 1.0, 0.5))
        self.scale.mul_(factor).clamp_(2.0**-14, 2.0**24)
        self.good.copy_(torch.where(grown, 0.0, good))


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


class _Site(NamedTuple):
    """One use of a parameter: the module it hangs on, its name there, its place among the step's parameters."""

    module: nn.Module
    name: str
    place: int


class Step:
    """One optimizer step of `model`, which has loss_sum(ids, targets, document_ids, position_ids) -> (sum, count).

    Calling it with the microbatches of a step and the learning rate updates the parameters in place. Gradients are those of the
    mean over all targets of the step, whatever the sizes of the microbatches: sums are accumulated, and the division by the count
    is part of the factor that the optimizer multiplies gradients with anyway. A step whose gradient is not finite changes nothing.
    """

    def __init__(
        self, model: nn.Module, optimizer: AdamW, dtype: torch.dtype = torch.float32, clip: float = 1.0, compile: bool = False,
        parallel: Parallel | None = None,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.clip, self.parallel = model, optimizer, clip, parallel or Parallel()
        if parallel is None:
            self.parallel.prepare(model, dtype)
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.params[0].device
        self._lr = torch.zeros(1, device=device)
        # sharded gradients lie among buffers that FSDP2 frees block by block: memory that is kept would be left in pieces
        self._memory = contextlib.nullcontext() if self.parallel.casts else backend.step_memory(device)
        self.copies = None if dtype == torch.float32 or self.parallel.casts else [p.detach().to(dtype) for p in self.params]
        self._dtype = dtype
        self.loss_scale = LossScale(device) if dtype == torch.float16 else None
        self._compiled = torch.compile(model.loss_sum) if compile else None  # type: ignore[call-overload, arg-type]
        self._entered = False
        optimizer.reserve()
        self._groups, self._frozen = self._sites()
        self.parallel.attach(self)

    def _sites(self) -> tuple[list[list[_Site]], list[tuple[nn.Module, str]]]:
        """The uses of trained parameters, those of one block together, and the uses of frozen ones. Embedding tables are left out:
        a few rows of them are read, so the fp32 parameter serves, and its gradient is that of no product."""
        place = {id(p): index for index, p in enumerate(self.params)}
        groups: dict[str, list[_Site]] = {}
        frozen = []
        for prefix, module in self.model.named_modules():
            if isinstance(module, nn.Embedding):
                continue
            number = re.search(r"\.\d+", prefix)
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) in place:
                    group = groups.setdefault(prefix[: number.end()] if number else prefix, [])
                    group.append(_Site(module, name, place[id(parameter)]))
                else:
                    frozen.append((module, name))
        return list(groups.values()), frozen

    def refresh(self) -> None:
        """Rewrites the working copies from the parameters, after something other than a step changed these."""
        if self.copies is not None:
            for copy, parameter in zip(self.copies, self.params, strict=True):
                copy.copy_(parameter.detach())

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the losses, number of targets) of one microbatch, in the working dtype."""
        function: Any = self._compiled or self.model.loss_sum
        with self._copies_in_place():
            loss, count = function(*batch.inputs)
        return loss, count

    @contextlib.contextmanager
    def _copies_in_place(self) -> Iterator[None]:
        """The model with the working copies where its parameters are, entered for autograd a block at a time: a block's gradients
        are fp32 before those of the next one exist. Inside itself it does nothing."""
        if self.copies is None or self._entered:
            yield
            return
        before = [(site.module, site.name, site.module._parameters[site.name]) for group in self._groups for site in group]
        before += [(module, name, module._parameters[name]) for module, name in self._frozen]
        self._entered = True
        try:
            for group in self._groups:
                copies = [self.copies[site.place] for site in group]
                entered = _Enter.apply(copies, *(self.params[site.place] for site in group))  # type: ignore[no-untyped-call]
                for site, tensor in zip(group, entered, strict=True):
                    site.module._parameters[site.name] = tensor
            for module, name in self._frozen:
                module._parameters[name] = module._parameters[name].detach().to(self._dtype)  # type: ignore[union-attr, assignment]
            yield
        finally:
            self._entered = False
            for module, name, parameter in before:
                module._parameters[name] = parameter

    def __call__(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """One update from at least one microbatch at the learning rate lr."""
        return self.apply(self.gradients(batches), lr)

    def gradients(self, batches: Iterable[Batch]) -> Sums:
        """Forward and backward over at least one microbatch. Nothing but .grad changes: where it raises, discard() undoes it."""
        total = count = None
        numbers: list[Tensor] | None = []
        with self._memory:
            for batch in self.parallel.exchanging(batches):
                with self._copies_in_place():  # around the backward pass too: checkpointed blocks compute again what they need
                    loss, targets = self.parallel.loss_sum(self, batch)
                    scaled = loss if self.loss_scale is None else loss * self.loss_scale.scale.view(())
                    scaled.backward()  # type: ignore[no-untyped-call]
                total = loss.detach() if total is None else total + loss.detach()
                count = targets if count is None else count + targets
                numbers = None if numbers is None or batch.numbers is None else [*numbers, batch.numbers]
            assert total is not None and count is not None, "a step needs a microbatch"
        return Sums(total, count, torch.cat(numbers) if numbers else None)

    def discard(self) -> None:
        """Forgets gradients that no step is made of."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def apply(self, sums: Sums, lr: float) -> StepResult:
        """The update from what gradients() left."""
        with self._memory:
            total, count = self.parallel.total(sums.loss, sums.targets)
            mean = count.clamp(min=1).float().reciprocal()
            norm, finite = self.parallel.grad_norm(self.params)
            factor = mean if self.loss_scale is None else mean / self.loss_scale.scale
            norm = norm * factor
            scale = factor * (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else factor.view(1)
            self.optimizer.update(self._lr.fill_(lr), scale, finite, self.copies)
            if self.loss_scale is not None:
                self.loss_scale.update(finite)
            self.discard()
            return StepResult((total * mean).view(()), norm.view(()), finite, sums.numbers)
