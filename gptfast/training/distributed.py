"""Many processes on PyTorch's own engines: torchrun starts them, DDP or FSDP2 (`fully_shard`) exchanges gradients, gloo (CPUs) or
NCCL (GPUs) moves the bytes. Without torchrun all of this is one process and does nothing.

Rank r of R computes rows r B/R .. (r+1) B/R - 1 of every batch of B: neither the order of the data nor a batch depends on R. Losses
and counts of targets are added over the ranks and gradients are sums too, divided by the common count: a rank with fewer targets
weighs less, and the norm that clips is that of the whole gradient. A step whose gradient is not finite on one rank is so on all.

ddp: the whole model on every rank; gradients are added while the backward pass still runs, in a step's last microbatch alone.
fsdp: parameters, gradients and optimizer state are split by rows; a block's parameters are put together while it runs, in the
dtype of the computation (its own working copy). The optimizer's parameters are then this rank's rows, plain tensors on the same
memory, so that its kernels know nothing of all this.

A checkpoint is the same safetensors and JSON whatever wrote it, by checkpoint.py's protocol: rank 0 writes, sharded tensors are put
together one at a time while it does, and every rank reads its rows of the file. So any number of processes, one without torchrun
included, goes on from it, and one hash covers each file. torch.distributed.checkpoint's own storage keeps its metadata in a pickle,
which must not be read here, and its safetensors storage makes a file a rank that only it can join; its state_dict functions are
used where a whole model is handed out. OUT has to be one folder for all machines (shared).

Whoever fails first tells the others through torchrun's store, says why, and all end; collectives that lose a partner end a rank
silently. torchrun --max-restarts N starts all again, which go on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from gptfast import checkpoint
from gptfast.config import TrainConfig
from gptfast.errors import Error
from gptfast.layers import Block
from gptfast.training.loader import Batch
from gptfast.training.parallel import Fill, Parallel

if TYPE_CHECKING:
    from gptfast.training.step import Step

T = TypeVar("T")
_FAILED = "failed"  # in the store: "rank exit-code" of the first process that failed
_SIGNALS = signal.SIGTERM, signal.SIGINT  # what stops a run
_TEXT = 256  # bytes of a message between ranks
_LOST = ("gloo", "nccl", "connection closed", "connection reset")  # what a collective says whose partner is gone
_WAIT = 1.0  # seconds that the first one has to print why


class Group(Parallel):
    """What DDP and FSDP2 share: ranks that add up, agree and end together."""

    def __init__(self, device: torch.device, store: Any) -> None:
        super().__init__()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device, self.store = device, store

    def total(self, loss: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Added in float64: counts stay exact."""
        both = torch.stack([loss.double(), count.double()])
        dist.all_reduce(both)
        return both[0].to(loss.dtype), both[1].to(count.dtype)

    def seed(self, seed: int, step: int) -> None:
        """A function of seed, step and rank, so that no generator has to be saved for each rank."""
        torch.manual_seed((seed + 0x9E3779B9 * step + (self.rank << 48)) % 2**63)

    def agree(self, tokens: int, asked: int | None) -> tuple[int, int | None]:
        """One exchange between the hosts."""
        sums = torch.tensor([tokens, 0, 0])  # on the CPU, by gloo: the GPU's queue is not waited for
        if asked is not None:
            sums[1 + _SIGNALS.index(asked)] = 1
        dist.all_reduce(sums)
        total, *counts = sums.tolist()
        return total, next((number for number, count in zip(_SIGNALS, counts, strict=True) if count), None)

    def spread(self, work: Callable[[T], tuple[float, float]], items: list[T]) -> list[tuple[float, float]]:
        """Round robin."""
        results = torch.zeros(len(items), 2, dtype=torch.float64)
        for first in range(0, len(items), self.world):
            index = first + self.rank
            value = work(items[min(index, len(items) - 1)])  # FSDP2's ranks compute equally often: the last item more than once
            if index < len(items):
                results[index] = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(results)
        return [(first, second) for first, second in results.tolist()]

    def newest(self, run: Path) -> tuple[int, Path] | None:
        """Found by the main process."""
        found = checkpoint.newest(run) if self.main else None
        step = torch.tensor([-1 if found is None else found[0]])
        dist.broadcast(step, 0)
        return next(((number, path) for number, path in checkpoint.steps(run) if number == int(step)), None)

    def save(self, write: Callable[[Fill], Any], fill: Fill) -> None:
        """Ends on all ranks when the main process is done."""
        failure = None
        try:
            if self.main:
                write(fill)
        except OSError as error:
            failure = error
        self._listen(fill)
        reason = self._told("" if failure is None else failure.strerror or str(failure))
        if reason:
            raise failure or OSError(reason)

    def _listen(self, fill: Fill) -> None:
        """What ranks that write nothing do while the main process writes."""

    def _told(self, text: str) -> str:
        """The main process's text, on all ranks."""
        data = torch.zeros(_TEXT, dtype=torch.uint8)
        encoded = list(text.encode()[:_TEXT])
        data[: len(encoded)] = torch.tensor(encoded, dtype=torch.uint8)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).rstrip(b"\0").decode(errors="replace")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ranks after the first warn of nothing."""
        try:
            with warnings.catch_warnings():
                if not self.main:
                    warnings.simplefilter("ignore")
                yield
        except SystemExit:
            self._leave(stopped=True)
            raise
        except Exception as error:
            raise self._fail(error) from error
        self._leave()

    def _leave(self, stopped: bool = False) -> None:
        """No process ends before all are done; as soon as one ends with a code but 0, torchrun sends SIGTERM to the rest."""
        if stopped and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
        dist.destroy_process_group()

    def _fail(self, error: Exception) -> BaseException:
        """What to raise in place of `error`: the first process's own one, and a silent end in all others."""
        code, first = 2 if isinstance(error, Error) else 1, f"{self.rank}"
        with contextlib.suppress(RuntimeError, AttributeError):  # the store is gone with its process, or the group is not ours
            first, told = self.store.compare_set(_FAILED, "", f"{self.rank} {code}").decode().split()
            code = int(told)
        if int(first) != self.rank:
            time.sleep(_WAIT)
            return SystemExit(code)
        said = str(error)
        if isinstance(error, RuntimeError) and any(word in said.lower() for word in _LOST):
            return Error(f"rank {self.rank}: another process of this run ended without a word ({said.splitlines()[0]})")
        if self.rank and isinstance(error, Error):
            error.args = (f"rank {self.rank}: {said}",)
        return error


class _Forward(nn.Module):
    """What DDP wraps: the model, with the step's loss as its forward pass."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model, self.step = step.model, step

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> sum of the losses [], number of targets []."""
        return self.step.loss_sum(batch)


def _summed(bucket: Tensor) -> torch.futures.Future[Tensor]:
    """DDP's exchange of a bucket of gradients without its division by the number of ranks."""
    work: Any = dist.all_reduce(bucket, async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class DDP(Group):
    """The whole model on every rank (torch.nn.parallel.DistributedDataParallel)."""

    def attach(self, step: Step) -> None:
        """Wraps the step."""
        self.engine = nn.parallel.DistributedDataParallel(_Forward(step), gradient_as_bucket_view=True)
        self.engine.register_comm_hook(None, lambda state, bucket: _summed(bucket.buffer()))
        step.refresh()  # the parameters are rank 0's now

    def loss_sum(self, step: Step, batch: Batch) -> tuple[Tensor, Tensor]:
        """Through DDP."""
        loss, count = self.engine(batch)
        return loss, count

    def exchanging(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """All but the last without an exchange."""
        ahead = iter(batches)
        batch = next(ahead, None)
        while batch is not None:
            following = next(ahead, None)
            with contextlib.nullcontext() if following is None else self.engine.no_sync():
                yield batch
            batch = following


class FSDP(Group):
    """Parameters, gradients and optimizer state split by rows (torch.distributed.fsdp.fully_shard)."""

    casts = True

    def rows(self, config: TrainConfig) -> int:
        """Raises gptfast.Error for an optimizer that needs whole matrices."""
        if config.optimizer == "muon":
            raise Error("optimizer is muon, which needs whole matrices; allowed with --parallel fsdp: adamw")
        return super().rows(config)

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Shards the model in place; `parameters` are this rank's rows."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        whole = dict(model.named_parameters())
        with torch.no_grad():
            for parameter in whole.values():
                dist.broadcast(parameter, 0)
        if self.main:  # the model without its numbers, for plain()
            self._empty = copy.deepcopy(model, {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in whole.values()})
        # nothing is added to a block's output in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
        for module in [*(module for module in model.modules() if isinstance(module, Block)), model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gradients are sums; gloo has no other reduction
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "loss_sum")
        self._sharded: dict[str, Any] = dict(model.named_parameters())
        self.parameters = {name: p.to_local().detach().requires_grad_(p.requires_grad) for name, p in self._sharded.items()}
        return self.parameters

    def grad_norm(self, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """From every rank's rows, whose gradients it puts where the optimizer looks."""
        for name, sharded in self._sharded.items():
            if sharded.grad is not None:
                self.parameters[name].grad, sharded.grad = sharded.grad.to_local(), None
        norm, _ = super().grad_norm(params)
        square = norm.double().square()
        dist.all_reduce(square)
        norm = square.sqrt().to(norm.dtype)
        return norm, torch.isfinite(norm).to(norm.dtype)

    def save(self, write: Callable[[Fill], Any], fill: Fill) -> None:
        """Sharded tensors are gathered on the way."""
        self._gathered = self._before = 0

        def gathering(folder: checkpoint.Folder) -> None:
            folder.whole = self._gather
            fill(folder)

        super().save(write if not self.main else lambda _: write(gathering), fill)

    def _listen(self, fill: Fill) -> None:
        # the main process did this while it wrote, as far as it came: what it has not gathered the others still wait for
        self._gathered, self._before = 0, self._gathered
        fill(_Listener(self._gather))

    def _gather(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor):
            return tensor
        self._gathered += 1
        return tensor if self._gathered <= self._before else tensor.full_tensor()

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sharded tensors as DTensors, put together when it is their turn to be written."""
        from torch.distributed.tensor import DTensor

        made = {}
        for name, tensor in tensors.items():
            like = self._sharded.get(name if name in self._sharded else name.partition(".")[2])
            made[name] = tensor
            if like is not None and tensor.shape == like.to_local().shape:
                layout = {"run_check": False, "shape": like.shape, "stride": like.stride()}
                made[name] = DTensor.from_local(tensor.detach(), like.device_mesh, like.placements, **layout)
        return made

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows."""
        if tensor.shape != self._sharded[name].shape:
            return tensor  # a counter, or of another model
        pieces = tensor.chunk(self.world)
        return pieces[self.rank] if self.rank < len(pieces) else tensor[:0]

    def plain(self, model: Any) -> Any:
        """A copy with the whole parameters, on the CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.main:
            return None
        return copy.deepcopy(self._empty, {id(p): nn.Parameter(state[name]) for name, p in self._empty.named_parameters()})


class _Listener(checkpoint.Folder):
    """A save's folder on ranks that write nothing: it only takes part in putting tensors together."""

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__(Path())
        self.gather = gather

    def json(self, name: str, value: Any) -> None:
        """Nothing."""

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Gathers each one and forgets it."""
        for tensor in tensors.values():
            self.gather(tensor)


_store: Any = None


def processes() -> tuple[int, int]:
    """(rank, number) of this process among those that torchrun started; (0, 1) without it. Raises gptfast.Error where they do not
    make sense."""
    try:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    except ValueError:
        rank, world = -1, -1
    if not 0 <= rank < world:
        given = f"RANK is {os.environ.get('RANK')!r} and WORLD_SIZE {os.environ.get('WORLD_SIZE')!r}"
        raise Error(f"{given}; torchrun sets both, or unset them for one process")
    return rank, world


def start(config: TrainConfig) -> Parallel:
    """Joins the processes that torchrun started, once, and gives what config.parallel asks for. On GPUs each rank takes its own."""
    global _store
    _, world = processes()
    if world == 1:
        return Parallel()
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise Error(f"--nproc-per-node is more than {local}; this machine has {gpus} GPUs")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        _store, rank, world = next(rendezvous("env://"))
        # after a restart torchrun's store still holds what the dead processes said
        _store = PrefixStore(f"gptfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=_store, rank=rank, world_size=world)
    engine = {"ddp": DDP, "fsdp": FSDP}[config.parallel]
    return engine(torch.device("cuda" if on_gpu else "cpu"), _store)
