"""nanoGPT (github.com/karpathy/nanoGPT) as a peer, in three forms: its recipe written down here, its own model from a checkout, and
its train.py run as a command.

The recipe of one step: autocast around the forward pass where the dtype is bf16 (on a GPU nanoGPT does that itself; on a CPU its
train.py computes in fp32 whatever its dtype says), exact GELU, F.scaled_dot_product_attention, F.cross_entropy on all logits,
clip_grad_norm_, torch.optim.AdamW that is fused on a GPU only, zero_grad(set_to_none=True).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # [in, out] in GPT-2's checkpoints
WEIGHT_DECAY, CLIP = 0.1, 1.0


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)), p)


class MLP(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout if self.training else 0.0)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, dropout), MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 in plain PyTorch with nanoGPT's names of parameters and its forward pass; ids and targets [B, T] -> logits, loss."""

    def __init__(self, vocab: int, context: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        parts = {"wte": nn.Embedding(vocab, width), "wpe": nn.Embedding(context, width), "ln_f": nn.LayerNorm(width)}
        parts["h"] = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = parts["wte"].weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1]))
        x = F.dropout(x, self.dropout if self.training else 0.0)
        for block in parts["h"]:
            x = block(x)
        logits = self.lm_head(parts["ln_f"](x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)

    def configure_optimizers(self, weight_decay: float, lr: float, betas: tuple[float, float], device: str) -> torch.optim.AdamW:
        """As nanoGPT's: decay on matrices and embeddings; fused on a GPU only."""
        params = list(self.parameters())
        matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, **({"fused": True} if device == "cuda" else {}))


def from_checkout(folder: Path, vocab: int, context: int, layers: int, heads: int, width: int, dropout: float) -> nn.Module:
    """nanoGPT's own GPT, from its model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=context, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width, dropout=dropout, bias=True
    )
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = module.GPT(config)
    return model


@torch.no_grad()
def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a model of nanoGPT's shape the weights of a GPT-2 checkpoint, as nanoGPT's from_pretrained does."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name].t() if name.endswith(CONV1D) else state[name])


class Step:
    """One training step of nanoGPT's loop: ids and targets [B, T] -> loss, norm of the gradient before clipping."""

    backends = ""

    def __init__(self, model: Any, lr: float, betas: tuple[float, float], dtype: torch.dtype, compiled: bool) -> None:
        self.dtype, self.raw = dtype, model
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer = model.configure_optimizers(WEIGHT_DECAY, lr, betas, "cpu")
        self.model = torch.compile(model) if compiled else model

    def __call__(self, ids: Tensor, targets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            _, loss = self.model(ids, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


# ------------------------------------------------------------------------------------------------------------ its own program


class TrainScript:
    """nanoGPT's train.py on config/train_shakespeare_char.py, run as a command in a copy of the files that it reads.

    ids: the text as characters' numbers below `vocab`. `flags` are those of the command line, as in nanoGPT's README.
    """

    def __init__(self, checkout: Path, folder: Path, ids: Any, vocab: int, flags: Sequence[str]) -> None:
        self.folder, self.flags = folder, list(flags)
        (folder / "config").mkdir(parents=True)
        for name in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
            shutil.copyfile(checkout / name, folder / name)
        data = folder / "data/shakespeare_char"
        data.mkdir(parents=True)
        cut = len(ids) * 9 // 10
        np.asarray(ids[:cut], dtype=np.uint16).tofile(data / "train.bin")
        np.asarray(ids[cut:], dtype=np.uint16).tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab}))  # the only form in which train.py takes the vocabulary

    def command(self, iterations: int) -> list[str]:
        """The command line; one batch of evaluation at iteration 0, which train.py insists on, and none later."""
        program = ["python", "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"]
        measuring = [f"--max_iters={iterations}", "--eval_iters=1", "--eval_interval=1000000000", "--log_interval=1"]
        return [*program, *self.flags, *measuring]

    def run(self, iterations: int, skip: int) -> tuple[list[float], list[float]]:
        """Seconds an iteration as train.py prints them, without the first `skip`, and all losses."""
        command = [sys.executable, *self.command(iterations)[1:]]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        found = list(_iterations(done.stdout))
        if done.returncode or len(found) <= skip + 1:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        assert all(math.isfinite(loss) for loss, _ in found)
        return [seconds for _, seconds in found[skip:]], [loss for loss, _ in found]


def _iterations(text: str) -> Iterator[tuple[float, float]]:
    for match in re.finditer(r"^iter \d+: loss ([\d.naif]+), time ([\d.]+)ms", text, re.MULTILINE):
        yield float(match[1]), float(match[2]) / 1e3
