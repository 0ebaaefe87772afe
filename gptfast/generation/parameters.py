"""What a request may ask of sampling. The order in which it is applied, and every edge case, is in gptfast/ops/sample.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptfast.config import option
from gptfast.errors import Error

ORDERS = ("gptfast", "hf", "vllm", "llama.cpp")
MAX_LOGPROBS = 1000


@dataclass
class SamplingParams:
    """How tokens are chosen and when a request ends. Raises gptfast.Error that names a field, its value and what is allowed.

    top_k, top_p, min_p, typical_p and the penalties are off at the values named in their help. `seed` None draws a seed, which the
    result names; equal seeds give equal noise, whatever else is in the batch. Ids in logit_bias, allowed_tokens, banned_tokens and
    stop_token_ids are checked against the model's vocabulary when the request starts.
    """

    temperature: float = option(0.8, "divides the logits; 0 takes the most probable token", low=0.0)
    top_k: int = option(50, "keep the k most probable tokens (0 or less: all)")
    top_p: float = option(1.0, "keep the most probable tokens that together hold this mass (1: all, 0: greedy)", low=0.0, high=1.0)
    min_p: float = option(0.0, "keep tokens at least this fraction as probable as the best (0: all)", low=0.0, high=1.0)
    typical_p: float = option(1.0, "keep the most typical tokens that together hold this mass (1: all)", low=0.0, high=1.0)
    repetition_penalty: float = option(  # beyond these bounds logits would leave fp32
        1.0, "divides positive logits of tokens seen in prompt and output, multiplies negative ones", low=1e-6, high=1e6
    )
    frequency_penalty: float = option(0.0, "subtracted for each time a token is in the output")
    presence_penalty: float = option(0.0, "subtracted once if a token is in the output")
    logit_bias: dict[int, float] | None = option(None, "added to single tokens' logits, by id; -inf bans")  # noqa: RUF009
    allowed_tokens: tuple[int, ...] | None = option(None, "the only token ids that may be drawn (default: all)")
    banned_tokens: tuple[int, ...] = option((), "token ids that are never drawn")
    seed: int | None = option(None, "seed of the noise (default: a random one, which is printed)", low=-(2**63), high=2**64 - 1)
    n: int = option(1, "independent answers to each prompt", low=1, high=4096)
    max_tokens: int = option(128, "longest answer in tokens", low=0)
    min_tokens: int = option(0, "stop tokens are not drawn before so many others", low=0)
    stop: tuple[str, ...] = option((), "texts that end the answer, and are not part of it")
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the answer, beside the model's end of text")
    ignore_eos: bool = option(False, "the model's end of text does not end the answer")
    logprobs: int | None = option(None, "log-probabilities with each token: how many of the largest", low=0, high=MAX_LOGPROBS)
    logprobs_mode: str = option("raw", "log-probabilities of the model, or of what was drawn from", choices=("raw", "processed"))
    order: str = option("gptfast", "order in which the filters are applied: ours or another library's", choices=ORDERS)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        for name in ("stop", "banned_tokens", "stop_token_ids", "allowed_tokens"):
            value = getattr(self, name)
            if value is None and name == "allowed_tokens":
                continue
            if value is not None and (not isinstance(value, Iterable) or isinstance(value, (str, bytes))):
                raise Error(f"{name} is {value!r}; a list is needed")
            setattr(self, name, tuple(value or ()))
        for field in fields(self):
            self._check_scalar(field.name, str(field.type), field.metadata)
        self._check_lists()

    def _check_scalar(self, name: str, kind: str, metadata: Mapping[str, Any]) -> None:
        value, first = getattr(self, name), kind.split(" ")[0]
        if first not in ("int", "float", "bool", "str") or (value is None and "None" in kind):
            return
        low, high, choices = metadata.get("low"), metadata.get("high"), metadata.get("choices")
        if choices is not None:
            if value not in choices:
                raise Error(f"{name} is {value!r}; allowed: {', '.join(choices)}")
        elif first == "bool":
            if not isinstance(value, bool):
                raise Error(f"{name} is {value!r}; allowed: True or False")
        else:
            what = "a whole number" if first == "int" else "a number"
            allowed = f"{what} of at least {low}" if high is None else f"{what} from {low} to {high}"
            allowed = f"a finite {what.removeprefix('a ')}" if low is None else allowed
            types = (int,) if first == "int" else (int, float)
            number = isinstance(value, types) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
                raise Error(f"{name} is {value!r}; allowed: {allowed}")
            if abs(value) > _FP32_MAX and first == "float":
                raise Error(f"{name} is {value!r}; allowed: numbers that fp32 holds")

    def _check_lists(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise Error(f"stop holds {text!r}; allowed: texts that are not empty")
        ids = [*(self.allowed_tokens or ()), *self.banned_tokens, *self.stop_token_ids, *(self.logit_bias or {})]
        for value in ids:
            if not isinstance(value, int) or isinstance(value, bool):
                raise Error(f"token id {value!r} is not a whole number")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(bias, (int, float)) or isinstance(bias, bool) or math.isnan(bias):
                raise Error(f"logit_bias of token {token} is {bias!r}; allowed: a number")

    @property
    def greedy(self) -> bool:
        """Whether the draw consumes no noise."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    def check_vocabulary(self, size: int) -> None:
        """Raises gptfast.Error for an id outside the vocabulary of `size` tokens."""
        groups = {
            "logit_bias": self.logit_bias or (), "allowed_tokens": self.allowed_tokens or (), "banned_tokens": self.banned_tokens,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in groups.items():
            for value in ids:
                if not 0 <= value < size:
                    raise Error(f"{name} holds token id {value}; allowed: 0 to {size - 1}")


_FP32_MAX = 3.4028234663852886e38
