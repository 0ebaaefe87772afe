"""The C++ engine in fp32 against transformers: teacher-forced on the tokens that it generates greedily, 64 prompts x 64 tokens."""

import pytest
import torch

import gptfast.backend as backend
from gptfast import GPT2Config, GPT2LMHeadModel, packed, testing
from gptfast.generation.cpp import CppRunner
from gptfast.testing.choices import compare, runner_logits

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the `test` extra)")
PROMPTS, NEW = 64, 64


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"n_embd": 60, "n_head": 3, "n_inner": 100, "activation_function": "gelu", "vocab_size": 337},
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "n_embd": 96},
    ],
)  # fmt: skip
def test_cpp_chooses_as_transformers_does(changes):
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    torch.manual_seed(0)
    shape = {"vocab_size": 600, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, **changes}
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    ours = GPT2LMHeadModel(config).eval()
    known = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id", "model_type")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**known)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    texts = []
    for length in (1, 7, 20, 60):  # of equal lengths: transformers' own padding would be part of what is compared
        ids = torch.randint(1, config.vocab_size, (PROMPTS // 4, length), generator=generator)
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
        out = theirs.generate(ids, pad_token_id=0, suppress_tokens=[0], **more)
        assert out.shape[1] == length + NEW
        texts += [(length, row) for row in out.tolist()]
    assert sum(len(set(ids[length:])) for length, ids in texts) > 16 * PROMPTS, "the texts vary"
    with torch.no_grad():
        right = torch.cat([theirs(torch.tensor([ids])).logits[0, length - 1 : -1] for length, ids in texts])
    found = runner_logits(CppRunner(packed.pack(ours, "fp32"), 2, 2 * PROMPTS), texts)
    compare(right, found)
