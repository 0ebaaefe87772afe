"""Exports as other programs read them: CTranslate2's greedy tokens, and the tensors of a GGUF file made of the folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast import GPT2Config, GPT2LMHeadModel
from gptfast.tokenizer import GPT2Tokenizer

PROMPTS, NEW = 32, 24


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that gptfast wrote: random weights, spread so that no token repeats for ever."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    tokenizer = GPT2Tokenizer.train(["the quick brown fox jumps over the lazy dog and runs away again " * 20], 300)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(len(tokenizer), 64, 64, 2, 2, initializer_range=0.4, bos_token_id=end, eos_token_id=end)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_ctranslate2s_greedy_tokens_are_ours(export: Path, tmp_path: Path) -> None:
    """Equal, but where the winner leads by less than rounding can change (1e-4 of the largest logit), which ends that prompt."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    pytest.importorskip("transformers", reason="CTranslate2's converter needs transformers, which is not installed")
    ctranslate2.converters.TransformersConverter(str(export)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32", intra_threads=1)
    tokenizer, model = GPT2Tokenizer.from_pretrained(export), GPT2LMHeadModel.from_pretrained(export)
    names = {index: token for token, index in json.loads((export / "vocab.json").read_text(encoding="utf-8")).items()}
    prompts = [torch.randint(0, len(tokenizer) - 1, (1 + number % 12,)).tolist() for number in range(PROMPTS)]
    made = generator.generate_batch(
        [[names[token] for token in prompt] for prompt in prompts], max_length=NEW, max_batch_size=1, sampling_topk=1,
        include_prompt_in_result=False, end_token="<|endoftext|>",
    )  # fmt: skip
    compared = 0
    for prompt, theirs in zip(prompts, made, strict=True):
        ours = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        found = theirs.sequences_ids[0]
        for place, (mine, other) in enumerate(zip(ours, found, strict=False)):
            if mine != other:
                logits = model(torch.tensor([prompt + ours[:place]])).logits[0, -1]
                assert float(logits[mine] - logits[other]) < 1e-4 * float(logits.abs().max())
                break
            compared += 1
    assert compared > 0.9 * PROMPTS * NEW and len({token for each in made for token in each.sequences_ids[0]}) > 50


def test_a_gguf_of_the_folder_holds_its_weights(export: Path, tmp_path: Path) -> None:
    """bench/peers/make_models.py writes GGUF as llama.cpp's converter does; gguf's own reader reads it, llama.cpp evaluates it."""
    gguf: Any = pytest.importorskip("gguf", reason="gguf is not installed")
    path = Path(__file__).parents[2] / "bench/peers/make_models.py"
    spec = importlib.util.spec_from_file_location("gptfast_make_models", path)
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    target = tmp_path / "f32.gguf"
    make.write_gguf(export, target, "f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(target)).tensors}
    state = GPT2LMHeadModel.from_pretrained(export).state_dict()
    assert np.array_equal(tensors["token_embd.weight"], state["transformer.wte.weight"].numpy())
    assert np.array_equal(tensors["blk.1.attn_qkv.weight"], state["transformer.h.1.attn.c_attn.weight"].t().numpy())
    assert len(tensors) == len(state) - 1  # the head is the token embedding
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    llama = llama_cpp.Llama(str(target), n_ctx=64, logits_all=True, verbose=False)
    ids = torch.randint(0, 299, (20,))
    llama.eval(ids.tolist())
    expected = GPT2LMHeadModel.from_pretrained(export)(ids[None]).logits[0].detach().numpy()
    # its keys, values and gelu are in fp16
    assert np.abs(np.asarray(llama.scores)[:20] - expected).max() < 1e-2 * np.abs(expected).max()
