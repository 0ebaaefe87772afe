"""The forwards that patch() gives to the modules of transformers' GPT-2: the same mathematics on gptfast.ops.

Each forward belongs to a subclass of transformers' class with the same name, so that copies, hooks, gradient checkpointing and
isinstance go on working; where a fused op cannot do what is asked, the forward of the class itself runs (on submodules that are
fused all the same) and the reason is counted. What a padded position gets is transformers' too: attention to the real tokens before
it, which no op here computes, so those few rows are computed by transformers' own function.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptfast.backend as backend
from gptfast import ops
from gptfast.layers import hooked

_FUSED_ATTENTION = ("eager", "sdpa")  # values of attn_implementation whose masks are read here


class Padding(NamedTuple):
    """What a 4-D mask says, if it is causal with padding: document ids [B, T] for ops.attention (None: no padding), and the indices
    [R] of the rows in which some sequence is padded and its result is not 0."""

    ids: Tensor | None = None
    rows: Tensor | None = None


class Report:
    """What a patched model did: `calls` of each op, `fallbacks` by reason, `skipped` modules that something else had replaced."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.skipped: list[str] = []
        self._mask: weakref.ref[Tensor] | None = None
        self._padding: Padding | str = Padding()

    def __str__(self) -> str:
        backends = {row["op"]: row["choice"] for row in backend.table()}
        lines = [f"{name} x {count} ({backends[name]})" for name, count in sorted(self.calls.items())]
        lines += [f"left to transformers x {count}: {reason}" for reason, count in sorted(self.fallbacks.items())]
        return "\n".join([*lines, *(f"not patched: {module}" for module in self.skipped)]) or "no op was called yet"

    def op(self, name: str, *arguments: Any) -> Any:
        """Calls gptfast.ops.<name> and counts it; a compiled graph, which would count once, does not."""
        if not torch.compiler.is_compiling():
            self.calls[name] += 1
        return getattr(ops, name)(*arguments)

    def fall_back(self, reason: str) -> None:
        """Counts what is left to transformers."""
        if not torch.compiler.is_compiling():
            self.fallbacks[reason] += 1

    def padding(self, mask: Any, length: int, zero_rows: bool) -> Padding | str:
        """The padding in the mask of this pass, which all blocks share, or why it cannot be read."""
        if mask is None:
            return Padding()
        if self._mask is None or self._mask() is not mask:
            self._padding = read_mask(mask, length, zero_rows)
            self._mask = weakref.ref(mask)
        return self._padding


def read_mask(mask: Any, length: int, zero_rows: bool) -> Padding | str:
    """mask [B, 1, T, T], bool (True is visible) or additive -> its padding, or why it is another mask than causal with padding.

    zero_rows: a row that sees nothing gives 0, as PyTorch's attention with a bool mask has it; else it has to be computed.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (length, length):
        return "an attention mask of another shape"
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    if mask.dtype != torch.bool and not bool((visible | (mask[:, 0] <= torch.finfo(mask.dtype).min)).all()):
        return "an attention mask that adds to the scores"
    real = visible[:, -1]  # the last token sees every real one
    if not torch.equal(visible, real[:, None] & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()):
        return "an attention mask that is more than causal with padding"
    if bool(real.all()):
        return Padding()
    own = ~real & (real.cumsum(1) > 0) if zero_rows else ~real
    rows = own.any(0).nonzero().view(-1)
    if 2 * len(rows) > length:
        return "padding in most rows"
    return Padding(torch.where(real, 0, -1), rows if len(rows) else None)


def _fused(*modules: nn.Module) -> bool:
    """Whether these are patched modules whose own forward is all that happens: no adapter around them, no hook on them."""
    return all("_gptfast" in vars(module) and "forward" not in vars(module) and not hooked(module) for module in modules)


def _seeds(count: int, device: torch.device) -> Tensor:
    """Seeds [count] for dropouts, from torch's CPU generator, so that torch.manual_seed and checkpointing decide them."""
    return torch.randint(-(2**63), 2**63 - 1, (count,)).to(device)


# --------------------------------------------------------------------------------------------------------------- simple modules


def conv1d(self: Any, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out]; the weight is [in, out]."""
    return self._gptfast.op("linear", x, self.weight.t(), self.bias)  # type: ignore[no-any-return]


def linear(self: Any, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out]; the weight is [out, in]."""
    return self._gptfast.op("linear", x, self.weight, self.bias)  # type: ignore[no-any-return]


def layer_norm(self: Any, x: Tensor) -> Tensor:
    """x [..., C] -> [..., C]."""
    return self._gptfast.op("layer_norm", x, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]


def dropout(self: Any, x: Tensor) -> Tensor:
    """x [..., C] -> [..., C]: torch.nn.Dropout's rule with the noise of philox.py, a seed a call."""
    if not self.training or self.p == 0:
        return x
    return self._gptfast.op("dropout", x, self.p, _seeds(1, x.device))  # type: ignore[no-any-return]


def mlp(self: Any, hidden_states: Tensor) -> Tensor:
    """[B, T, C] -> [B, T, C]; the first bias is added inside the activation's op where that is a gelu."""
    form = self._gptfast_gelu.get(type(self.act))
    if form is None or not _fused(self.c_fc):
        self._gptfast.fall_back(f"activation {type(self.act).__name__}" if form is None else "an MLP with an adapter or a hook")
        return self._gptfast_base.forward(self, hidden_states)  # type: ignore[no-any-return]
    x = self._gptfast.op("linear", hidden_states, self.c_fc.weight.t())
    return self.dropout(self.c_proj(self._gptfast.op("gelu", x, self.c_fc.bias, form)))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------------- attention


def _other_attention(self: Any, encoder_hidden_states: Any, past: Any, extra: dict[str, Any]) -> str | None:
    """Why this call is no causal self-attention over its own tokens that ops.attention could compute; None if it is."""
    implementation = self.config._attn_implementation
    if encoder_hidden_states is not None or not self.is_causal or extra.get("is_causal") is False:
        return "attention that is not causal self-attention"
    if not getattr(self.config, "is_causal", True):
        return "attention that is not causal self-attention"
    if implementation not in _FUSED_ATTENTION:
        return f"attn_implementation {implementation}"
    if implementation == "eager" and self._gptfast_wants_weights():
        return "output_attentions, which needs the weights"
    if past is not None and type(past).__name__ != "DynamicCache":
        return f"a cache that is a {type(past).__name__}"
    return None


def attention(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    **extra: Any,
) -> tuple[Tensor, None] | Any:
    """[B, T, C] -> ([B, T, C], None), keys and values appended to the cache."""
    report, length = self._gptfast, hidden_states.shape[1]
    padding: Padding | str = Padding()
    reason = _other_attention(self, encoder_hidden_states, past_key_values, extra)
    if reason is None and past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0:
        reason = "attention to transformers' cache"
    if reason is None and attention_mask is not None and torch.compiler.is_compiling():
        reason = "an attention mask while compiling"
    if reason is None:
        padding = report.padding(attention_mask, length, self.config._attn_implementation != "eager")
        reason = padding if isinstance(padding, str) else None
    if reason is not None or isinstance(padding, str):
        report.fall_back(str(reason))
        return self._gptfast_base.forward(
            self, hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask, **extra
        )
    qkv = self.c_attn(hidden_states).view(*hidden_states.shape[:2], 3, self.num_heads, self.head_dim)
    if past_key_values is not None:
        past_key_values.update(*(qkv[:, :, part].transpose(1, 2) for part in (1, 2)), self.layer_idx)
    o = _attend(self, qkv, padding, attention_mask)
    return self.resid_dropout(self.c_proj(o.reshape(*hidden_states.shape[:2], -1))), None


def _attend(self: Any, qkv: Tensor, padding: Padding, mask: Tensor | None) -> Tensor:
    """qkv [B, T, 3, H, D] -> [B, T, H, D]."""
    p = self.attn_dropout.p if self.training else 0.0
    seed = _seeds(1, qkv.device) if p else None
    statics = None, None, self.scaling, padding.ids, p, seed
    if self.reorder_and_upcast_attn and self.config._attn_implementation == "eager":
        with torch.autocast(qkv.device.type, enabled=False):
            o = self._gptfast.op("attention", qkv.float(), *statics).to(qkv.dtype)
    else:
        o = self._gptfast.op("attention", qkv, *statics)
    if padding.rows is None or padding.ids is None or mask is None:
        return o  # type: ignore[no-any-return]
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    others = self._gptfast_attention(q[:, :, padding.rows], k, v, mask[:, :, padding.rows], dropout=p, scaling=self.scaling)[0]
    whole = torch.zeros_like(o).index_copy(1, padding.rows, others.to(o.dtype))
    return torch.where((padding.ids < 0)[:, :, None, None], whole, o)


# ------------------------------------------------------------------------------------------------------------------------ block


def block(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    use_cache: bool | None = False,
    **extra: Any,
) -> Tensor:
    """[B, T, C] -> [B, T, C]: as one op where nothing is in the way, as four where a few tokens follow a cache, else op by op with
    the first residual addition inside the second layer norm."""
    report, attn = self._gptfast, self.attn
    if encoder_hidden_states is not None or not _fused(self.ln_2):
        report.fall_back("a block with cross-attention" if encoder_hidden_states is not None else "a block with a hook inside")
        return self._gptfast_base.forward(  # type: ignore[no-any-return]
            self, hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask, use_cache, **extra
        )
    if _whole(self, past_key_values, extra):
        weights = _weights(self)
        if past_key_values is None and attention_mask is None and not torch.is_autocast_enabled(hidden_states.device.type):
            drops = self.training and max(attn.attn_dropout.p, self.mlp.dropout.p) > 0
            total, out = report.op(
                "transformer_block", hidden_states, None, weights, attn.num_heads, attn.scaling, self.ln_1.eps,
                self._gptfast_gelu[type(self.mlp.act)], None, attn.attn_dropout.p, self.mlp.dropout.p,
                _seeds(3, hidden_states.device) if drops else None,
            )  # fmt: skip
            return total + out  # type: ignore[no-any-return]
        if _decodes(self, hidden_states, past_key_values, attention_mask):
            return _decode(self, hidden_states, past_key_values, attention_mask, weights)
    y = attn(
        self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache, **extra
    )[0]
    total, y = report.op("add_layer_norm", hidden_states, y, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
    return total + self.mlp(y)  # type: ignore[no-any-return]


def _whole(self: Any, past: Any, extra: dict[str, Any]) -> bool:
    """Whether the block is just its parts, none of them adapted, hooked or of another activation or attention."""
    attn, mlp = self.attn, self.mlp
    parts = self.ln_1, attn, attn.c_attn, attn.c_proj, attn.resid_dropout, self.ln_2, mlp, mlp.c_fc, mlp.c_proj, mlp.dropout
    upcast = attn.reorder_and_upcast_attn and attn.config._attn_implementation == "eager"
    gelu = type(mlp.act) in self._gptfast_gelu and not hooked(mlp.act) and attn.resid_dropout.p == mlp.dropout.p
    return gelu and not upcast and _fused(*parts) and _other_attention(attn, None, past, extra) is None


def _weights(self: Any) -> tuple[Tensor, ...]:
    """The parameters in the order of ops.transformer_block."""
    modules = self.ln_1, self.attn.c_attn, self.attn.c_proj, self.ln_2, self.mlp.c_fc, self.mlp.c_proj
    return tuple(parameter for module in modules for parameter in (module.weight, module.bias))


def _decodes(self: Any, x: Tensor, past: Any, mask: Any) -> bool:
    """Whether these are a few tokens behind a cache, without gradients: what the fused decode steps are for."""
    few = not torch.is_grad_enabled() and not self.training and 0 < x.shape[0] * x.shape[1] <= 32
    kept = past is not None and past.get_seq_length(self.attn.layer_idx) > 0
    plain = x.shape[1] == 1 if mask is None else isinstance(mask, Tensor) and mask.dim() == 4
    return few and kept and plain and not torch.is_autocast_enabled(x.device.type)


def _decode(self: Any, x: Tensor, past: Any, mask: Tensor | None, weights: tuple[Tensor, ...]) -> Tensor:
    report, attn = self._gptfast, self.attn
    w1, b1, w_qkv, b_qkv, w_o, b_o, w2, b2, w_fc, b_fc, w_proj, b_proj = weights
    qkv = report.op("layer_norm_linear", x, w1, b1, w_qkv.t(), b_qkv, "none", self.ln_1.eps)
    q, k, v = (t.transpose(1, 2) for t in qkv.view(*x.shape[:2], 3, attn.num_heads, attn.head_dim).unbind(2))
    k, v = past.update(k, v, attn.layer_idx)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scaling).transpose(1, 2).reshape(x.shape)
    x = report.op("linear_add", o, w_o.t(), b_o, x)
    act = "gelu" if self._gptfast_gelu[type(self.mlp.act)] == "none" else "gelu_tanh"
    y = report.op("layer_norm_linear", x, w2, b2, w_fc.t(), b_fc, act, self.ln_2.eps)
    return report.op("linear_add", y, w_proj.t(), b_proj, x)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------------ loss and head


def causal_loss(
    report: Report, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100,
    shift_labels: Tensor | None = None, **extra: Any,
) -> Tensor:  # fmt: skip
    """transformers' loss of a causal model in fp32, with its arguments: the mean, or the sum over num_items_in_batch."""
    targets = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = report.op("cross_entropy", logits.view(-1, vocab_size), targets, ignore_index, None, reduction).float()
    return divided(loss, num_items_in_batch)


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [..., T] -> what each position has to predict, [..., T]."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()


def divided(loss: Tensor, count: Any) -> Tensor:
    """loss / count, a number or a tensor on any device; None: as it is."""
    return loss if count is None else loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def loss_alone(
    self: Any, input_ids: Any = None, past_key_values: Any = None, attention_mask: Any = None, token_type_ids: Any = None,
    position_ids: Any = None, inputs_embeds: Any = None, encoder_hidden_states: Any = None, encoder_attention_mask: Any = None,
    labels: Any = None, use_cache: bool | None = None, logits_to_keep: Any = 0, return_dict: bool | None = None, **extra: Any,
) -> Any:  # fmt: skip
    """GPT2LMHeadModel's forward, without logits in a training step that has labels: the head and its loss are one op there."""
    inputs = {
        "past_key_values": past_key_values, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
        "position_ids": position_ids, "inputs_embeds": inputs_embeds, "encoder_hidden_states": encoder_hidden_states,
        "encoder_attention_mask": encoder_attention_mask, "use_cache": use_cache, **extra,
    }  # fmt: skip
    plain = _fused(self.lm_head) and self.lm_head.bias is None and "_loss_function" in vars(self)
    if labels is None or not plain or not (self.training and torch.is_grad_enabled()):
        inputs |= {"labels": labels, "logits_to_keep": logits_to_keep, "return_dict": return_dict}
        return self._gptfast_base.forward(self, input_ids, **inputs)
    hidden = self.transformer(input_ids, **inputs)
    last, count, ignore_index = hidden.last_hidden_state, extra.get("num_items_in_batch"), extra.get("ignore_index", -100)
    targets = shifted(labels, ignore_index) if extra.get("shift_labels") is None else extra["shift_labels"]
    reduction = "mean" if count is None else "sum"
    head = self.lm_head.weight
    loss = self._gptfast.op("linear_cross_entropy", last, head, targets.to(last.device), ignore_index, None, None, reduction)
    output = self._gptfast_output(
        loss=divided(loss.float(), count), past_key_values=hidden.past_key_values, hidden_states=hidden.hidden_states,
        attentions=hidden.attentions,
    )  # fmt: skip
    return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
