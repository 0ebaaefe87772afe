"""The parts of a GPT-2 block, and the block, written on gptfast.ops.

Parameter names and layouts are Hugging Face's: Conv1D matrices are [in, out]. Each block's residual addition is fused with the
layer norm that follows it, so blocks pass on a pair: the residual stream, and the last sublayer's output that is not yet added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPT2Config
from gptfast.forward import Pass


class Embedding(nn.Embedding):
    """A table of vectors [rows, C]; the model initialises it."""

    def reset_parameters(self) -> None:
        """Nothing: GPT2Model draws all weights."""


class Linear(nn.Linear):
    """x [..., in] -> [..., out] with a weight [out, in]; the model initialises it."""

    def reset_parameters(self) -> None:
        """Nothing: the model draws all weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """x [..., in] -> [..., out] with a weight [in, out], the layout of GPT-2's checkpoints."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.linear(x, self.weight.t(), self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, alone or after a residual addition."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def after_add(self, residual: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual + x, its layer norm); x None stands for 0. x may be of autocast's dtype, the sum is of the residual's."""
        if x is None:
            return residual, self(residual)
        return ops.add_layer_norm(residual, x.to(residual.dtype), self.weight, self.bias, self.eps)


class Dropout(nn.Module):
    """Dropout in training mode, with the noise of philox.py: a function of the seed [1] alone."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """x [..., C] -> [..., C]; unchanged in evaluation mode."""
        return x if seed is None or not self.training or self.p == 0 else ops.dropout(x, self.p, seed)


class Attention(nn.Module):
    """Causal self-attention over H heads."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.n_head
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.upcast = config.reorder_and_upcast_attn
        self.p = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """x [B, T, C] -> [B, T, C]; writes keys and values into the pass's cache, behind what is there."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads)
        if self.upcast:
            with torch.autocast(x.device.type, enabled=False):
                o = self._attend(qkv.float(), now).to(qkv.dtype)
        else:
            o = self._attend(qkv, now)
        y: Tensor = self.resid_dropout(self.c_proj(o.reshape(B, T, C)), now.seed(3 * self.layer + 2))
        return y

    def _attend(self, qkv: Tensor, now: Pass) -> Tensor:
        q, k, v = qkv.unbind(2)
        if now.cache is not None:
            now.cache.append_(self.layer, k, v)
            if not now.fresh:
                assert now.ends is not None
                keys, values = now.cache.keys[self.layer], now.cache.values[self.layer]
                o = ops.decode_attention(q.to(keys.dtype), keys, values, now.cache.block_table, now.ends, self.scale)
                return o.to(qkv.dtype)
        p = self.p if self.training and now.seeds is not None else 0.0
        return ops.attention(q, k, v, self.scale, now.document_ids, p, now.seed(3 * self.layer + 1) if p else None)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class MLP(nn.Module):
    """Two matrices with an activation between them; the first bias is added inside the activation's op where that is gelu."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, config.activation_function
        self.c_fc = Conv1D(config.n_embd, config.mlp_width)
        self.c_proj = Conv1D(config.mlp_width, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        if self.activation.startswith("gelu"):
            form = "none" if self.activation == "gelu" else "tanh"
            if type(self.c_fc) is Conv1D:
                x = ops.gelu(ops.linear(x, self.c_fc.weight.t()), self.c_fc.bias, form)
            else:  # an adapter, whose forward counts
                x = ops.gelu(self.c_fc(x), None, form)
        else:
            x = _PLAIN[self.activation](self.c_fc(x))
        y: Tensor = self.dropout(self.c_proj(x), now.seed(3 * self.layer + 3))
        return y


class Block(nn.Module):
    """Layer norm, attention, layer norm, MLP, with a residual stream around them."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config, layer)

    def forward(self, residual: Tensor, x: Tensor | None, now: Pass) -> tuple[Tensor, Tensor]:
        """(residual stream, output not yet added to it), each [B, T, C] -> the same pair one block later."""
        weights = self._weights() if now.cache is None else None
        if weights is not None:
            drops = self.training and now.seeds is not None
            site = 3 * self.attn.layer + 1
            return ops.transformer_block(
                residual, x, weights, self.attn.heads, self.attn.scale, self.ln_1.eps,
                "none" if self.mlp.activation == "gelu" else "tanh", now.document_ids, self.attn.p, self.mlp.dropout.p,
                now.seeds[site : site + 3] if drops and now.seeds is not None else None,
            )  # fmt: skip
        residual, y = self.ln_1.after_add(residual, x)
        residual, y = self.ln_2.after_add(residual, self.attn(y, now))
        return residual, self.mlp(y, now)


    def _weights(self) -> tuple[Tensor, ...] | None:
        """The parameters in the order of ops.transformer_block; None where the block is more than its ops: another activation,
        attention in fp32, or a part that was replaced (an adapter) or hooked."""
        attn, mlp = self.attn, self.mlp
        parts = self.ln_1, attn, attn.c_attn, attn.c_proj, attn.resid_dropout, self.ln_2, mlp, mlp.c_fc, mlp.c_proj, mlp.dropout
        if attn.upcast or not mlp.activation.startswith("gelu") or tuple(map(type, parts)) != _PARTS or any(map(hooked, parts)):
            return None
        modules = self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj
        return tuple(parameter for module in modules for parameter in (module.weight, module.bias))


_PARTS = (LayerNorm, Attention, Conv1D, Conv1D, Dropout, LayerNorm, MLP, Conv1D, Conv1D, Dropout)


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after the module, forward or backward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
