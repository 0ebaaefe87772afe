"""Engine: one answer and many, streaming, stopping, seeds, log-probabilities, and what fails alone."""

import pytest
import torch

from gptfast import Engine, Error, GPT2LMHeadModel, LoadError, SamplingParams

SAMPLED = {"temperature": 1.0, "top_k": 40, "max_tokens": 16, "seed": 5, "ignore_eos": True}


def test_the_same_seed_gives_the_same_answer_alone_and_in_a_batch(engine):
    prompts = ["The quick", "dog", "", "over the lazy dog, and the"]
    params = [SamplingParams(**{**SAMPLED, "seed": seed, "top_p": p}) for seed, p in enumerate((1.0, 0.9, 0.95, 1.0))]
    together = engine.generate(prompts, params)
    for prompt, p, answer in zip(prompts, params, together, strict=True):
        alone = engine.generate(prompt, p)[0]
        assert alone.token_ids == answer.token_ids and alone.text == answer.text and len(alone.token_ids) == 16
    assert engine.generate("dog", SamplingParams(**{**SAMPLED, "seed": 99}))[0].token_ids != together[1].token_ids


def test_batches_do_not_change_answers(folder):
    params = SamplingParams(**SAMPLED, n=3)
    with Engine(folder, device="cpu", batch=4) as small, Engine(folder, device="cpu", batch=64) as large:
        prompts = ["a", "the dog", "fox", "jumps over"]
        assert [c.token_ids for c in small.generate(prompts, params)] == [c.token_ids for c in large.generate(prompts, params)]


def test_a_drawn_seed_is_returned_and_repeats_the_answer(engine):
    params = SamplingParams(temperature=1.0, top_k=0, max_tokens=12)
    first, second = engine.generate(["dog", "dog"], params)
    assert first.seed != second.seed and first.token_ids != second.token_ids
    again = engine.generate("dog", SamplingParams(temperature=1.0, top_k=0, max_tokens=12, seed=second.seed))[0]
    assert again.token_ids == second.token_ids


def test_seeds_above_int64_are_their_bits(engine):
    low, high = (engine.generate("dog", SamplingParams(**{**SAMPLED, "seed": s}))[0] for s in (-1, 2**64 - 1))
    assert low.token_ids == high.token_ids


def test_choices_are_independent_and_the_first_is_that_of_one(engine):
    answers = engine.generate(["The quick", "fox"], SamplingParams(**SAMPLED, n=4))
    assert [(a.prompt, a.index) for a in answers] == [(p, i) for p in range(2) for i in range(4)]
    assert len({tuple(a.token_ids) for a in answers[:4]}) == 4
    assert answers[0].token_ids == engine.generate("The quick", SamplingParams(**SAMPLED))[0].token_ids


def test_choices_share_the_prompts_pass(engine, monkeypatch):
    seen = []
    forward = GPT2LMHeadModel.forward
    monkeypatch.setattr(GPT2LMHeadModel, "forward", lambda self, *a, **k: seen.append(len(a[0])) or forward(self, *a, **k))
    engine.generate(["The quick", "fox"], SamplingParams(**{**SAMPLED, "max_tokens": 3}, n=4))
    assert seen == [2, 8, 8]


@pytest.mark.parametrize("values", [{}, {"stop": ("o", "th")}, {"n": 2}, {"logprobs": 2}, {"temperature": 0.0}])
def test_streamed_pieces_join_to_the_answer(engine, values):
    params = SamplingParams(**{**SAMPLED, "top_k": 0, "max_tokens": 40, **values})
    whole = engine.generate("The quick", params)
    pieces = list(engine.stream("The quick", params))
    for answer in whole:
        mine = [p for p in pieces if p.index == answer.index]
        assert "".join(p.text for p in mine) == answer.text
        assert [t for p in mine for t in p.token_ids] == answer.token_ids
        assert [v for p in mine for v in p.logprobs] == answer.logprobs
        assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + [answer.finish_reason]
        assert answer.top_logprobs == ([t for p in mine for t in p.top_logprobs] if "logprobs" in values else None)


def test_a_stream_may_be_left_early(engine):
    stream = engine.stream("The", SamplingParams(**SAMPLED))
    next(stream)
    stream.close()
    with pytest.raises(Error, match="prompt has 65 tokens"):
        engine.stream([5] * 65)
    assert engine.generate("The", SamplingParams(**SAMPLED))[0].finish_reason == "length"


def test_stop_strings_end_the_answer_and_are_not_part_of_it(engine):
    ascii_only = tuple(i for i in range(299) if engine.tokenizer.token_bytes(i).isascii())
    values = {**SAMPLED, "max_tokens": 40, "allowed_tokens": ascii_only}
    free = engine.generate("The quick", SamplingParams(**values))[0]
    stop = free.text[7:11]
    answer = engine.generate("The quick", SamplingParams(**values, stop=(stop, "never there")))[0]
    assert answer.finish_reason == "stop" and answer.text == free.text[: free.text.index(stop)]
    assert answer.token_ids == free.token_ids[: len(answer.token_ids)] and len(answer.token_ids) < 40


def test_stop_tokens_end_the_answer_and_their_text_is_left_out(engine):
    free = engine.generate("dog", SamplingParams(**SAMPLED))[0]
    stop = free.token_ids[5]
    answer = engine.generate("dog", SamplingParams(**SAMPLED, stop_token_ids=(stop,)))[0]
    end = free.token_ids.index(stop)
    assert answer.finish_reason == "stop" and answer.token_ids == free.token_ids[: end + 1]
    assert answer.text == b"".join(map(engine.tokenizer.token_bytes, free.token_ids[:end])).decode(errors="replace")


def test_the_models_end_of_text_ends_unless_ignored(engine):
    end = engine.tokenizer.eos_token_id
    forced = {**SAMPLED, "logit_bias": {end: float("inf")}, "max_tokens": 3}
    ignored = engine.generate("dog", SamplingParams(**forced))[0]
    assert ignored.token_ids == [end] * 3 and ignored.finish_reason == "length"
    ended = engine.generate("dog", SamplingParams(**{**forced, "ignore_eos": False}))[0]
    assert ended.token_ids == [end] and ended.text == "" and ended.finish_reason == "stop"


def test_min_tokens_keeps_ends_away(engine):
    end = engine.tokenizer.eos_token_id
    params = {**SAMPLED, "ignore_eos": False, "logit_bias": {end: 1000.0, 7: 900.0}, "stop_token_ids": (7,), "min_tokens": 4}
    answer = engine.generate("dog", SamplingParams(**params))[0]
    assert len(answer.token_ids) == 5 and answer.token_ids[4] == end and not {end, 7} & set(answer.token_ids[:4])


def test_allowed_and_banned_tokens(engine):
    allowed = engine.generate("dog", SamplingParams(**SAMPLED, allowed_tokens=(3, 5, 8), banned_tokens=(5,)))[0]
    assert set(allowed.token_ids) == {3, 8}
    none = SamplingParams(**SAMPLED, allowed_tokens=(3,), banned_tokens=(3,))
    nothing = engine.generate(["dog", "fox"], [none, SamplingParams(**SAMPLED)])
    assert nothing[0].token_ids == [] and nothing[0].finish_reason == "stop" and len(nothing[1].token_ids) == 16
    pieces = list(engine.stream("dog", none))
    assert [(p.token_ids, p.logprobs, p.finish_reason) for p in pieces] == [([], [], "stop")]


@pytest.mark.parametrize("order", ["gptfast", "llama.cpp"])
def test_penalties_reach_the_loop(engine, order):
    greedy = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "order": order}
    plain = engine.generate("The quick", SamplingParams(**greedy))[0].token_ids
    assert len(set(plain)) < 30
    for penalty in ({"presence_penalty": 1e6}, {"frequency_penalty": 1e6}, {"repetition_penalty": 1e6}):
        answer = engine.generate("The quick", SamplingParams(**greedy, **penalty))[0].token_ids
        assert len(set(answer)) == 30


def test_repetition_sees_the_prompt_and_presence_does_not(engine):
    prompt = engine.tokenizer.encode("The quick brown fox")
    only = SamplingParams(temperature=0.0, max_tokens=1, allowed_tokens=(prompt[0], 200), presence_penalty=1e6)
    bias = {prompt[0]: 500.0, 200: 50.0}
    assert engine.generate([prompt], SamplingParams(**{**vars(only), "logit_bias": bias}))[0].token_ids == [prompt[0]]
    penalty = {"presence_penalty": 0.0, "repetition_penalty": 1e6}
    assert engine.generate([prompt], SamplingParams(**{**vars(only), "logit_bias": bias, **penalty}))[0].token_ids == [200]


def test_different_orders_share_a_batch(engine):
    params = [SamplingParams(**{**SAMPLED, "temperature": 0.5, "top_p": 0.8, "order": o}) for o in ("gptfast", "llama.cpp", "vllm")]
    together = engine.generate(["dog"] * 3, params)
    assert [a.token_ids for a in together] == [engine.generate("dog", p)[0].token_ids for p in params]


def test_nan_logits_fail_that_request_alone(engine, monkeypatch):
    forward = GPT2LMHeadModel.forward
    passes = []

    def broken(self, *arguments, **more):
        output = forward(self, *arguments, **more)
        passes.append(None)
        if len(passes) == 3:
            output.logits[1, -1, 4] = float("nan")
        return output

    expected = engine.generate(["The quick", "fox", "dog"], SamplingParams(**SAMPLED))
    monkeypatch.setattr(GPT2LMHeadModel, "forward", broken)
    answers = engine.generate(["The quick", "fox", "dog"], SamplingParams(**SAMPLED))
    assert [a.finish_reason for a in answers] == ["length", "error", "length"] and "NaN" in (answers[1].error or "")
    assert answers[1].token_ids == expected[1].token_ids[:2]
    assert [answers[i].token_ids for i in (0, 2)] == [expected[i].token_ids for i in (0, 2)]


def test_the_context_ends_an_answer_and_never_slides(engine):
    prompt = [5] * 60
    answer = engine.generate([prompt, [5] * 64], SamplingParams(**{**SAMPLED, "max_tokens": 100}))
    assert len(answer[0].token_ids) == 4 and answer[0].finish_reason == "length"
    assert answer[1].token_ids == [] and answer[1].finish_reason == "length"
    with pytest.raises(Error, match="prompt has 65 tokens, the model's context is 64"):
        engine.generate([[5] * 65])


def test_an_empty_prompt_starts_from_the_end_of_text(engine):
    end = engine.tokenizer.eos_token_id
    empty, started, listed = engine.generate(["", [end], []], SamplingParams(**SAMPLED))
    assert empty.token_ids == started.token_ids == listed.token_ids
    assert engine.generate([], SamplingParams(**SAMPLED)) == []
    assert engine.generate("dog", SamplingParams(max_tokens=0))[0].token_ids == []


def test_log_probabilities(engine):
    answer = engine.generate("dog", SamplingParams(**SAMPLED, logprobs=3))[0]
    ids = [*engine.tokenizer.encode("dog"), *answer.token_ids]
    with torch.no_grad():
        expected = engine.model(torch.tensor([ids])).logits[0, -17:-1].log_softmax(1)
    for i, (token, value, top) in enumerate(zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True)):
        assert value == pytest.approx(float(expected[i, token]), abs=1e-4)
        assert list(top) == expected[i].topk(3).indices.tolist() and top.get(token, value) == value


def test_ids_without_a_text_are_never_drawn(folder, tmp_path):
    import json
    import shutil

    shutil.copytree(folder, tmp_path / "padded")
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.config.vocab_size += 20
    grown = GPT2LMHeadModel(model.config)
    grown.save_pretrained(tmp_path / "padded")
    assert json.loads((tmp_path / "padded/config.json").read_text())["vocab_size"] == 320
    with Engine(tmp_path / "padded", device="cpu") as padded:
        answers = padded.generate("dog", SamplingParams(temperature=1e6, top_k=0, max_tokens=40, n=8, ignore_eos=True))
        assert max(token for a in answers for token in a.token_ids) < 300


@pytest.mark.parametrize(
    "arguments", [{"dtype": "int3"}, {"dtype": "int8"}, {"threads": 0}, {"device": "tpu"}, {"batch": 0}, {"threads": True}]
)
def test_bad_arguments_of_the_engine(folder, arguments):
    with pytest.raises(Error, match=f"{next(iter(arguments))} is"):
        Engine(folder, **arguments)


def test_bad_requests(engine, tmp_path):
    with pytest.raises(Error, match="2 prompts and 1 params"):
        engine.generate(["a", "b"], [SamplingParams()])
    for prompts in ([[1, 300]], [[-1]], [["a"]], [5]):
        with pytest.raises(Error, match="prompt"):
            engine.generate(prompts)
    with pytest.raises(Error, match="banned_tokens holds token id 300"):
        engine.generate("a", SamplingParams(banned_tokens=(300,)))
    with pytest.raises(LoadError):
        Engine(tmp_path)


def test_close_gives_back_threads_and_refuses_work(folder):
    before = torch.get_num_threads()
    with Engine(folder, threads=before + 1, device="cpu") as engine:
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    engine.close()
    with pytest.raises(Error, match="closed"):
        engine.generate("a")


def test_bf16(folder):
    with Engine(folder, dtype="bf16", device="cpu") as engine:
        assert engine.model.dtype == torch.bfloat16
        assert len(engine.generate("dog", SamplingParams(**SAMPLED))[0].token_ids) == 16
