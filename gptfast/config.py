"""The dataclasses that are the one source of CLI flags, YAML keys, help texts and of what a checkpoint records.

A field declared with `option(default, "help")` becomes a flag of the commands that take its class (gptfast/options.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gptfast.errors import Error


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with a help text; `more` goes into the metadata (choices=(...), low=..., high=...)."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass
class GPT2Config:
    """Architecture of a GPT-2-family model, with Hugging Face's names and defaults (the defaults are GPT-2 124M).

    Raises gptfast.Error where a value makes no model.
    """

    vocab_size: int = option(50257, "number of token ids")
    n_positions: int = option(1024, "longest context in tokens")
    n_embd: int = option(768, "width of the residual stream")
    n_layer: int = option(12, "number of blocks")
    n_head: int = option(12, "attention heads; divides n_embd")
    n_inner: int | None = option(None, "width of the MLP (default: 4 n_embd)")
    activation_function: str = option("gelu_new", "MLP activation", choices=("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "tanh"))
    resid_pdrop: float = option(0.1, "dropout on each block's two outputs")
    embd_pdrop: float = option(0.1, "dropout on the embeddings")
    attn_pdrop: float = option(0.1, "dropout on the attention weights")
    layer_norm_epsilon: float = option(1e-5, "epsilon of every layer norm")
    initializer_range: float = option(0.02, "standard deviation of initial weights")
    scale_attn_weights: bool = option(True, "divide attention scores by sqrt(head size)")
    scale_attn_by_inverse_layer_idx: bool = option(False, "divide attention scores by the block's number, counted from 1")
    reorder_and_upcast_attn: bool = option(False, "attention scores in fp32 whatever the dtype")
    tie_word_embeddings: bool = option(True, "the head's matrix is the token embedding")
    use_cache: bool = option(True, "return past_key_values")
    bos_token_id: int | None = option(50256, "id that starts a text")
    eos_token_id: int | None = option(50256, "id that ends a text")
    pad_token_id: int | None = option(None, "id of padding")
    num_labels: int = option(2, "classes of the classification head")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31:
                raise Error(f"config: {name} is {value!r}; a whole number of at least 1 is needed")
        if self.n_embd % self.n_head:
            raise Error(f"config: n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
