"""From a request's body to prompts and sampling parameters, and from answers to OpenAI's objects: /v1/completions.

chat.py does the same for conversations. All of it runs outside the event loop but for the writing of single tokens.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptfast.config import GPT2Config
from gptfast.errors import Error, shown
from gptfast.generation.engine import Completion
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.prompt_score import PromptScore
from gptfast.serving.errors import ApiError, no_model
from gptfast.serving.limits import Limits
from gptfast.serving.logprobs import Legacy
from gptfast.serving.schemas import CompletionRequest, Sampled, read
from gptfast.tokenizer import GPT2Tokenizer


@dataclass(frozen=True)
class Served:
    """What is served, and what is read from it once. longest: bytes of the longest token."""

    name: str
    tokenizer: GPT2Tokenizer
    config: GPT2Config
    fingerprint: str
    template: str
    limits: Limits
    longest: int


class Call:
    """A request that was read: what to make, and how it is written. `count`: answers to a prompt, `n` of which are given."""

    kind = ""

    def __init__(self, served: Served, request: Sampled) -> None:
        self.served, self.stream = served, bool(request.stream)
        if request.model is not None and request.model != served.name:
            raise no_model(request.model, served.name)
        if request.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are allowed with stream only", "stream_options", "invalid_value")
        self.usage = bool(request.stream_options and request.stream_options.include_usage)
        self.n = self.count = bounded("n", request.n, served.limits.max_n) or 1
        self.head: dict[str, Any] = {
            "id": f"{self.kind}-{uuid.uuid4().hex}", "object": "", "created": int(time.time()), "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self.prompts: list[list[int]] = []
        self.params = SamplingParams()
        self.scored: int | None = None  # log-probabilities of the prompts, with so many of the largest

    @property
    def answers(self) -> int:
        """How many are made."""
        return len(self.prompts) * self.count

    def totals(self, completion_tokens: int) -> dict[str, int]:
        """The usage object."""
        prompt = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": prompt + completion_tokens}

    def event(self, choices: list[Any], usage: dict[str, int] | None = None) -> bytes:
        """One event of a stream."""
        more = {"usage": usage} if self.usage else {}
        return b"data: " + encode({**self.head, "choices": choices, **more}) + b"\n\n"

    def opening(self, scores: Sequence[PromptScore]) -> bytes:
        """The events before the first token."""
        return b""

    def chunk(self, prompt: int, piece: Completion) -> bytes:
        """The events of one piece of an answer."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Sequence[Completion]], scores: Sequence[PromptScore]) -> bytes:
        """The body of an answer that is not streamed; answers[prompt][choice]."""
        total = sum(len(answer.token_ids) for group in answers for answer in group)
        choices = [
            self.choice(prompt, place, answer, scores)
            for prompt, group in enumerate(answers)
            for place, answer in enumerate(best(group, self.n))
        ]
        return encode({**self.head, "choices": choices, "usage": self.totals(total)})

    def choice(self, prompt: int, place: int, answer: Completion, scores: Sequence[PromptScore]) -> dict[str, Any]:
        """One entry of `choices`."""
        raise NotImplementedError


class CompletionCall(Call):
    """POST /v1/completions."""

    kind = "cmpl"

    def __init__(self, served: Served, body: bytes) -> None:
        request = read(CompletionRequest, body)
        super().__init__(served, request)
        limits = served.limits
        if request.suffix:
            raise ApiError(400, "suffix is not supported: a GPT-2 model continues text to the right", "suffix", "unsupported_value")
        self.count = bounded("best_of", request.best_of, limits.max_n) or self.n
        if self.count < self.n:
            raise ApiError(400, f"best_of is {self.count}; allowed: at least n, which is {self.n}", "best_of", "invalid_value")
        if self.count > self.n and self.stream:
            raise ApiError(400, f"best_of is {self.count}; with stream allowed: n, which is {self.n}", "best_of", "invalid_value")
        self.head["object"] = "text_completion"
        self.echo, self.logprobs = bool(request.echo), bounded("logprobs", request.logprobs, limits.max_logprobs)
        tokens = 16 if request.max_tokens is None else request.max_tokens
        self.params = sampling(served, request, self.count, tokens, self.logprobs, ())
        self.prompts = read_prompts(served, request.prompt)
        if self.answers > limits.max_answers:
            text = f"{len(self.prompts)} prompts with {self.count} answers each; allowed: {limits.max_answers:,} answers in all"
            raise ApiError(400, text, "best_of" if request.best_of else "n", "invalid_value")
        self.scored = self.logprobs if self.echo else None
        self._blocks: dict[tuple[int, int], Legacy] = {}

    def opening(self, scores: Sequence[PromptScore]) -> bytes:
        """With echo the prompts."""
        if not self.echo:
            return b""
        places = [(prompt, choice) for prompt in range(len(self.prompts)) for choice in range(self.n)]
        return b"".join(self.event([self._echoed(prompt, choice, scores)]) for prompt, choice in places)

    def _echoed(self, prompt: int, choice: int, scores: Sequence[PromptScore]) -> dict[str, Any]:
        text = self.served.tokenizer.decode(self.prompts[prompt])
        logprobs = self._block(prompt, choice, *_scored(scores[prompt])) if scores else None
        return {"index": prompt * self.n + choice, "text": text, "logprobs": logprobs, "finish_reason": None}

    def chunk(self, prompt: int, piece: Completion) -> bytes:
        """A piece without text, log-probabilities and end says nothing."""
        if not piece.text and piece.finish_reason is None and self.logprobs is None:
            return b""
        entry: dict[str, Any] = {
            "index": prompt * self.n + piece.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason
        }
        if self.logprobs is not None:
            entry["logprobs"] = self._block(prompt, piece.index, piece.token_ids, piece.logprobs, tops_of(piece))
        if piece.finish_reason is not None:
            entry["seed"] = piece.seed
        return self.event([entry])

    def choice(self, prompt: int, place: int, answer: Completion, scores: Sequence[PromptScore]) -> dict[str, Any]:
        """With echo the prompt's text and log-probabilities stand before the answer's."""
        before = self.served.tokenizer.decode(self.prompts[prompt]) if self.echo else ""
        first = _scored(scores[prompt]) if scores else ([], [], [])
        ids, values, tops = [*first[0], *answer.token_ids], [*first[1], *answer.logprobs], [*first[2], *tops_of(answer)]
        logprobs = Legacy(self.served.tokenizer).block(ids, values, tops) if self.logprobs is not None else None
        return {
            "index": prompt * self.n + place, "text": before + answer.text, "logprobs": logprobs,
            "finish_reason": answer.finish_reason, "seed": answer.seed,
        }

    def _block(self, prompt: int, choice: int, ids: Any, logprobs: Any, tops: Any) -> dict[str, Any]:
        key = prompt, choice
        if key not in self._blocks:
            self._blocks[key] = Legacy(self.served.tokenizer)
        return self._blocks[key].block(ids, logprobs, tops)


def _scored(score: PromptScore) -> tuple[list[int], list[float | None], list[dict[int, float] | None]]:
    return score.ids, score.logprobs[: len(score.ids)], score.top_logprobs[: len(score.ids)]


# --------------------------------------------------------------------------------------------------------- what both kinds share


def encode(value: Any) -> bytes:
    """JSON in ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def bounded(name: str, value: int | None, high: int) -> int | None:
    """`value`, if it is at most `high`; else raises ApiError 400."""
    if value is not None and value > high:
        raise ApiError(400, f"{name} is {value}; allowed: at most {high:,}", name, "invalid_value")
    return value


def tops_of(answer: Completion) -> Sequence[dict[int, float]]:
    """The largest log-probabilities of each token; empty ones where only the chosen token's was asked for."""
    return [{} for _ in answer.token_ids] if answer.top_logprobs is None else answer.top_logprobs


def best(group: Sequence[Completion], n: int) -> Sequence[Completion]:
    """The n answers with the highest mean log-probability of a token, the best first; all of them as they are where there are n."""
    if len(group) == n:
        return group
    mean = [sum(answer.logprobs) / max(len(answer.logprobs), 1) for answer in group]
    return [group[i] for i in sorted(range(len(group)), key=lambda i: (-mean[i], i))[:n]]


def sampling(
    served: Served, request: Sampled, n: int, max_tokens: int, logprobs: int | None, stops: Sequence[str]
) -> SamplingParams:
    """OpenAI's defaults: temperature 1, no top_k. Raises ApiError 400."""
    limits, context = served.limits, served.config.n_positions
    bounded("max_tokens", max_tokens, context)
    bounded("min_tokens", request.min_tokens, context)
    values: dict[str, Any] = {"temperature": 1.0, "top_k": 0}
    names = (
        "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
        "seed", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs_mode",
    )
    values |= {name: value for name in names if (value := getattr(request, name)) is not None}
    ends = len(request.stop_token_ids or ())
    if ends > limits.max_stop:
        text = f"stop_token_ids holds {ends} ids; allowed: {limits.max_stop}"
        raise ApiError(400, text, "stop_token_ids", "invalid_value")
    values |= {"logit_bias": _bias(request.logit_bias, limits), "stop": (*_stops(request.stop, limits), *stops)}
    try:
        params = SamplingParams(n=n, max_tokens=max_tokens, logprobs=logprobs, **values)
        params.check_vocabulary(served.config.real_vocabulary)
    except Error as error:
        param = str(error).split(" ")[0]
        raise ApiError(400, str(error), param if param in values else None, "invalid_value") from None
    return params


def _stops(value: Any, limits: Limits) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        text = f"stop is {shown(value)}; allowed: a text that is not empty, or a list of them"
        raise ApiError(400, text, "stop", "invalid_value")
    if len(stops) > limits.max_stop:
        raise ApiError(400, f"stop holds {len(stops)} texts; allowed: {limits.max_stop}", "stop", "invalid_value")
    for stop in stops:
        try:
            size = len(stop.encode())
        except UnicodeEncodeError:
            raise ApiError(400, f"stop holds {shown(stop)}, which is no Unicode text", "stop", "invalid_value") from None
        if size > limits.max_stop_bytes:
            text = f"stop holds a text of {size:,} bytes; allowed: {limits.max_stop_bytes}"
            raise ApiError(400, text, "stop", "invalid_value")
    return stops


def _bias(bias: dict[str, float] | None, limits: Limits) -> dict[int, float] | None:
    if not bias:
        return None
    if len(bias) > limits.max_logit_bias:
        text = f"logit_bias holds {len(bias):,} entries; allowed: {limits.max_logit_bias:,}"
        raise ApiError(400, text, "logit_bias", "invalid_value")
    wrong = next((token for token in bias if not (token.isascii() and token.isdecimal() and len(token) < 11)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias holds the key {shown(wrong)}; allowed: token ids", "logit_bias", "invalid_value")
    return {int(token): value for token, value in bias.items()}


def read_prompts(served: Served, value: Any) -> list[list[int]]:
    """The ids of a text, of several, of a list of ids or of several. Raises ApiError 400."""
    items = value if isinstance(value, list) and value and not _whole(value[0]) else ["" if value is None else value]
    if len(items) > served.limits.max_prompts:
        text = f"prompt holds {len(items):,} prompts; allowed: {served.limits.max_prompts:,}"
        raise ApiError(400, text, "prompt", "invalid_value")
    prompts, total = [], 0
    for item in items:
        prompts.append(encode_prompt(served, item) if isinstance(item, str) else _checked(served, item))
        total += len(prompts[-1])
        if total > served.limits.max_prompt_tokens:
            text = f"prompt has more than {served.limits.max_prompt_tokens:,} tokens in all"
            raise ApiError(400, text, "prompt", "invalid_value")
    return prompts


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(served: Served, ids: Any) -> list[int]:
    vocabulary = served.config.real_vocabulary
    if not isinstance(ids, list) or not ids:
        text = f"prompt is {shown(ids)}; allowed: a text, a list of token ids, or a list of these"
        raise ApiError(400, text, "prompt", "invalid_value")
    check_length(served, len(ids))
    for token in ids:
        if not _whole(token) or not 0 <= token < vocabulary:
            text = f"prompt holds {shown(token)}; allowed: token ids of 0 to {vocabulary - 1}"
            raise ApiError(400, text, "prompt", "invalid_value")
    return ids


def encode_prompt(served: Served, text: str, param: str = "prompt") -> list[int]:
    """A text's ids; a text that is too long whatever its tokens is not read first. Raises ApiError 400."""
    least = -(-len(text) // served.longest)
    if least > served.config.n_positions:
        raise _too_long(served, f"at least {least:,}", param)
    try:
        ids: list[int] = served.tokenizer.encode(text)
    except Error as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_value") from None
    check_length(served, len(ids), param)
    return ids


def check_length(served: Served, tokens: int, param: str = "prompt") -> None:
    """Raises ApiError 400 where a prompt is longer than the context."""
    if tokens > served.config.n_positions:
        raise _too_long(served, f"{tokens:,}", param)


def _too_long(served: Served, tokens: str, param: str) -> ApiError:
    text = f"{param} has {tokens} tokens, the model's context is {served.config.n_positions:,}"
    return ApiError(400, text, param, "context_length_exceeded")
