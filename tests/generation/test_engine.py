"""Engine: one answer and many, streaming, stopping, seeds, log-probabilities, and what fails alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import gptfast.backend as backend
from gptfast import Engine, Error, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, LoadError, SamplingParams, packed
from gptfast.generation.loading import cpp_reason

SAMPLED = {"temperature": 1.0, "top_k": 40, "max_tokens": 16, "seed": 5, "ignore_eos": True}


@pytest.fixture
def eager_engine(folder):
    with backend.use("eager"), Engine(folder, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def slow_folder(folder, tmp_path_factory):
    """A model that is at its answer for some seconds."""
    path = tmp_path_factory.mktemp("slow")
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(len(tokenizer), 4096, 256, 8, 4, initializer_range=0.1, bos_token_id=299, eos_token_id=299)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


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


def test_choices_share_the_prompts_pass(eager_engine, monkeypatch):
    seen = []
    forward = GPT2LMHeadModel.forward
    monkeypatch.setattr(GPT2LMHeadModel, "forward", lambda self, *a, **k: seen.append(len(a[0])) or forward(self, *a, **k))
    eager_engine.generate(["The quick", "fox"], SamplingParams(**{**SAMPLED, "max_tokens": 3}, n=4))
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


def test_nan_logits_fail_that_request_alone(eager_engine, monkeypatch):
    engine = eager_engine
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
    assert answer.logprobs == pytest.approx(engine.token_logprobs(ids)[-16:].tolist(), abs=1e-4)
    for token, value, top in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert len(top) == 3 and top.get(token, value) == value and list(top.values()) == sorted(top.values(), reverse=True)
    if "fp32" not in engine.describe():
        return
    with torch.no_grad():
        expected = engine.model(torch.tensor([ids])).logits[0, -17:-1].log_softmax(1)
    for i, (token, value, top) in enumerate(zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True)):
        assert value == pytest.approx(float(expected[i, token]), abs=1e-4)
        assert list(top) == expected[i].topk(3).indices.tolist()


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
    "arguments", [{"dtype": "int3"}, {"threads": 0}, {"device": "tpu"}, {"batch": 0}, {"threads": True}, {"pages": 0}]
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


# ------------------------------------------------------------------------------------------------------------------- which engine


def test_the_engine_says_what_it_is(folder):
    reason = cpp_reason("fp32", "cpu")
    with Engine(folder, device="cpu", threads=1) as engine:
        expected = "cpp, fp32, 1 threads" if reason is None else f"eager on cpu, fp32 (not cpp: {reason})"
        assert engine.describe() == expected
    with backend.use("eager"), Engine(folder, dtype="bf16", device="cpu") as engine:
        assert engine.describe().startswith("eager on cpu, bf16 (not cpp: ") and "Engine" not in engine.describe()
    with Engine(folder, dtype="fp16", device="cpu") as engine:
        assert "(not cpp: dtype fp16; it takes fp32, bf16, int8, int4)" in engine.describe()
    with pytest.raises(Error, match="closed"):
        engine.describe()
    assert cpp_reason("fp32", "cuda") == "it runs on the CPU, and the device is cuda"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_are_the_cpp_engines(folder, dtype):
    with backend.use("eager"), pytest.raises(Error, match=f"dtype is .{dtype}., which the C.. engine computes, and it does not"):
        Engine(folder, dtype=dtype, device="cpu")
    reason = cpp_reason(dtype, "cpu")
    if reason is not None:
        pytest.skip(reason)
    with Engine(folder, dtype=dtype, device="cpu") as engine, pytest.raises(Error, match=f"no model in PyTorch with {dtype}"):
        assert len(engine.generate("dog", SamplingParams(**SAMPLED))[0].token_ids) == 16
        engine.model  # noqa: B018


def test_both_engines_choose_the_same_tokens(folder, eager_engine):
    with Engine(folder, device="cpu") as engine:
        params = SamplingParams(**SAMPLED, logprobs=3)
        for ours, theirs in zip(*(e.generate(["The quick", "dog", ""], params) for e in (engine, eager_engine)), strict=True):
            assert ours.token_ids == theirs.token_ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_scores_of_both_engines(folder, eager_engine):
    text = "The quick brown fox jumps over the lazy dog. " * 8
    with Engine(folder, device="cpu") as engine:
        for bos in (True, False):
            ours, theirs = engine.score(text, bos=bos), eager_engine.score(text, bos=bos)
            assert ours.token_ids == theirs.token_ids and len(ours.token_ids) > 64
            assert [v is None for v in ours.logprobs] == [v is None for v in theirs.logprobs]
            assert ours.total == pytest.approx(theirs.total, rel=1e-5) and ours.stride == theirs.stride == 32


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_packed_file_is_the_folder(folder, tmp_path, dtype):
    reason = cpp_reason(dtype, "cpu")
    if reason is not None and dtype not in ("fp32", "bf16"):
        pytest.skip(reason)
    file = packed.write(folder, dtype, tmp_path / "model.gptfast")
    params = SamplingParams(**SAMPLED, logprobs=2)
    with Engine(folder, dtype, device="cpu") as engine, Engine(file, device="cpu") as other:
        assert other.describe() == engine.describe()
        assert other.generate(["dog", "The quick"], params) == engine.generate(["dog", "The quick"], params)
        assert other.score("The lazy dog").logprobs == engine.score("The lazy dog").logprobs
    wrong = "bf16" if dtype == "int8" else "int8"
    with pytest.raises(Error, match=wrong):
        Engine(file, wrong, device="cpu")


# ------------------------------------------------------------------------------------------------------------------- speculation


def test_speculation_changes_no_token(folder, tmp_path):
    GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    torch.manual_seed(1)
    small = GPT2LMHeadModel(GPT2Config(300, 64, 16, 1, 2, initializer_range=0.3, bos_token_id=299, eos_token_id=299))
    small.save_pretrained(tmp_path)
    prompts = ["The quick", "dog dog dog dog dog", ""]
    params = [SamplingParams(**{**SAMPLED, "seed": seed, "temperature": 0.5 * seed, "max_tokens": 40}) for seed in range(3)]
    with Engine(folder, device="cpu") as engine:
        expected = [answer.token_ids for answer in engine.generate(prompts, params)]
    for speculation in ("lookup", tmp_path, folder):
        with Engine(folder, device="cpu", speculation=speculation) as engine:
            assert [answer.token_ids for answer in engine.generate(prompts, params)] == expected


def test_a_draft_has_the_same_tokenizer(folder, tmp_path):
    GPT2Tokenizer.train(["other words altogether"] * 9, 280).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(300, 64, 16, 1, 2)).save_pretrained(tmp_path)
    with pytest.raises(Error, match=r"speculation is '.*', a model with another tokenizer than"):
        Engine(folder, device="cpu", speculation=tmp_path)
    with pytest.raises(LoadError):
        Engine(folder, device="cpu", speculation="/not/there")


# ------------------------------------------------------------------------------------------------------------------------ Ctrl-C


def interrupt_soon(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_gives_out_what_was_made(slow_folder):
    params = SamplingParams(temperature=1.0, top_k=0, seed=1, max_tokens=4000, ignore_eos=True, stop=("never to be seen",))
    with Engine(slow_folder, device="cpu") as engine:
        pieces = []
        with pytest.raises(KeyboardInterrupt):
            for piece in engine.stream("The quick", params):
                if not pieces:
                    interrupt_soon(0.3)
                pieces.append(piece)
        assert pieces[-1].finish_reason == "cancelled" and sum(len(piece.token_ids) for piece in pieces) < 4000
        made = [token for piece in pieces for token in piece.token_ids]
        again = engine.generate("The quick", SamplingParams(**{**vars(params), "max_tokens": len(made)}))[0]
        assert made == again.token_ids and "".join(piece.text for piece in pieces) == again.text
        interrupt_soon(0.1)
        begun = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            engine.generate("The quick", params)
        assert time.perf_counter() - begun < 3
        assert len(engine.generate("dog", SamplingParams(**SAMPLED))[0].token_ids) == 16  # and it goes on


def test_ctrl_c_ends_the_command_with_130_and_the_text_so_far(slow_folder):
    command = [sys.executable, "-P", "-m", "gptfast", "generate", str(slow_folder), "The quick", "--device", "cpu"]
    command += ["--max-tokens", "4000", "--seed", "1", "--ignore-eos"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = os.read(child.stdout.fileno(), 1)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and first and rest.endswith(b"\n"), errors
    assert b"Traceback" not in errors
