"""Sampling's edge cases on every engine, through a model whose logits are known: these numbers, whatever the text."""

import math

import pytest
import torch

from gptfast import Error, GPT2Config, GPT2LMHeadModel, SamplingParams

INF, NAN = float("inf"), float("nan")
V = 300  # ids of the tokenizer; the last one is <|endoftext|>
FREE = {"temperature": 1.0, "top_k": 0, "ignore_eos": True, "seed": 5}


@pytest.fixture
def known(open_on, tokenizer, tmp_path):
    """known({id: logit}, rest): every engine on a model that has these logits after any text."""

    def make(logits, rest=-40.0, vocab=V):
        config = GPT2Config(vocab, 64, 32, 1, 2, tie_word_embeddings=False, bos_token_id=V - 1, eos_token_id=V - 1)
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.zero_()
            model.transformer.ln_f.bias[0] = 1.0
            model.lm_head.weight.zero_()
            model.lm_head.weight[:, 0] = rest
            for token, value in logits.items():
                model.lm_head.weight[token, 0] = value
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return open_on(tmp_path)

    return make


def drawn(engine, count=40, n=5, prompt="dog", **params):
    """All ids of n answers of `count` tokens."""
    answers = engine.generate(prompt, SamplingParams(**{**FREE, **params}, max_tokens=count, n=n))
    assert all(answer.finish_reason == "length" for answer in answers)
    return [token for answer in answers for token in answer.token_ids]


# -------------------------------------------------------------------------------------------------------------- ties and filters


@pytest.mark.parametrize(
    "greedy", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-42}, {"temperature": 1e-8}], ids=str
)
def test_greedy_takes_the_lowest_of_equal_ids(known, greedy):
    with known({9: 3.0, 7: 3.0, 250: 3.0, 5: 2.0}) as engine:
        if greedy == {"temperature": 1e-8}:  # a draw, in which only equal ones are left
            assert set(drawn(engine, **greedy)) == {7, 9, 250}
        else:
            assert set(drawn(engine, 10, 2, **greedy)) == {7}


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {5, 10, 11, 12}), ({"top_p": 0.75}, {5, 10, 11, 12}), ({"top_p": 0.7}, {5}),
        ({"min_p": 0.1}, {5, 10, 11, 12}), ({"min_p": 1.0}, {5}), ({"min_p": 0.2}, {5}),
    ],
    ids=str,
)
def test_ties_at_a_boundary_are_all_kept(known, filters, kept):
    """Masses 0.71, three times 0.096, and 0.0001."""
    with known({5: 4.0, 10: 2.0, 11: 2.0, 12: 2.0, 13: -5.0}) as engine:
        assert set(drawn(engine, **filters)) == kept


def test_several_of_the_best_are_kept_by_every_filter(known):
    with known({3: 2.0, 4: 2.0, 6: 1.0}) as engine:
        for filters in ({"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 2}):
            assert set(drawn(engine, **filters)) == {3, 4}, filters


@pytest.mark.parametrize(
    "off",
    [*({"top_k": k} for k in (-1, V, V + 1, 2**31, 2**62)), {"top_p": 1.0}, {"min_p": 0.0}, {"typical_p": 1.0}],
    ids=str,
)
def test_off_is_off_bit_for_bit(known, off):
    with known({i: math.sin(i) * 3 for i in range(V)}) as engine:
        params = {**FREE, "max_tokens": 50, "logprobs": 2}
        plain, other = (engine.generate("dog", SamplingParams(**{**params, **more}))[0] for more in ({}, off))
        assert plain == other and len(set(plain.token_ids)) > 20


@pytest.mark.parametrize("temperature", [1e30, 3e38])
def test_extreme_temperatures_draw_anything(known, temperature):
    with known({3: 30.0}) as engine:
        assert len(set(drawn(engine, temperature=temperature))) > 100


@pytest.mark.parametrize(
    ("order", "filters", "kept"),
    [
        # a nucleus of 0.9 needs three at temperature 1, two at 0.5; llama.cpp applies the temperature last
        ("gptfast", {"temperature": 0.5, "top_p": 0.9}, {0, 1}), ("hf", {"temperature": 0.5, "top_p": 0.9}, {0, 1}),
        ("vllm", {"temperature": 0.5, "top_p": 0.9}, {0, 1}), ("llama.cpp", {"temperature": 0.5, "top_p": 0.9}, {0, 1, 2}),
        # min_p first drops two and renormalises: a nucleus of 0.72 is then one token instead of two
        ("gptfast", {"top_p": 0.72, "min_p": 0.2}, {0, 1}), ("vllm", {"top_p": 0.72, "min_p": 0.2}, {0}),
    ],
)  # fmt: skip
def test_orders_reach_the_draw(known, order, filters, kept):
    with known({0: 2.0, 1: 1.0, 2: 0.0, 3: -1.0}) as engine:
        assert set(drawn(engine, 60, 8, order=order, **filters)) == kept


# ------------------------------------------------------------------------------------------------------------- what is not a number


def test_nan_ends_the_answer_with_an_error(known):
    """Also where the id is banned: what the model says is not to be trusted."""
    with known({8: NAN, 3: 1.0}) as engine:
        for params in ({}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.9}, {"banned_tokens": (8,)}):
            (answer,) = engine.generate("dog", SamplingParams(**{**FREE, **params}))
            assert answer.finish_reason == "error" and "NaN" in answer.error and answer.token_ids == [] == answer.logprobs
        assert engine.generate("", SamplingParams(max_tokens=0))[0].finish_reason == "length"


def test_a_row_of_nan_weights_fails_the_prompt_that_reads_it(open_on, tokenizer, tmp_path):
    """Token 50's embedding is NaN; prompts without it have the answers that they have alone."""
    torch.manual_seed(0)
    config = GPT2Config(V, 64, 32, 2, 4, tie_word_embeddings=False, initializer_range=0.3, bos_token_id=V - 1, eos_token_id=V - 1)
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data[50] = NAN
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with open_on(tmp_path) as engine:
        params = SamplingParams(**FREE, max_tokens=12, banned_tokens=(50,))
        prompts = [[1, 2, 3], [4, 50, 6], [7] * 30, [50]]
        answers = engine.generate(prompts, params)
        assert [answer.finish_reason for answer in answers] == ["length", "error", "length", "error"]
        for i in (0, 2):
            assert answers[i].token_ids == engine.generate([prompts[i]], params)[0].token_ids
        assert engine.generate([[4, 5, 6]], params)[0].finish_reason == "length", "its pages serve others"


def test_plus_infinity_forces_the_lowest(known):
    bias = {"logit_bias": {20: INF, 10: INF, 5: 100.0}}
    with known({3: 30.0}) as engine:
        assert set(drawn(engine, 10, 2, **bias)) == {10}
        assert set(drawn(engine, 10, 2, **bias, banned_tokens=(10,))) == {20}
        assert set(drawn(engine, 10, 2, top_k=1, top_p=0.1, logit_bias={20: INF})) == {20}


def test_an_infinite_logit_of_the_model_forces(known):
    with known({30: INF, 40: INF, 3: 30.0}) as engine:
        if "int" in engine.describe():
            pytest.skip("an infinite weight has no code: its logit is NaN")
        assert set(drawn(engine, 10, 2)) == {30}
        assert set(drawn(engine, 10, 2, banned_tokens=(30, 40))) == {3}
        (answer,) = engine.generate("dog", SamplingParams(**FREE, max_tokens=1, logprobs=2))
        assert answer.logprobs == pytest.approx([-math.log(2)]) and set(answer.top_logprobs[0]) == {30, 40}


def test_excluded_ids_are_not_merely_improbable(known):
    """What may be drawn is 10^39 times less probable than what may not."""
    with known({1: 50.0, 2: -40.0, 4: -40.5}, rest=40.0) as engine:
        assert set(drawn(engine, allowed_tokens=(2, 4))) == {2, 4}
        assert set(drawn(engine, logit_bias={i: -INF for i in range(V) if i not in (2, 4)})) == {2, 4}
        assert set(drawn(engine, 5, 1, allowed_tokens=(2, 4), temperature=0.0)) == {2}


def test_nothing_allowed_ends_with_stop(known):
    with known({1: 1.0}) as engine:
        none = {"banned_tokens": tuple(range(V))}
        for params in (none, {**none, "temperature": 0.0}, {"logit_bias": dict.fromkeys(range(V), -INF)}, {"allowed_tokens": ()}):
            answers = engine.generate(["dog", "fox"], [SamplingParams(**{**FREE, **params}), SamplingParams(**FREE, max_tokens=3)])
            assert (answers[0].finish_reason, answers[0].token_ids, len(answers[1].token_ids)) == ("stop", [], 3)


@pytest.mark.parametrize("padding", [90.0, INF, NAN])
def test_padded_vocabulary_is_never_sampled(known, padding):
    """320 rows, 300 of them with a text."""
    with known({3: 1.0, **dict.fromkeys(range(V, V + 20), padding)}, vocab=V + 20, rest=0.0) as engine:
        assert max(drawn(engine, 40, 4, temperature=3.0)) < V
        assert drawn(engine, 3, 1, temperature=0.0) == [3] * 3
        (answer,) = engine.generate("dog", SamplingParams(**FREE, max_tokens=2, logprobs=V))
        (top, _) = answer.top_logprobs
        assert len(top) == V and sum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-4)
        with pytest.raises(Error, match=f"0 to {V - 1}"):
            engine.generate([[V]])


# ------------------------------------------------------------------------------------------------------------- log-probabilities


def test_log_probabilities_are_the_models_whatever_the_filters(known):
    logits = {0: 2.0, 1: 1.0, 2: 0.0, 3: -1.0}
    expected = torch.tensor([logits.get(i, -40.0) for i in range(V)]).log_softmax(0)
    with known(logits) as engine:
        for filters in ({}, {"temperature": 0.3}, {"top_k": 2}, {"banned_tokens": (0,)}, {"temperature": 0.0}):
            (answer,) = engine.generate("dog", SamplingParams(**{**FREE, **filters}, max_tokens=9, logprobs=3))
            assert answer.logprobs == pytest.approx([float(expected[token]) for token in answer.token_ids], abs=1e-5)
            assert all(list(top) == [0, 1, 2] for top in answer.top_logprobs)


def test_processed_log_probabilities_are_those_of_the_draw(known):
    with known({0: 2.0, 1: 1.0, 2: 0.0, 3: -1.0}) as engine:
        params = {**FREE, "temperature": 0.5, "top_k": 2, "logprobs": 3, "logprobs_mode": "processed", "max_tokens": 9}
        (answer,) = engine.generate("dog", SamplingParams(**params))
        two = torch.tensor([4.0, 2.0]).log_softmax(0)
        assert answer.logprobs == pytest.approx([float(two[token]) for token in answer.token_ids], abs=1e-5)
        assert all(list(top.values())[2] == -INF for top in answer.top_logprobs)


def test_the_number_of_log_probabilities(known):
    with known({0: 2.0, 1: 1.0}) as engine:
        for count, shown in ((None, None), (0, None), (2, 2), (1000, V)):
            (answer,) = engine.generate("dog", SamplingParams(**FREE, max_tokens=3, logprobs=count))
            assert len(answer.logprobs) == 3 and not any(map(math.isnan, answer.logprobs))
            assert (answer.top_logprobs and len(answer.top_logprobs[0])) == shown


# ------------------------------------------------------------------------------------------------------------------------- lengths


def test_the_whole_context_and_nothing(engine):
    for length, room in ((64, 0), (63, 1), (1, 63)):
        (answer,) = engine.generate([[5] * length], SamplingParams(**FREE, max_tokens=1000))
        assert (len(answer.token_ids), answer.finish_reason, answer.prompt_tokens) == (room, "length", length)
    with pytest.raises(Error, match="prompt has 65 tokens, the model's context is 64"):
        engine.generate([[5] * 65])
    assert engine.generate("", SamplingParams(max_tokens=0))[0].token_ids == []
