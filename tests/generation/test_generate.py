"""model.generate: defaults, padding, shapes, the settings' order of precedence, and every refusal by name."""

import pytest
import torch

from gptfast import Error, GPT2Config, GPT2LMHeadModel
from gptfast.generation.generate import GenerateOutput
from gptfast.generation.parameters import SamplingParams

IDS = torch.tensor([[5, 9, 200, 31], [7, 7, 8, 90]])


def greedy_by_hand(model, ids, count):
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


def test_default_is_greedy_with_20_new_tokens(model):
    out = model.generate(IDS, eos_token_id=-1)
    assert out.shape == (2, 24) and torch.equal(out, greedy_by_hand(model, IDS, 20)) and out.dtype == torch.int64


def test_generation_leaves_the_mode_and_gradients_alone(model):
    model.train()
    try:
        torch.manual_seed(1)
        out = model.generate(IDS, max_new_tokens=5)
        assert model.training and torch.equal(out, model.generate(IDS, max_new_tokens=5)) and not out.requires_grad
    finally:
        model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3}])
def test_padded_prompts_equal_their_own(model, side, more):
    prompts = [[5, 9, 200, 31, 8], [7, 7], [11]]
    ids, mask = torch.full((3, 5), 299), torch.zeros(3, 5, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(5 - len(prompt), 5) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=-1, **more)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8, eos_token_id=-1, **more)
        assert out[row, 5:].tolist() == alone[0, len(prompt) :].tolist() and torch.equal(out[row, :5], ids[row])


def test_a_pad_id_that_is_no_end_is_padding(model):
    padded = torch.tensor([[250, 250, 5, 9]])
    out = model.generate(padded, pad_token_id=250, eos_token_id=-1)
    assert torch.equal(out[:, 4:], model.generate(torch.tensor([[5, 9]]), eos_token_id=-1)[:, 2:])
    assert not torch.equal(out[:, 4:], model.generate(padded, eos_token_id=-1)[:, 4:])


def test_rows_are_padded_after_their_end(model):
    free = model.generate(IDS, eos_token_id=-1)[:, 4:]
    end = int(free[0, 3])
    out = model.generate(IDS, eos_token_id=end, pad_token_id=299, return_dict_in_generate=True)
    for row in range(2):
        new = free[row].tolist()
        stop = new.index(end) + 1 if end in new else 20
        assert out.sequences[row, 4 : 4 + stop].tolist() == new[:stop] and bool((out.sequences[row, 4 + stop :] == 299).all())
        assert out.finish_reasons[row] == ("stop" if end in new else "length") and bool((out.logprobs[row, stop:] == 0).all())


def test_dictionary_output(model):
    out = model.generate(IDS, do_sample=True, num_return_sequences=3, max_new_tokens=6, logprobs=2, return_dict_in_generate=True)
    assert isinstance(out, GenerateOutput) and out["sequences"].shape == (6, 10) and out.logprobs.shape == (6, 6)
    assert len(set(out.seeds)) == 2 and "sequences_scores" not in set(out.keys()) and len(out.top_logprobs[0][0]) == 2
    for row, seed in enumerate(out.seeds):
        again = model.generate(
            IDS[row // 3 : row // 3 + 1], do_sample=True, num_return_sequences=3, max_new_tokens=6, seed=seed,
        )
        assert torch.equal(again[row % 3], out.sequences[row])
    with torch.no_grad():
        logits = model(out.sequences).logits[:, 3:-1].log_softmax(-1)
    assert torch.allclose(logits.gather(2, out.sequences[:, 4:, None])[..., 0], out.logprobs, atol=1e-4)


def test_torch_manual_seed_repeats_sampling(model):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(IDS, do_sample=True, top_k=0, temperature=2.0))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_do_sample_has_hugging_faces_top_k_of_50(model):
    out = model.generate(IDS[:1], do_sample=True, seed=1, temperature=1e4, num_return_sequences=400, max_new_tokens=1)
    assert len(set(out[:, 4].tolist())) == 50


def test_inputs_embeds_continue_like_ids(model):
    embeds = model.transformer.wte(IDS)
    for more in ({}, {"num_beams": 2}):
        expected = model.generate(IDS, max_new_tokens=6, **more)[:, 4:]
        assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=6, **more), expected)
    left = torch.cat((torch.full_like(embeds[:, :1], float("nan")), embeds), 1)
    mask = torch.tensor([[0, 1, 1, 1, 1]] * 2)
    out = model.generate(inputs_embeds=left, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(out, model.generate(IDS, max_new_tokens=6)[:, 4:])


def test_precedence_call_file_default(model):
    model.generation_config = {"max_new_tokens": 3, "do_sample": False, "transformers_version": "5.0", "use_cache": True}
    try:
        assert model.generate(IDS).shape == (2, 7) and model.generate(IDS, max_new_tokens=5).shape == (2, 9)
        assert model.generate(IDS, max_length=6).shape == (2, 6)
        assert model.generate(IDS, generation_config={"max_new_tokens": 2}).shape == (2, 6)
        model.generation_config = {"penalty_alpha": 0.6}
        with pytest.raises(Error, match=r"generation_config: argument penalty_alpha=0.6 is not supported"):
            model.generate(IDS)
    finally:
        model.generation_config = {}


def test_bad_words_and_suppressed_tokens(model):
    free = model.generate(IDS[:1], eos_token_id=-1)[0, 4:].tolist()
    single = model.generate(IDS[:1], bad_words_ids=[[free[0]]], suppress_tokens=[free[1]], eos_token_id=-1)[0, 4:].tolist()
    assert not {free[0], free[1]} & set(single)
    pair = model.generate(IDS[:1], bad_words_ids=[[31, free[0]], [free[1], free[2]]], eos_token_id=-1)[0].tolist()
    assert pair[4] != free[0] and [free[1], free[2]] not in [pair[i : i + 2] for i in range(len(pair))]


def test_min_new_tokens_and_min_length(model):
    first = int(model.generate(IDS[:1], max_new_tokens=1)[0, 4])
    for more, count in (({"min_new_tokens": 3}, 3), ({"min_length": 7}, 3), ({}, 0)):
        out = model.generate(IDS[:1], eos_token_id=first, return_dict_in_generate=True, **more)
        assert first not in out.sequences[0, 4 : 4 + count].tolist()
        assert (out.sequences.shape[1] == 5) == (count == 0)


def test_stop_strings(model, tokenizer):
    ascii_ids = [i for i in range(300) if not tokenizer.token_bytes(i).isascii()]
    free = model.generate(IDS[:1], suppress_tokens=ascii_ids, repetition_penalty=5.0, max_new_tokens=10)[0, 4:].tolist()
    text = b"".join(map(tokenizer.token_bytes, free)).decode()
    out = model.generate(
        IDS[:1], suppress_tokens=ascii_ids, repetition_penalty=5.0, max_new_tokens=10, stop_strings=[text[3:6]], tokenizer=tokenizer
    )
    got = out[0, 4:].tolist()
    assert got == free[: len(got)] and text[3:6] in b"".join(map(tokenizer.token_bytes, got)).decode()
    assert text[3:6] not in b"".join(map(tokenizer.token_bytes, got[:-1])).decode()


def test_empty_prompts_start_from_bos(model):
    start = torch.tensor([[299]])
    expected = model.generate(start, eos_token_id=-1)
    assert torch.equal(model.generate(eos_token_id=-1), expected)
    assert torch.equal(model.generate(torch.zeros(2, 0, dtype=torch.int64), eos_token_id=-1), expected.expand(2, -1))
    masked = model.generate(torch.tensor([[250, 250]]), attention_mask=torch.zeros(1, 2), eos_token_id=-1)
    assert torch.equal(masked[:, 2:], expected[:, 1:])


def test_the_context_is_the_end(model):
    out = model.generate(torch.full((1, 60), 5), max_new_tokens=30, eos_token_id=-1, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 64) and out.finish_reasons == ["length"]
    assert model.generate(torch.full((1, 60), 5), num_beams=2, max_new_tokens=30, eos_token_id=-1).shape == (1, 64)
    assert model.generate(torch.full((1, 64), 5)).shape == (1, 64)
    for more in ({}, {"num_beams": 2}):
        with pytest.raises(Error, match="prompt has 65 tokens, the model's context is 64"):
            model.generate(torch.full((1, 65), 5), **more)


def test_nan_is_reported(model):
    broken = GPT2LMHeadModel(model.config)
    broken.load_state_dict(model.state_dict())
    broken.transformer.ln_f.bias.data[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="NaN"):
        out = broken.generate(IDS, return_dict_in_generate=True)
    assert out.finish_reasons == ["error", "error"] and out.sequences.shape == (2, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output_scores": True}, "output_scores=True is supported with num_beams > 1"),
        ({"temprature": 1}, "argument temprature is not supported"), ({"penalty_alpha": 0.5}, "argument penalty_alpha=0.5 is not"),
        ({"no_repeat_ngram_size": 2}, "argument no_repeat_ngram_size=2"), ({"use_cache": False}, "argument use_cache=False"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_length": 4}, "max_length is 4"), ({"num_beams": 0}, "num_beams is"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"), ({"do_sample": 1}, "do_sample is 1"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"), ({"do_sample": True, "top_p": 2}, "top_p is 2"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0"), ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is"),
        ({"do_sample": True, "num_beams": 2}, "do_sample"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping"), ({"num_beams": 2, "length_penalty": None}, None),
        ({"num_beams": 2, "length_penalty": "x"}, "length_penalty"), ({"stop_strings": ["a"]}, "tokenizer"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"), ({"bad_words_ids": [[300]]}, "300"), ({"eos_token_id": "x"}, "eos_token_id"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"), ({"seed": 0.5}, "seed is 0.5"), ({"logprobs": -1}, "logprobs"),
        ({"generation_config": 3}, "generation_config"), ({"inputs_embeds": torch.zeros(1, 2, 32)}, "not both"),
        ({"repetition_penalty": -1}, "repetition_penalty"), ({"output_logits": True}, "output_logits=True"),
    ],
)
def test_refused_by_name(model, arguments, message):
    if message is None:  # None means the default, as in transformers
        assert model.generate(IDS, **arguments).shape == (2, 24)
        return
    with pytest.raises(Error, match=message):
        model.generate(IDS, **arguments)


def test_refused_prompts(model):
    for ids in (torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)):
        with pytest.raises(Error, match="input_ids"):
            model.generate(ids)
    with pytest.raises(Error, match="300"):
        model.generate(torch.tensor([[1, 300]]))
    with pytest.raises(Error, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 31))


def test_beams_find_what_exhaustive_search_finds():
    """Three tokens, no end: with as many beams as there are texts, the best one is the most probable of all."""
    torch.manual_seed(5)
    tiny = GPT2LMHeadModel(GPT2Config(3, 8, 16, 2, 2, initializer_range=1.0, bos_token_id=0, eos_token_id=0)).eval()
    start = torch.tensor([[0]])
    texts = torch.cartesian_prod(*[torch.arange(3)] * 4)
    with torch.no_grad():
        logprobs = tiny(torch.cat((start.expand(81, 1), texts), 1)).logits[:, :-1].log_softmax(-1)
    total = logprobs.gather(2, texts[:, :, None]).sum((1, 2))
    settings = {"num_beams": 81, "num_return_sequences": 5, "length_penalty": 0.0, "max_new_tokens": 4, "eos_token_id": -1}
    out = tiny.generate(start, **settings, return_dict_in_generate=True)
    best = total.topk(5)
    assert torch.equal(out.sequences[:, 1:], texts[best.indices]) and torch.allclose(out.sequences_scores, best.values, atol=1e-5)


def test_settings_reach_the_sampler(model):
    """generate(do_sample) is the Engine's sampling with the same numbers."""
    from gptfast.generation.loop import decode
    from gptfast.generation.rows import Row

    numbers = {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3}
    row = Row(IDS[0].tolist(), SamplingParams(**numbers), 77, 12, frozenset(), start=4)
    for _ in decode(model, [[row]]):
        pass
    out = model.generate(IDS[:1], do_sample=True, seed=77, max_new_tokens=12, eos_token_id=-1, **numbers)
    assert out[0, 4:].tolist() == row.tokens
