"""`Engine`: a model and its tokenizer, ready to answer. This one, "eager", runs model.py with its cache and is the definition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from gptfast.errors import Error
from gptfast.generation.generate import fresh_seeds
from gptfast.generation.loop import check_prompt, decode
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.rows import Row, int64
from gptfast.generation.score import Score, score_text
from gptfast.generation.stream import TextStream
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One answer, or with stream() one piece of it.

    text: without the stop string or end token that ended it; token_ids: all drawn ids, a stop id included; logprobs: one a token;
    top_logprobs: {id: logprob} a token, where asked for; finish_reason: "stop", "length", "error" (its line in `error`), and None
    for a piece that is not the last; seed: repeats the answer; index: which of the n choices; prompt: which of the prompts.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    seed: int
    index: int = 0
    prompt: int = 0
    prompt_tokens: int = 0
    top_logprobs: list[dict[int, float]] | None = None
    error: str | None = None


class Engine:
    """Generates, streams and scores with one model.

    `path`: a folder or hub id; `dtype` fp32, bf16 or fp16; `threads`: CPU threads of PyTorch while the engine is open (default:
    as they are); `device` auto, cpu or cuda; `batch`: answers made at once. Use with `with`, or close() it.
    Raises gptfast.LoadError for what cannot be loaded and gptfast.Error for what cannot run.
    """

    def __init__(
        self, path: str | Path, dtype: str = "fp32", threads: int | None = None, *, device: str = "auto", batch: int = 32
    ) -> None:
        if dtype not in DTYPES:
            raise Error(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        if device not in ("auto", "cpu", "cuda"):
            raise Error(f"device is {device!r}; allowed: auto, cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise Error("device is 'cuda', and torch sees no CUDA device here; allowed: auto, cpu")
        for name, value in (("threads", threads), ("batch", batch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Error(f"{name} is {value!r}; allowed: a whole number of at least 1")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.batch = batch
        self.tokenizer = GPT2Tokenizer.from_pretrained(path)
        model = GPT2LMHeadModel.from_pretrained(path, dtype=DTYPES[dtype], device=device).eval()
        if len(self.tokenizer) < model.config.real_vocabulary:  # ids without a text are never drawn
            model.config.real_vocab_size = len(self.tokenizer)
        self._model: GPT2LMHeadModel | None = model
        self._threads_before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self._threads = threads

    @property
    def model(self) -> GPT2LMHeadModel:
        """The model. Raises gptfast.Error after close()."""
        if self._model is None:
            raise Error("the engine is closed")
        return self._model

    def close(self) -> None:
        """Lets go of the weights and puts the number of threads back. Closing twice does nothing."""
        if self._model is not None and self._threads is not None:
            torch.set_num_threads(self._threads_before)
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answers to one or several prompts, texts or lists of token ids: n completions a prompt, in the order of the prompts.

        `params`: one for all prompts or one each. An empty prompt starts from <|endoftext|>. Raises gptfast.Error for a prompt
        longer than the context; NaN logits end that answer alone, with finish_reason "error".
        """
        texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        each = [params or SamplingParams()] * len(texts) if isinstance(params, SamplingParams | None) else list(params)
        if len(each) != len(texts):
            raise Error(f"{len(texts)} prompts and {len(each)} params; give one for all, or one each")
        groups = [self._rows(text, p) for text, p in zip(texts, each, strict=True)]
        waiting = list(groups)
        while waiting:
            now = [waiting.pop(0)]
            while waiting and sum(len(group) for group in now) + len(waiting[0]) <= self.batch:
                now.append(waiting.pop(0))
            for _ in decode(self.model, now):
                pass
        return [_completion(row, number) for number, group in enumerate(groups) for row in group]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Completion]:
        """The answer in pieces, one a token; `text` is what became certain with it and always whole code points. The texts joined
        are generate()'s. With n > 1 the choices' pieces alternate and `index` tells them apart."""
        steps = decode(self.model, [self._rows(prompt, params or SamplingParams())])
        return (_piece(row) for changed in steps for row in changed)

    def score(self, text: str, stride: int | None = None, bos: bool = True) -> Score:
        """log P of a text: of every token, in total and as bits per byte. `stride`: of the windows of a text longer than the
        context (default context / 2). The first token is given <|endoftext|>; without `bos` it has no score."""
        return score_text(self.model, self.tokenizer, text, bos, stride)

    def _rows(self, prompt: Prompt, params: SamplingParams) -> list[Row]:
        config = self.model.config
        params.check_vocabulary(config.real_vocabulary)
        if not isinstance(prompt, (str, Sequence)):
            raise Error(f"a prompt is {prompt!r}; allowed: a text or a list of token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.real_vocabulary:
                raise Error(f"prompt holds {token!r}; allowed: token ids of 0 to {config.real_vocabulary - 1}")
        if not ids:
            start = self.tokenizer.bos_token_id
            if start is None:
                raise Error("the prompt is empty, and the tokenizer has no <|endoftext|> to start from")
            ids = [start]
        check_prompt(len(ids), config.n_positions)
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= {i for i in (self.tokenizer.eos_token_id, config.eos_token_id) if i is not None}
        seed = fresh_seeds(1)[0] if params.seed is None else int64(params.seed)
        limit = min(params.max_tokens, config.n_positions - len(ids))
        streams = [TextStream(self.tokenizer.token_bytes, params.stop) for _ in range(params.n)]
        return [Row(ids, params, seed, limit, frozenset(ends), i, len(ids), (), stream) for i, stream in enumerate(streams)]


def _piece(row: Row) -> Completion:
    """What the last step changed; a step that drew no token (an error, nothing allowed, no room) has none."""
    new = slice(-1, None) if row.drew else slice(0, 0)
    top = row.top_logprobs[new] if row.params.logprobs else None
    return Completion(
        row.piece, row.tokens[new], row.logprobs[new], row.finish_reason, row.seed, row.choice, 0, row.start, top, row.error
    )


def _completion(row: Row, prompt: int) -> Completion:
    top = row.top_logprobs if row.params.logprobs else None
    return Completion(
        row.text, row.tokens, row.logprobs, row.finish_reason, row.seed, row.choice, prompt, row.start, top, row.error
    )
