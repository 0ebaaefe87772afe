"""The ops: one file each, with its formula, its eager definition, its autograd glue and its front door."""

from gptfast.ops.adamw_ import adamw_
from gptfast.ops.add_layer_norm import add_layer_norm
from gptfast.ops.attention import attention
from gptfast.ops.cache_append_ import cache_append_
from gptfast.ops.cross_entropy import cross_entropy
from gptfast.ops.cross_entropy_ import cross_entropy_
from gptfast.ops.decode_attention import decode_attention
from gptfast.ops.dropout import dropout
from gptfast.ops.embedding import embedding
from gptfast.ops.gelu import gelu
from gptfast.ops.grad_norm import grad_norm
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.layer_norm_linear import layer_norm_linear
from gptfast.ops.linear import linear
from gptfast.ops.linear_add import linear_add
from gptfast.ops.linear_cross_entropy import linear_cross_entropy
from gptfast.ops.lm_head_sample import lm_head_sample
from gptfast.ops.pack_weight import pack_weight
from gptfast.ops.sample import sample
from gptfast.ops.transformer_block import transformer_block

__all__ = [
    "adamw_", "add_layer_norm", "attention", "cache_append_", "cross_entropy", "cross_entropy_", "decode_attention", "dropout",
    "embedding", "gelu", "grad_norm", "layer_norm", "layer_norm_linear", "linear", "linear_add", "linear_cross_entropy",
    "lm_head_sample", "pack_weight", "sample", "transformer_block",
]
