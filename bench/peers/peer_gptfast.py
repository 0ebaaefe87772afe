"""gptfast itself, in a process of its own like everybody: `gptfast.Engine` with its public methods, answers' texts included."""

from __future__ import annotations

from typing import Any


def load_library() -> None:
    import gptfast

    assert gptfast.Engine and gptfast.SamplingParams


def version() -> str:
    import gptfast

    return str(gptfast.__version__)


class Peer:
    def __init__(self, path: str, form: str, threads: int) -> None:
        from gptfast import Engine

        self.engine: Any = Engine(path, dtype=form, threads=threads, device="cpu")
        self.settings = self.engine.describe()
        if not self.settings.startswith("cpp"):  # nothing is timed on a fallback
            raise RuntimeError(self.settings)

    def prepare(self, prompts: list[list[int]]) -> list[list[int]]:
        return prompts

    def generate(self, prompts: list[list[int]], new: int, mode: str, seed: int) -> Any:
        from gptfast import SamplingParams

        if mode == "fixed":
            return self._evaluate(prompts, new)
        chosen = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": seed} if mode == "sampled" else {"temperature": 0.0}
        return self.engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True, **chosen))

    def _evaluate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The passes of `new` tokens without a sampler: the prompts, then their last token again and again, in one call."""
        from gptfast.generation.runner import Batch

        scheduler = self.engine._scheduler
        prompt, then = Batch(), Batch()
        for ids in prompts:
            pages = [scheduler.pool.take() for _ in range(-(-(len(ids) + new) // 64))]
            prompt.add(ids, 0, pages, 1, None)
            then.add(ids[-1:], len(ids), pages, 1, None)
        scheduler.runner.logits(prompt)
        if new > 1:
            scheduler.runner.evaluate(then, new - 1)
        for pages in then.tables:
            scheduler.pool.release(pages)
        return [ids[-1:] * new for ids in prompts]

    def tokens(self, made: Any) -> list[list[int]]:
        return [answer if isinstance(answer, list) else answer.token_ids for answer in made]

    def score(self, ids: list[int]) -> list[float]:
        """log P of every token but the first."""
        return [float(value) for value in self.engine.token_logprobs(ids)]

    def close(self) -> None:
        self.engine.close()
