"""llama.cpp as a peer, by its C interface as llama-cpp-python hands it through: llama_decode alone ("fixed": evaluation of given
tokens, what its own benchmark times), or with its sampler ("greedy", "sampled"). llama-cpp-python's own loop is not in the way.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CONTEXT = 1024


def load_library() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    pass


def version() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}: {llama_cpp.llama_print_system_info().decode()}"


class Peer:
    def __init__(self, path: str, form: str, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.threads = threads
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}
        self.context(1)
        self.settings = f"{form}, n_threads {threads}, flash attention auto, KV cache f16"

    def context(self, sequences: int) -> Any:
        """A context for so many sequences side by side, made when first asked for."""
        if sequences not in self.contexts:
            params = self.api.llama_context_default_params()
            params.n_ctx = CONTEXT if sequences == 1 else 256 * sequences
            params.n_batch = params.n_ctx
            params.n_ubatch = 512
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.threads
            made = self.api.llama_init_from_model(self.model, params)
            if not made:
                raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences")
            self.contexts[sequences] = made
        return self.contexts[sequences]

    def prepare(self, prompts: list[list[int]]) -> Any:
        """The context, and a batch with all prompts in it that wants each one's last logits."""
        return self.context(len(prompts)), self.batch(prompts, [0] * len(prompts)), [len(prompt) for prompt in prompts]

    def batch(self, rows: list[list[int]], starts: list[int], every: bool = False) -> Any:
        batch = self.api.llama_batch_init(sum(len(row) for row in rows), 0, 1)
        place = 0
        for sequence, (row, start) in enumerate(zip(rows, starts, strict=True)):
            for i, token in enumerate(row):
                batch.token[place], batch.pos[place] = token, start + i
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = every or i == len(row) - 1
                place += 1
        batch.n_tokens = place
        return batch

    def decode(self, context: Any, batch: Any) -> None:
        status = self.api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")

    def sampler(self, mode: str, seed: int) -> Any:
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if mode == "sampled":
            parts = (api.llama_sampler_init_top_k(50), api.llama_sampler_init_top_p(0.95, 1), api.llama_sampler_init_temp(0.8))
            for part in (*parts, api.llama_sampler_init_dist(seed & 0xFFFFFFFF)):
                api.llama_sampler_chain_add(chain, part)
        else:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        return chain

    def generate(self, given: Any, new: int, mode: str, seed: int) -> list[list[int]]:
        context, prompts, lengths = given
        count, api = len(lengths), self.api
        api.llama_memory_clear(api.llama_get_memory(context), False)
        self.decode(context, prompts)
        rows = np.cumsum(lengths) - 1
        chain = None if mode == "fixed" else self.sampler(mode, seed)
        one = self.batch([[0]] * count, lengths)
        made: list[list[int]] = [[] for _ in lengths]
        for step in range(new):
            if step:
                self.decode(context, one)
                rows = range(count)
            for s in range(count):
                token = 17 + step if chain is None else api.llama_sampler_sample(chain, context, int(rows[s]))
                one.token[s], one.pos[s] = token, lengths[s] + step
                made[s].append(token)
        api.llama_synchronize(context)
        if chain is not None:
            api.llama_sampler_free(chain)
        api.llama_batch_free(one)
        api.llama_batch_free(prompts)
        return made

    def tokens(self, made: list[list[int]]) -> list[list[int]]:
        return made

    def score(self, ids: list[int]) -> list[float]:
        """log P of every token but the first: the first half in one piece, the others one by one on the cache."""
        context, cut = self.context(1), len(ids) // 2
        self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
        pieces = [(ids[:cut], 0), *(([ids[t]], t) for t in range(cut, len(ids) - 1))]
        found: list[float] = []
        for tokens, start in pieces:
            batch = self.batch([tokens], [start], every=True)
            self.decode(context, batch)
            for i in range(len(tokens)):
                pointer = self.api.llama_get_logits_ith(context, i)
                logits = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).astype(np.float64)
                total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                found.append(float(logits[ids[start + i + 1]] - total))
            self.api.llama_batch_free(batch)
        return found

    def close(self) -> None:
        for context in self.contexts.values():
            self.api.llama_free(context)
        self.contexts.clear()
        self.api.llama_model_free(self.model)
