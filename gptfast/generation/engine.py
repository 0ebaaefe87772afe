"""`Engine`: a model and its tokenizer, ready to answer: the scheduler on the fastest runner that is there, or on model.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gptfast.config import GPT2Config
from gptfast.errors import Error
from gptfast.generation.beam import BeamSettings, Hypothesis
from gptfast.generation.generate import fresh_seeds
from gptfast.generation.loading import DTYPES, Loaded, load
from gptfast.generation.loop import check_prompt
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.prompt_score import PromptScore, PromptScorer
from gptfast.generation.request import Request
from gptfast.generation.rows import Row, int64
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.score import Score, scheduled_logprobs, summed, token_logprobs
from gptfast.generation.speculation import DraftModel, PromptLookup, Speculation
from gptfast.generation.stream import TextStream
from gptfast.model import GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One answer, or with stream() one piece of it.

    text: without the stop string or end token that ended it; token_ids: all drawn ids, a stop id included; logprobs: one a token;
    top_logprobs: {id: logprob} a token, where asked for; finish_reason: "stop", "length", "cancelled", "error" (its line in
    `error`), and None for a piece that is not the last; seed: repeats the answer; index: which of the n choices; prompt: which of
    the prompts; score: of beam search, which gives no logprobs.
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
    score: float | None = None


@dataclass(frozen=True)
class Load:
    """running, waiting: answers and scores; pages: of the cache, held: those of them that somebody reads or writes; reused: prompt
    tokens that were found in the cache; preemptions: answers that gave up their pages for a while."""

    running: int
    waiting: int
    pages: int
    held: int
    reused: int
    preemptions: int


class Engine:
    """Generates, streams and scores with one model.

    `path`: a folder, a hub id or a packed file; `dtype` fp32, bf16, fp16, int8 or int4 (default: a packed file's own, else fp32);
    `threads`: CPU threads while the engine is open (default: PyTorch's); `device` auto, cpu or cuda; `batch`: answers made at once;
    `speculation`: None, "lookup" (proposes what followed the same words earlier in the text) or a smaller model with the same
    tokenizer that proposes, in any form that `path` has: the tokens stay what they are; `pages`: of 64 tokens each, for keys and
    values (default: for `batch` whole contexts; memory is taken as they are used). Use with `with`, or close() it.
    Raises gptfast.LoadError for what cannot be loaded and gptfast.Error for what cannot run.
    """

    def __init__(
        self, path: str | Path, dtype: str | None = None, threads: int | None = None, *, device: str = "auto", batch: int = 32,
        speculation: str | Path | None = None, pages: int | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("batch", batch), ("pages", pages)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Error(f"{name} is {value!r}; allowed: a whole number of at least 1")
        self._loaded: Loaded | None = None
        self._path, self._threads, self._threads_before = path, threads, torch.get_num_threads()
        loaded = load(path, dtype, threads, device, batch, pages)
        draft = None
        if speculation is not None and speculation != "lookup":
            draft = load(speculation, dtype if dtype in DTYPES else None, threads, device, batch, None)
            if draft.tokenizer.fingerprint() != loaded.tokenizer.fingerprint():
                raise Error(f"speculation is {str(speculation)!r}, a model with another tokenizer than {path}")
        proposer = None if speculation is None else PromptLookup() if draft is None else DraftModel(draft.runner)
        self._speculation = None if proposer is None else Speculation(proposer)
        self._loaded, self._model, self.tokenizer = loaded, loaded.model, loaded.tokenizer
        self._scheduler = Scheduler(loaded.runner, batch, idle=-(-loaded.config.n_positions // 64), speculation=self._speculation)
        self._scorer = PromptScorer(self._scheduler)
        self.batch = batch
        if threads is not None:
            torch.set_num_threads(threads)

    @property
    def _open(self) -> Loaded:
        if self._loaded is None:
            raise Error("the engine is closed")
        return self._loaded

    @property
    def model(self) -> GPT2LMHeadModel:
        """The model in PyTorch; beside the C++ engine it is loaded when it is first asked for. Raises gptfast.Error after close(),
        and for int8 and int4, which PyTorch's model does not compute."""
        loaded = self._open
        if self._model is None:
            if loaded.dtype not in DTYPES:
                raise Error(f"there is no model in PyTorch with {loaded.dtype} weights; open the engine with fp32 or bf16")
            self._model = GPT2LMHeadModel.from_pretrained(self._path, dtype=DTYPES[loaded.dtype], device=loaded.device).eval()
            self._model.config.real_vocab_size = loaded.config.real_vocab_size
        return self._model

    def describe(self) -> str:
        """One line: what runs the model, and why it is not the C++ engine where it is another."""
        loaded = self._open
        if loaded.engine == "cpp":
            return f"cpp, {loaded.dtype}, {self._threads or self._threads_before} threads"
        return f"eager on {loaded.device}, {loaded.dtype} (not cpp: {loaded.reason})"

    def close(self) -> None:
        """Lets go of the weights and puts the number of threads back; answers that are being made are cancelled. Closing twice does
        nothing."""
        if self._loaded is not None:
            self._scorer.close()
            self._scheduler.close()
            if self._threads is not None:
                torch.set_num_threads(self._threads_before)
        self._loaded = self._model = None

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
        self._scheduler.run([self._scheduler.submit(group) for group in groups])
        return [completion_of(row, number) for number, group in enumerate(groups) for row in group]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Completion]:
        """The answer in pieces, one a token; `text` is what became certain with it and always whole code points. The texts joined
        are generate()'s. With n > 1 the choices' pieces alternate and `index` tells them apart. Ctrl-C ends it within a token; the
        pieces that are made come out before KeyboardInterrupt does."""
        return self._stream(self._rows(prompt, params or SamplingParams()))

    def _stream(self, rows: list[Row]) -> Iterator[Completion]:
        scheduler, pieces = self._scheduler, deque[Completion]()
        request = scheduler.submit(rows, lambda row: pieces.append(piece_of(row)))
        try:
            while pieces or not request.done:
                if pieces:
                    yield pieces.popleft()
                else:
                    scheduler.step()
        except KeyboardInterrupt:
            scheduler.abandon([request])
            yield from pieces
            raise
        finally:
            scheduler.abandon([request])

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], num_beams: int, params: SamplingParams | None = None, *,
        length_penalty: float = 1.0, early_stopping: bool | str = False,
    ) -> list[Completion]:
        """The params.n most probable answers to each prompt, best first, as beam search finds them with transformers' semantics.

        Nothing is drawn: of `params` temperature, filters, seed and order play no part. Hypotheses are compared by their summed
        log-probability / length ** length_penalty, which is the answer's `score`. early_stopping: True ends with num_beams answers,
        False when the best beam cannot beat them now, "never" when it cannot at any length. For when nothing else runs. Raises
        gptfast.Error for n above num_beams, stop texts, logprobs, a prompt that fills the context, and where pages do not suffice.
        """
        settings, params = BeamSettings(num_beams, length_penalty, early_stopping), params or SamplingParams()
        if params.logprobs is not None:
            raise Error(f"logprobs is {params.logprobs}; beam search gives scores of whole answers")
        texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self._rows(text, params)[0] for text in texts]
        settings.check(rows, params.n)
        answers = []
        for number, found in enumerate(self._scheduler.beams(rows, settings) if rows else []):
            for index, hypothesis in enumerate(found[: params.n]):
                answers.append(_hypothesis(hypothesis, rows[number], self.tokenizer, index, number))
        return answers

    # ---------------------------------------------------------------------------- for a server: many callers, one thread that steps

    def submit(self, prompt: Prompt, params: SamplingParams, on_token: Callable[[Row], None]) -> Request:
        """Queues the answers to a prompt; from any thread. `on_token(row)` is called after every change of an answer, in the thread
        that calls step() (here, for one that ends before it begins); piece_of(row) and completion_of(row) tell what there is.
        Raises gptfast.Error as generate() does."""
        return self._scheduler.submit(self._rows(prompt, params), on_token)

    def submit_score(self, ids: Sequence[int], top: int, on_end: Callable[[PromptScore], None]) -> PromptScore:
        """Queues log P of each token of a prompt given those before it, with the `top` largest beside it; otherwise as submit()."""
        check_prompt(len(ids), self._open.config.n_positions)
        return self._scorer.submit(ids, top, on_end)

    def step(self) -> bool:
        """Makes the next tokens of what was submitted, and scores some more; False where there was nothing to do."""
        scored = self._scorer.step()
        return self._scheduler.step() or scored

    def cancel(self, work: Request | PromptScore) -> None:
        """Ends it before the next step, and the step that is running after the token it is at. From any thread."""
        work.cancelled = True
        self.hurry()

    def hurry(self) -> None:
        """If only answers are being made, the step that is running ends after the token it is at, so that what is new begins. A
        pass over prompts goes on. From any thread."""
        plain = not self._scorer.active and all(sequence.todo == 1 for sequence in tuple(self._scheduler.running))
        loaded = self._loaded
        if plain and loaded is not None:
            loaded.runner.interrupt()

    def load(self) -> Load:
        """What is being made, and what of the cache is held, at this moment."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        waiting, held = len(scheduler.waiting) + self._scorer.waiting, pool.pages - pool.available
        return Load(len(scheduler.running), waiting, pool.pages, held, scheduler.reused, scheduler.preemptions)

    @property
    def config(self) -> GPT2Config:
        """The model's."""
        return self._open.config

    # -------------------------------------------------------------------------------------------------------------------- scores

    def score(self, text: str, stride: int | None = None, bos: bool = True) -> Score:
        """log P of a text: of every token, in total and as bits per byte. `stride`: of the windows of a text longer than the
        context (default context / 2). The first token is given <|endoftext|>; without `bos` it has no score."""
        start = self.tokenizer.bos_token_id if bos else None
        if bos and start is None:
            raise Error("score: the tokenizer has no <|endoftext|>; use bos=False")
        ids = self.tokenizer.encode(text)
        values = self.token_logprobs(ids if start is None else [start, *ids], stride)
        half = max(self._open.config.n_positions // 2, 1)
        return summed(values, ids, len(text.encode()), bos, half if stride is None else stride)

    def token_logprobs(self, ids: Sequence[int] | Tensor, stride: int | None = None) -> Tensor:
        """log P(ids[i] | what precedes it in its window) for i = 1..n-1, fp32 [n - 1]; windows as in score().

        Raises gptfast.Error for a stride outside 1..context and for an id outside the vocabulary.
        """
        loaded = self._open
        if loaded.model is not None:
            return token_logprobs(loaded.model, ids, stride)
        return scheduled_logprobs(self._scheduler, ids, stride)

    def _rows(self, prompt: Prompt, params: SamplingParams) -> list[Row]:
        config = self._open.config
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


def piece_of(row: Row) -> Completion:
    """What the last step changed, as stream() has it; a step that drew no token (an error, nothing allowed, no room) has none."""
    new = slice(-1, None) if row.drew else slice(0, 0)
    top = row.top_logprobs[new] if row.params.logprobs else None
    return Completion(
        row.piece, row.tokens[new], row.logprobs[new], row.finish_reason, row.seed, row.choice, 0, row.start, top, row.error
    )


def _hypothesis(found: Hypothesis, row: Row, tokenizer: GPT2Tokenizer, index: int, prompt: int) -> Completion:
    stream = TextStream(tokenizer.token_bytes)
    text = "".join(stream.push(token) for token in found.tokens if token not in row.stop_ids) + stream.finish()
    error = "numerical error: the logits hold NaN" if found.finish_reason == "error" else None
    return Completion(
        text, found.tokens, [], found.finish_reason, row.seed, index, prompt, row.start, error=error, score=found.score
    )


def completion_of(row: Row, prompt: int = 0) -> Completion:
    """The whole answer, as generate() has it."""
    top = row.top_logprobs if row.params.logprobs else None
    return Completion(
        row.text, row.tokens, row.logprobs, row.finish_reason, row.seed, row.choice, prompt, row.start, top, row.error
    )
