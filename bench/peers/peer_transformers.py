"""Hugging Face transformers as a peer: `generate` of GPT2LMHeadModel under inference_mode, PyTorch's attention (sdpa), its own
growing cache."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_library() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    from transformers import GPT2LMHeadModel

    assert GPT2LMHeadModel


def version() -> str:
    import transformers

    return f"{transformers.__version__}, torch {torch.__version__}"


class Peer:
    def __init__(self, path: str, form: str, threads: int) -> None:
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(threads)
        self.model: Any = GPT2LMHeadModel.from_pretrained(path, dtype=DTYPES[form], attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None  # every answer is as long as asked for
        self.model.generation_config.pad_token_id = 0
        self.settings = f"{form}, sdpa, {torch.get_num_threads()} threads"

    def prepare(self, prompts: list[list[int]]) -> torch.Tensor:
        return torch.tensor(prompts)

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, new: int, mode: str, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if mode == "sampled":
            sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
        made: torch.Tensor = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, **sampling)
        return made[:, prompts.shape[1] :]

    def tokens(self, made: torch.Tensor) -> list[list[int]]:
        return made.tolist()

    @torch.inference_mode()
    def score(self, ids: list[int]) -> list[float]:
        """log P of every token but the first: the first half in one piece, the others one by one on the cache."""
        x, cut = torch.tensor([ids]), len(ids) // 2
        output = self.model(x[:, :cut], use_cache=True)
        logits = [output.logits[0]]
        for t in range(cut, len(ids) - 1):
            output = self.model(x[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0])
        found = torch.cat(logits).float().log_softmax(-1).gather(1, x[0, 1:, None])
        return found[:, 0].tolist()

    def close(self) -> None:
        self.model = None
