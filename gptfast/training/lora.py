"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen matrix W [in, out] with a trained low-rank addition,

    y = x W + b + s x A^T B^T

A [r, in] starts random, B [out, r] at zero, s = alpha / r. Files are peft's, adapter_config.json and adapter_model.safetensors,
with `fan_in_fan_out` because GPT-2 stores matrices as [in, out]. merge() adds s A^T B^T to W, after which the model is a plain one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import hub, ops
from gptfast.checkpoint import read_tensors, write_tensors
from gptfast.config import LoraConfig
from gptfast.errors import Error, LoadError, shown
from gptfast.layers import Conv1D, Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<place>.+?)\.(?:lora_(?P<matrix>[AB])\.)?weight")
# of peft's settings, those under which an adapter is more than A and B, and the values under which it is not
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "alpha_pattern": ({}, None), "rank_pattern": ({}, None),
    "lora_bias": (False, None), "use_qalora": (False, None), "trainable_token_indices": (None,), "megatron_config": (None,),
}  # fmt: skip


class LoraConv1D(Conv1D):
    """A Conv1D whose weight and bias are frozen, with an adapter."""

    def __init__(self, plain: Conv1D, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        inputs, outputs = plain.weight.shape
        self.weight, self.bias, self.scale = plain.weight, plain.bias, scale
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, device=plain.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=plain.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        low = ops.linear(ops.linear(x, self.lora_A), self.lora_B)
        return ops.linear(x, self.weight.t(), self.bias) + self.scale * low

    @torch.no_grad()
    def merged(self) -> Conv1D:
        """A plain Conv1D that computes the same."""
        plain = Conv1D(0, 0)
        addition = (self.lora_B.double() @ self.lora_A.double()).t() * self.scale
        plain.weight = nn.Parameter((self.weight.double() + addition).to(self.weight.dtype))
        plain.bias = nn.Parameter(self.bias.detach())
        return plain


def adapters(model: nn.Module) -> dict[str, LoraConv1D]:
    """The adapted matrices of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraConv1D)}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def apply(model: nn.Module, config: LoraConfig) -> None:
    """Freezes the model but for a classifier's head, and puts an adapter on every matrix that a target names (by the end of its
    name, as in peft). Raises gptfast.Error for a target that names no matrix."""
    matrices = {name: module for name, module in model.named_modules() if type(module) is Conv1D}
    chosen = set()
    for target in config.lora_targets:
        found = {name for name in matrices if f".{name}".endswith(f".{target}")}
        if not found:
            allowed = sorted({end for name in matrices for end in (name.split(".")[-1], ".".join(name.split(".")[-2:]))})
            raise Error(f"--lora-targets is {shown(target)}; allowed: {', '.join(allowed)}")
        chosen |= found
    if not chosen:
        raise Error("--lora-targets is empty; at least one matrix is needed")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "score.weight")
    for name in sorted(chosen):
        _replace(model, name, LoraConv1D(matrices[name], config.lora_rank, config.lora_alpha / config.lora_rank))


def merge(model: nn.Module) -> None:
    """Adds every adapter to its matrix and takes it away: a plain model is left, trainable as a whole."""
    for name, module in adapters(model).items():
        _replace(model, name, module.merged())
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in adapters(model).items():
        yield f"{_ROOT}{name}.lora_A.weight", module.lora_A
        yield f"{_ROOT}{name}.lora_B.weight", module.lora_B
    if isinstance(score := getattr(model, "score", None), Linear):
        yield f"{_ROOT}score.weight", score.weight


def save(model: nn.Module, folder: Path, config: LoraConfig, base: str) -> None:
    """Writes the adapters, and a classifier's head, as peft does; `base` is the model that they belong to. Raises gptfast.Error
    where the folder cannot be written."""
    classifies = hasattr(model, "score")
    with hub.Writer(folder) as writer:
        write_tensors(writer.path(WEIGHTS), dict(_tensors(model)))
        writer.json(CONFIG, {
            "peft_type": "LORA", "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM", "base_model_name_or_path": base,
            "inference_mode": True, "r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0,
            "target_modules": list(config.lora_targets), "modules_to_save": ["score"] if classifies else None,
            "fan_in_fan_out": True, "bias": "none", "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        })  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises gptfast.LoadError for an adapter that is more than LoRA's two matrices."""
    values = hub.read_json(folder / CONFIG)
    for name, plain in _PLAIN.items():
        if values.get(name, plain[0]) not in plain:
            found = f"{folder / CONFIG}: {name} is {shown(values[name])}"
            raise LoadError(f"{found}, which gptfast does not support; only {plain[0]!r} is")
    alpha = values.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise LoadError(f"{folder / CONFIG}: lora_alpha is {shown(alpha)}; a number is needed")
    return values


def load(model: nn.Module, folder: str | Path) -> None:
    """Puts the adapters in a folder, peft's or ours, onto a model, unmerged and frozen as apply() leaves it.

    Raises gptfast.LoadError where the folder holds another kind of adapter, or one of another model.
    """
    folder = Path(folder)
    values = read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        raise LoadError(f"{folder} has no {WEIGHTS}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None or (match["matrix"] is None and match["place"] != "score"):
            raise LoadError(f"{path}: {key} is neither an adapter's A or B nor a classifier's head")
        pairs.setdefault(match["place"], {})[match["matrix"] or "weight"] = tensor.float()
    parts = dict(model.named_modules())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for place, tensors in pairs.items():
        if place == "score":
            _load_head(parts.get("score"), tensors["weight"], path)
        else:
            _replace(model, place, _loaded(parts.get(place), place, tensors, values, path))


def _load_head(head: nn.Module | None, weight: Tensor, path: Path) -> None:
    if not isinstance(head, Linear) or head.weight.shape != weight.shape:
        raise LoadError(f"{path}: score.weight of shape {tuple(weight.shape)} belongs to no part of this model")
    head.weight = nn.Parameter(weight.to(head.weight.device))


@torch.no_grad()
def _loaded(plain: nn.Module | None, place: str, tensors: dict[str, Tensor], values: dict[str, Any], path: Path) -> LoraConv1D:
    if type(plain) is not Conv1D:
        raise LoadError(f"{path}: {place} is no matrix that an adapter can be put on here")
    if tensors.keys() != {"A", "B"}:
        raise LoadError(f"{path}: {place} has only one of lora_A and lora_B")
    a, b = tensors["A"], tensors["B"]
    rank = len(a)
    if a.shape != (rank, plain.weight.shape[0]) or b.shape != (plain.weight.shape[1], rank) or rank == 0:
        needed = f"[r, {plain.weight.shape[0]}] and [{plain.weight.shape[1]}, r]"
        raise LoadError(f"{path}: {place} has A {list(a.shape)} and B {list(b.shape)}; {needed} are needed")
    module = LoraConv1D(plain, rank, values["lora_alpha"] / (math.sqrt(rank) if values.get("use_rslora") else rank))
    module.lora_A.copy_(a)
    module.lora_B.copy_(b)
    return module


def export(folder: Path, out: Path) -> None:
    """Writes the model that an adapter's folder names (base_model_name_or_path) with the adapters merged, and its tokenizer, as a
    Hugging Face folder in fp32. Raises gptfast.LoadError where they do not fit it."""
    from gptfast import model as models
    from gptfast.tokenizer import GPT2Tokenizer

    values = read_config(folder)
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise LoadError(f"{folder / CONFIG} names no base_model_name_or_path")
    classifies = values.get("task_type") == "SEQ_CLS"
    cls: Any = models.GPT2ForSequenceClassification if classifies else models.GPT2LMHeadModel
    model = cls.from_pretrained(name, dtype=torch.float32)
    if classifies:
        rows = len(read_tensors(folder / WEIGHTS).get(f"{_ROOT}score.weight", model.score.weight))
        if rows != model.config.num_labels:
            model.score = Linear(model.config.n_embd, rows, bias=False)
            model.config.num_labels, model.config.id2label = rows, None
    load(model, folder)
    merge(model)
    tokenizer = GPT2Tokenizer.from_pretrained(name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
