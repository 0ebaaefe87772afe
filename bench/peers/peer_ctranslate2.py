"""CTranslate2 as a peer: Generator.generate_batch, one model thread with all cores inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_library() -> None:
    import ctranslate2

    assert ctranslate2.Generator


def version() -> str:
    import ctranslate2

    return str(ctranslate2.__version__)


class Peer:
    def __init__(self, path: str, form: str, threads: int) -> None:
        import ctranslate2

        self.model: Any = ctranslate2.Generator(path, device="cpu", compute_type=form, intra_threads=threads, inter_threads=1)
        self.texts = json.loads(Path(path, "vocabulary.json").read_text(encoding="utf-8"))
        self.settings = f"{self.model.compute_type}, intra_threads {threads}, inter_threads 1"

    def prepare(self, prompts: list[list[int]]) -> list[list[str]]:
        return [[self.texts[i] for i in prompt] for prompt in prompts]  # it takes tokens as texts

    def generate(self, prompts: list[list[str]], new: int, mode: str, seed: int) -> Any:
        import ctranslate2

        ctranslate2.set_random_seed(seed)
        sampling: dict[str, Any] = {"sampling_topk": 1}
        if mode == "sampled":
            sampling = {"sampling_topk": 50, "sampling_topp": 0.95, "sampling_temperature": 0.8}
        return self.model.generate_batch(
            prompts, max_length=new, min_length=new, end_token=[], include_prompt_in_result=False, **sampling
        )

    def tokens(self, made: Any) -> list[list[int]]:
        return [answer.sequences_ids[0] for answer in made]

    def score(self, ids: list[int]) -> list[float]:
        """log P of every token but the first."""
        found = self.model.score_batch(self.prepare([ids]))
        return [float(value) for value in found[0].log_probs]

    def close(self) -> None:
        self.model.unload_model()
