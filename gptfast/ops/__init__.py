"""The ops: one file each, with its formula, its eager definition, its autograd glue and its front door."""

from gptfast.ops.layer_norm import layer_norm

__all__ = ["layer_norm"]
