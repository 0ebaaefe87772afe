"""patch(model): gptfast's ops in an existing GPT-2 of Hugging Face's transformers, in one line, and undone in one line.

    from gptfast.integrations.transformers import patch, unpatch

    report = patch(model)      # GPT2LMHeadModel, GPT2ForSequenceClassification or another of its GPT-2 models
    ...                        # model(...), model.generate(...), transformers' Trainer: as before, faster
    print(report)              # which ops ran how often, and what was left to transformers, with the reasons
    unpatch(model)

Weights, config, names, tied parameters and the objects themselves stay what they are; only the class of each module is replaced by
a subclass of it. Outputs, loss and gradients are those of the unpatched model within rounding; dropout has the same probabilities
and other noise (a function of seeds drawn from torch's generator, see gptfast/philox.py).
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from gptfast.errors import Error
from gptfast.integrations import _gpt2
from gptfast.integrations._gpt2 import Report

__all__ = ["Report", "patch", "unpatch"]


def patch(model: Any, logits: bool = True) -> Report:
    """Puts fused ops into a transformers GPT-2 model, in place; returns the report that counts what they do.

    logits False: a GPT2LMHeadModel's training step that has labels returns no logits (they are never made, which saves memory);
    evaluation, generate and calls without labels return them as before. Raises gptfast.Error for a model that is no GPT-2 of
    transformers, for one that is patched already, and for logits=False with another model than GPT2LMHeadModel.
    """
    gpt2 = _modelling()
    if not isinstance(model, gpt2.GPT2PreTrainedModel):
        raise Error(f"patch: the model is a {type(model).__name__}; needed is a GPT-2 model of transformers")
    if any("_gptfast" in vars(module) for module in model.modules()):
        raise Error("patch: the model is patched already; unpatch(model) first")
    if not logits and type(model) is not gpt2.GPT2LMHeadModel:
        raise Error(f"patch: logits=False is for GPT2LMHeadModel, whose loss needs none; this is a {type(model).__name__}")
    report, fused = Report(), _classes()
    if type(model) is gpt2.GPT2LMHeadModel and model.loss_function is _default_loss():
        vars(model)["_loss_function"] = functools.partial(_gpt2.causal_loss, report)
    for name, module in model.named_modules():
        if type(module) not in fused or (module is model and logits):
            continue
        if "forward" in vars(module):
            report.skipped.append(f"{name or type(module).__name__}: something else has replaced its forward")
            continue
        if type(module) is gpt2.GPT2Attention and module.is_cross_attention:
            continue
        module.__class__ = fused[type(module)]
        vars(module)["_gptfast"] = report
    return report


def unpatch(model: Any) -> None:
    """Undoes patch(): every module is of its class again, nothing that patch() added is left. Raises gptfast.Error where the model
    is not patched or, before anything is changed, where another library has since wrapped a module's class."""
    patched = [(name, module) for name, module in model.named_modules() if "_gptfast" in vars(module)]
    if not patched:
        raise Error("unpatch: the model is not patched")
    bases = {fused: base for base, fused in _classes().items()}
    for name, module in patched:
        if type(module) not in bases:
            raise Error(f"unpatch: {name or 'the model'} is now a {type(module)}; undo first what came after patch()")
    for _, module in patched:
        module.__class__ = bases[type(module)]
        del module._gptfast
    loss = vars(model).get("_loss_function")
    if isinstance(loss, functools.partial) and loss.func is _gpt2.causal_loss:
        del model._loss_function


def _modelling() -> Any:
    try:
        from transformers.models.gpt2 import modeling_gpt2
    except ImportError as error:
        raise Error(f"patch: transformers' GPT-2 cannot be imported ({error}); pip install 'transformers>=5.3'") from None
    return modeling_gpt2


def _default_loss() -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


@functools.cache
def _classes() -> dict[type, type]:
    """Each class of transformers and PyTorch that has a fused forward, and its subclass of the same name with that forward."""
    from transformers import activations
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
    from transformers.pytorch_utils import Conv1D

    gpt2 = _modelling()
    forwards = {
        gpt2.GPT2Block: _gpt2.block, gpt2.GPT2Attention: _gpt2.attention, gpt2.GPT2MLP: _gpt2.mlp, Conv1D: _gpt2.conv1d,
        nn.LayerNorm: _gpt2.layer_norm, nn.Linear: _gpt2.linear, nn.Dropout: _gpt2.dropout,
        gpt2.GPT2LMHeadModel: _gpt2.loss_alone,
    }  # fmt: skip
    exact, tanh = ["GELUActivation"], ["NewGELUActivation", "GELUTanh", "FastGELUActivation"]
    gelu = {getattr(activations, name): form for names, form in ((exact, "none"), (tanh, "tanh")) for name in names}
    shared = {
        "_gptfast_gelu": gelu,
        "_gptfast_attention": _attention,
        "_gptfast_wants_weights": staticmethod(_wants_weights),
        "_gptfast_output": CausalLMOutputWithCrossAttentions,
    }
    return {
        base: type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "_gptfast_base": base, **shared})
        for base, forward in forwards.items()
    }


def _attention(self: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float, scaling: float) -> Any:
    """transformers' own attention of a GPT2Attention: ([B, T, H, D], weights or None)."""
    gpt2, implementation = _modelling(), self.config._attn_implementation
    if implementation == "eager" and self.reorder_and_upcast_attn:
        return self._upcast_and_reordered_attn(q, k, v, mask)
    function = gpt2.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, gpt2.eager_attention_forward)
    return function(self, q, k, v, mask, dropout=dropout, scaling=scaling)


def _wants_weights() -> bool:
    """Whether the pass that runs now collects attention weights; where transformers does not say, it may."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return True
    collector: Any = _active_collector
    wanted = collector.get()
    return wanted is not None and "attentions" in wanted
