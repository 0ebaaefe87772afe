"""The C++ engine under test: small models of every shape, sequences driven through a runner as a scheduler would, the definition
of a whole model with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import packed, packing
from gptfast.config import GPT2Config
from gptfast.generation.cpp import CppRunner
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.rows import Drawn, Row
from gptfast.generation.runner import Batch, Runner
from gptfast.model import GPT2LMHeadModel

ISAS = ("plain", "avx2", "avx512")
FORMATS = ("fp32", "bf16", "int8", "int4")
CONFIGS: dict[str, dict[str, Any]] = {
    "heads-of-32": {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 1031},
    "odd": {"n_embd": 60, "n_head": 3, "n_layer": 3, "n_inner": 100, "vocab_size": 337, "activation_function": "gelu"},
    "untied": {
        "n_embd": 96, "n_head": 4, "n_inner": 70, "vocab_size": 513, "tie_word_embeddings": False, "activation_function": "relu",
    },
    "scaled": {"n_embd": 40, "n_head": 5, "vocab_size": 97, "scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"},
    "unscaled": {"n_embd": 36, "n_head": 1, "vocab_size": 1, "scale_attn_weights": False, "activation_function": "tanh"},
    "one-head": {"n_embd": 64, "n_head": 1, "n_layer": 1, "vocab_size": 600, "activation_function": "gelu_pytorch_tanh"},
}  # fmt: skip


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


@cache
def model_of(name: str, context: int = 200) -> GPT2LMHeadModel:
    """Random weights of a size at which every part matters; sharp enough that draws differ."""
    config = GPT2Config(**{"n_positions": context, "n_layer": 2, **CONFIGS[name]})
    generator = torch.Generator().manual_seed(len(name))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.15 if parameter.dim() == 2 else 0.2
            one = float("ln" in key and key.endswith("weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + one)
    return model


@cache
def packed_of(name: str, format: str) -> packed.Packed:
    """model_of(name) in one of FORMATS."""
    return packed.pack(model_of(name), format)


def runner_of(name: str, format: str = "fp32", threads: int = 1, pages: int = 200) -> CppRunner:
    """A new engine on packed_of(name, format)."""
    return CppRunner(packed_of(name, format), threads, pages)


def row_of(prompt: Sequence[int], i: int = 0, **params: Any) -> Row:
    """One answer of up to 150 tokens; settings change with i, which is its seed."""
    filters = {"temperature": (0.0, 0.9, 1.0)[i % 3], "top_k": (0, 20)[i % 2], "top_p": (1.0, 0.9, 0.5)[i % 3]}
    chosen: dict[str, Any] = {**filters, "logprobs": 3, **params}
    return Row(prompt=prompt, params=SamplingParams(**chosen), seed=i, limit=150, stop_ids=frozenset(), start=len(prompt))


def prompts_of(vocab: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random ids, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


class Driver:
    """Drives rows through a runner as a scheduler would; each has `width` pages."""

    def __init__(self, runner: Any, prompts: Sequence[list[int]], width: int = 3, first: int = 0, **params: Any) -> None:
        self.runner = runner
        self.rows = [row_of(prompt, first + i, **params) for i, prompt in enumerate(prompts)]
        self.tables = [list(range((first + i) * width, (first + i + 1) * width))[::-1] for i in range(len(prompts))]
        self.done = [0] * len(prompts)

    def ids(self, i: int) -> list[int]:
        """Prompt and answer so far."""
        return [*self.rows[i].prompt, *self.rows[i].tokens]

    def give(self, index: Sequence[int], drawn: Drawn) -> None:
        """Hands results to the rows `index`."""
        for n, i in enumerate(index):
            drawn.give(n, self.rows[i])

    def prefill(self, chunk: int | None = None, together: bool = True) -> Self:
        """Prompts in pieces of at most `chunk` tokens, and each one's first draw."""
        for group in [list(range(len(self.rows)))] if together else [[i] for i in range(len(self.rows))]:
            while group:
                batch, drawing = Batch(), []
                for i in group:
                    start, ids = self.done[i], self.rows[i].prompt
                    piece = ids[start : start + (chunk or len(ids))]
                    self.done[i] += len(piece)
                    last = self.done[i] == len(ids)
                    batch.add(list(piece), start, self.tables[i], int(last), self.rows[i] if last else None)
                    drawing += [i] if last else []
                self.give(drawing, self.runner.step(batch))
                group = [i for i in group if i not in drawing]
        return self

    def batch(self, index: Sequence[int]) -> Batch:
        """The next single step of the rows `index`."""
        batch = Batch()
        for i in index:
            batch.add(self.ids(i)[self.done[i] :], self.done[i], self.tables[i], 1, self.rows[i])
        return batch

    def decode(self, count: int, streamed: bool = True, together: bool = True) -> Self:
        """`count` more tokens a row, in single steps or in one call."""
        for group in [list(range(len(self.rows)))] if together else [[i] for i in range(len(self.rows))]:
            left = count
            while left:
                batch = self.batch(group)
                results = [self.runner.step(batch)] if streamed else self.runner.decode(batch, left)
                for drawn in results:
                    self.give(group, drawn)
                for i in group:
                    self.done[i] += len(results)
                left -= len(results)
        return self

    def made(self) -> list[tuple[Any, ...]]:
        """Tokens, log-probabilities and the largest ones of every row."""
        return [(row.tokens, row.logprobs, row.top_logprobs) for row in self.rows]


def logits_of(runner: Runner, ids: list[int], pages: list[int], chunk: int | None = None) -> Tensor:
    """Logits [len(ids), V] of a teacher-forced pass, in pieces of `chunk` tokens."""
    parts = []
    for start in range(0, len(ids), chunk or len(ids)):
        piece = ids[start : start + (chunk or len(ids))]
        parts.append(runner.logits(Batch([piece], [start], [pages], [len(piece)], [None])))
    return torch.cat(parts)


@torch.no_grad()
def defined_logits(model: GPT2LMHeadModel, weights: packed.Packed, ids: Sequence[int]) -> Tensor:
    """fp32 [len(ids), V], the definition: products of gptfast.packing on fp32 activations, keys and values rounded to bf16."""
    config, plain = model.config, dict(model.named_parameters())

    def product(x: Tensor, name: str) -> Tensor:
        bias = plain.get(name.replace("weight", "bias")) if name.startswith("transformer.h") else None
        return packing.product(x, weights.weight(name), bias)

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = plain[name + ".weight"], plain[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_epsilon)

    places = torch.tensor(ids)
    x = weights.weight("transformer.wte.weight").dequantise()[places] + plain["transformer.wpe.weight"][: len(ids)]
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}."
        qkv = product(norm(x, prefix + "ln_1"), prefix + "attn.c_attn.weight").view(len(ids), 3, config.n_head, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)
        scale: Any = model.transformer.h[layer].attn.scale  # type: ignore[union-attr]
        o = F.scaled_dot_product_attention(q, k.bfloat16().float(), v.bfloat16().float(), is_causal=True, scale=scale)
        x = x + product(o.transpose(0, 1).reshape(len(ids), -1), prefix + "attn.c_proj.weight")
        h = ACTIVATIONS[config.activation_function](product(norm(x, prefix + "ln_2"), prefix + "mlp.c_fc.weight"))
        x = x + product(h, prefix + "mlp.c_proj.weight")
    head = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    return product(norm(x, "transformer.ln_f"), head)
