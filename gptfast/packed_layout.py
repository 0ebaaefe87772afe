"""Where each tensor of a model lies in a packed payload, in which format and size: arithmetic on a config, no file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptfast.config import GPT2Config
from gptfast.packing import packed_bytes

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `format` of its buffer, `shape` [outputs, inputs] of a matrix or [...] of a plain fp32 tensor."""

    format: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": self.format, "shape": list(self.shape), "offset": self.offset, "bytes": self.bytes}


def is_by_rows(name: str) -> bool:
    """Whether Hugging Face stores a matrix [outputs, inputs]; those of the blocks are [inputs, outputs]."""
    return name in ("transformer.wte.weight", "lm_head.weight")


def is_matrix(name: str) -> bool:
    """Whether a parameter is packed; all others are plain fp32 tensors."""
    return is_by_rows(name) or name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the language model, matrices as [outputs, inputs]; no rows that only pad the vocabulary."""
    c, inner, vocabulary = config.n_embd, config.mlp_width, config.real_vocabulary
    found: dict[str, tuple[int, ...]] = {"transformer.wpe.weight": (config.n_positions, c)}
    if not config.tie_word_embeddings:
        found["transformer.wte.weight"] = (vocabulary, c)
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (c,), "ln_1.bias": (c,), "attn.c_attn.weight": (3 * c, c), "attn.c_attn.bias": (3 * c,),
        "attn.c_proj.weight": (c, c), "attn.c_proj.bias": (c,), "ln_2.weight": (c,), "ln_2.bias": (c,),
        "mlp.c_fc.weight": (inner, c), "mlp.c_fc.bias": (inner,), "mlp.c_proj.weight": (c, inner), "mlp.c_proj.bias": (c,),
    }  # fmt: skip
    for layer in range(config.n_layer):
        found |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    found |= {"transformer.ln_f.weight": (c,), "transformer.ln_f.bias": (c,)}
    found["transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"] = (vocabulary, c)
    return found


def layout(config: GPT2Config, dtype: str) -> dict[str, Entry]:
    """Where every tensor of a model lies in the payload. In int4 the embeddings, and so the head, are int8."""
    entries, offset = {}, 0
    for name, shape in shapes(config).items():
        format = "fp32" if not is_matrix(name) else "int8" if dtype == "int4" and is_by_rows(name) else dtype
        size = packed_bytes(format, shape[0], shape[1]) if is_matrix(name) else 4 * math.prod(shape)
        entries[name] = Entry(format, shape, offset, size)
        offset += aligned(size, ALIGNMENT)
    return entries


def token_bytes(config: GPT2Config, dtype: str) -> int:
    """Bytes of weights that one token reads: every tensor but the tables of which it takes one row."""
    looked_up = {"transformer.wpe.weight"} | (set() if config.tie_word_embeddings else {"transformer.wte.weight"})
    return sum(entry.bytes for name, entry in layout(config, dtype).items() if name not in looked_up)


def aligned(size: int, unit: int) -> int:
    """size rounded up to a multiple of unit."""
    return -(-size // unit) * unit


def end(entries: Mapping[str, Entry]) -> int:
    """Where the last tensor ends."""
    last = list(entries.values())[-1]
    return aligned(last.offset + last.bytes, ALIGNMENT)
