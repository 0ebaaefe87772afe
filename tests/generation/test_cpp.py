"""The C++ engine behind the runner protocol: equal bits whatever surrounds a sequence, draws, and what it refuses."""

import os
from dataclasses import replace

import pytest
import torch

import gptfast.backend as backend
from gptfast import Error, packed, testing
from gptfast.cache import PAGE
from gptfast.generation.cpp import CppRunner
from gptfast.generation.rows import Sampler
from gptfast.generation.runner import Batch
from gptfast.testing.engine import FORMATS, ISAS, Driver, logits_of, model_of, packed_of, prompts_of, row_of, runner_of


@pytest.fixture(autouse=True)
def extension():
    testing.requires("cpp", backend.EXTENSIONS["_C"])


LENGTHS = [1, 2, 64, 65, 7, 70, 128, 3, 63, 5, 1, 90, 33, 16, 17, 4, 9, 2, 31, 66, 12, 1, 8, 3, 20, 6, 2, 40, 15, 1, 11, 5]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_sequence_has_the_same_bits_whatever_surrounds_it(isa, format):
    """Alone and among 32, with 1 to 3 threads, with its prompt in pieces, in single steps and in one call."""
    with testing.forced_isa(isa):
        for name in ("heads-of-32", "odd"):
            prompts = prompts_of(model_of(name).config.vocab_size, LENGTHS)
            right = Driver(runner_of(name, format), prompts).prefill(together=False).decode(5, together=False).made()
            assert len({tuple(tokens) for tokens, *_ in right}) > 16
            for threads, chunk, streamed, rows in ((1, 13, False, 32), (2, None, True, 32), (3, 50, False, 32), (2, 1, False, 5)):
                found = Driver(runner_of(name, format, threads), prompts[:rows]).prefill(chunk).decode(5, streamed)
                assert found.made() == right[:rows], (name, threads, chunk, streamed)


@pytest.mark.parametrize("format", FORMATS)
def test_draws_of_several_tokens_are_those_of_single_steps(format):
    """Verification: behind a prompt, tokens that are already known are each followed by a draw."""
    for name in ("heads-of-32", "untied"):
        runner = runner_of(name, format, 2)
        single = Driver(runner, prompts_of(model_of(name).config.vocab_size, [70, 5])).prefill().decode(6)
        rows = [replace(row, tokens=row.tokens[:1], logprobs=[], top_logprobs=[]) for row in single.rows]
        batch = Batch()
        for i, row in enumerate(rows):
            batch.add(single.rows[i].tokens[:6], row.start, single.tables[i], 6, row)
        drawn = runner.step(batch)
        assert drawn.tokens == [token for row in single.rows for token in row.tokens[1:]]
        assert drawn.logprobs == [value for row in single.rows for value in row.logprobs[1:]]


def test_a_step_of_more_rows_than_a_pass_takes():
    """Prompts of 1,100 tokens in one step, in which passes cut sequences."""
    model = model_of("heads-of-32", 600)
    runner = CppRunner(packed.pack(model, "fp32"), 2, 40)
    prompts = prompts_of(1031, [590, 3, 510])
    whole = Driver(runner, prompts, width=10).prefill().decode(3, False)
    assert whole.made() == Driver(runner, prompts, width=10).prefill(100, together=False).decode(3).made()
    scores = Batch()
    scores.add(prompts[0], 0, whole.tables[0], 590, None)
    scores.targets = [prompts[0]]
    with torch.no_grad():
        right = model(torch.tensor([prompts[0]])).logits[0].log_softmax(1)
    found = torch.tensor(runner.step(scores).logprobs)
    torch.testing.assert_close(found, right.gather(1, torch.tensor(prompts[0])[:, None])[:, 0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_those_of_sample_on_the_same_logits():
    """Also with everything that edits logits, whose counts go on from step to step, in step() and in decode()."""
    every = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    every |= {"logit_bias": {5: 2.0}, "banned_tokens": (7,)}
    for params in ({}, every, {**every, "temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"min_p": 0.05, "typical_p": 0.9}):
        prompts = prompts_of(1031, [20, 3, 65])
        runner = runner_of("heads-of-32", "fp32", 2)
        for streamed in (True, False):
            driver = Driver(runner, prompts, **params).prefill().decode(12, streamed)
            for i, row in enumerate(driver.rows):
                logits = logits_of(runner, driver.ids(i)[:-1], driver.tables[i])[row.start - 1 :]
                again = replace(row, tokens=[], logprobs=[], top_logprobs=[])
                for one in logits:
                    Sampler([again], runner.vocab, torch.device("cpu")).draw(one[None]).give(0, again)
                assert (again.tokens, again.logprobs, again.top_logprobs) == driver.made()[i], (params, streamed)


@pytest.mark.parametrize(
    "params", [{"order": "vllm", "min_p": 0.1}, {"order": "llama.cpp"}, {"logprobs_mode": "processed"}], ids=str
)
def test_what_kernels_do_not_do_is_done_in_torch(params):
    """Also for rows of several kinds in one batch."""
    runner = runner_of("heads-of-32", "fp32", 2)
    mixed = Driver(runner, prompts_of(1031, [20, 20]), **params)
    mixed.rows[0] = row_of(mixed.rows[0].prompt, 0)
    mixed.prefill().decode(4, False)
    prompts = prompts_of(1031, [20, 20])
    assert mixed.made()[0] == Driver(runner, prompts[:1]).prefill().decode(4).made()[0]
    assert mixed.made()[1] == Driver(runner, prompts[1:], first=1, **params).prefill().decode(4).made()[0]


# ----------------------------------------------------------------------------------------------------------------------- edge cases


def test_nan_fails_its_row_alone():
    """NaN at a position: sequences that reach it fail there, the others keep their bits; the pages can be used again."""
    weights, name = packed_of("heads-of-32", "fp32"), "transformer.wpe.weight"
    broken = replace(weights, tensors={**weights.tensors, name: weights.tensors[name].clone()})
    broken.tensors[name][10] = float("nan")
    prompts = prompts_of(1031, [11, 4, 8])
    whole = Driver(runner_of("heads-of-32"), prompts).prefill().decode(4).made()
    runner = CppRunner(broken, 2, 20)
    driver = Driver(runner, prompts).prefill()
    assert [row.finish_reason for row in driver.rows] == ["error", None, None]
    assert "NaN" in driver.rows[0].error and driver.rows[0].tokens == []
    results = runner.decode(driver.batch([1, 2]), 10)
    assert [drawn.status for drawn in results] == [[0, 0], [0, 0], [0, 1]]  # the second of them reaches position 10
    for drawn in results:
        driver.give([1, 2], drawn)
    assert driver.made()[1] == tuple(part[:4] for part in whole[1]) and driver.made()[2] == tuple(part[:3] for part in whole[2])
    scores = Batch(tokens=[prompts[0]], starts=[0], tables=[[0]], draws=[11], rows=[None], targets=[prompts[0]])
    assert runner.step(scores).status == [0] * 10 + [1]
    again = Driver(runner, prompts[1:2], first=1)
    again.tables = [[0, 1, 2]]  # which hold NaN
    assert again.prefill().decode(3).made()[0] == tuple(part[:4] for part in whole[1])


def test_choices_share_a_prompt_and_copied_pages():
    """A sequence without new tokens draws from the one before it; its pages are copies."""
    prompt = prompts_of(1031, [70])[0]
    runner = runner_of("heads-of-32", "fp32", 2)
    rows = [replace(row_of(prompt, 1, temperature=1.0), choice=choice) for choice in range(3)]
    batch = Batch()
    for choice, row in enumerate(rows):
        batch.add(prompt if choice == 0 else [], 0 if choice == 0 else 70, [0, 1], 1, row)
    drawn = runner.step(batch)
    runner.copy_pages([(1, 5), (1, 6)])
    for i, row in enumerate(rows):
        drawn.give(i, row)
    after = Batch()
    for row, table in zip(rows, ([0, 1], [0, 5], [0, 6]), strict=True):
        after.add(row.tokens, 70, table, 1, row)
    for step in runner.decode(after, 5):
        for i, row in enumerate(rows):
            step.give(i, row)
    for choice, row in enumerate(rows):
        single = Driver(runner, [prompt])
        single.rows = [replace(row_of(prompt, 1, temperature=1.0), choice=choice)]
        assert single.prefill().decode(5).made()[0] == (row.tokens, row.logprobs, row.top_logprobs)
    assert len({tuple(row.tokens) for row in rows}) == 3


def test_decode_ends_with_the_step_in_which_a_sequence_ends():
    runner = runner_of("heads-of-32", "fp32", 2)
    whole = Driver(runner, prompts_of(1031, [9, 30])).prefill().decode(8)
    stop = whole.rows[1].tokens[4]
    first = min(1 + row.tokens[1:].index(stop) for row in whole.rows if stop in row.tokens[1:])
    driver = Driver(runner, prompts_of(1031, [9, 30])).prefill()
    for row in driver.rows:
        row.stop_ids = frozenset({stop, 10**9})
    results = runner.decode(driver.batch([0, 1]), 8)
    assert len(results) == first
    for drawn in results:
        driver.give([0, 1], drawn)
    assert [row.tokens for row in driver.rows] == [row.tokens[: first + 1] for row in whole.rows]


def test_memory_does_not_grow_with_tokens():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    runner = CppRunner(packed.pack(model_of("one-head", 1_000), "fp32"), 1, 20)
    driver = Driver(runner, prompts_of(600, [4]), width=16).prefill()
    driver.decode(40, streamed=False)
    before = resident()
    runner.decode(driver.batch([0]), 100)  # within the same pages of 64 tokens, but for two
    assert resident() - before < 1 << 20


def test_the_largest_context_and_a_closed_engine():
    runner = runner_of("odd", "int8", 2)
    prompt = prompts_of(337, [199])[0]
    driver = Driver(runner, [prompt], width=4).prefill()
    assert len(driver.rows[0].tokens) == 1 and len(runner.decode(driver.batch([0]), 1)) == 1
    with pytest.raises(Error, match="sequence 0: its length is 201; allowed: 0 to 200"):
        runner.decode(driver.batch([0]), 2)
    runner.close()
    runner.close()
    runner.interrupt()
    with pytest.raises(Error, match="the engine is closed"):
        runner.step(driver.batch([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[97]]}, "a token id is 97; allowed: 0 to 96"), ({"tokens": [[-1]]}, "a token id is -1"),
        ({"tables": [[8]]}, "a page is 8; allowed: 0 to 7"), ({"tables": [[-1]]}, "a page is -1"),
        ({"starts": [64]}, "its length is 65; allowed: 0 to 64"), ({"starts": [-1]}, "tokens in the cache is -1"),
        ({"draws": [2]}, "draws is 2; allowed: 0 to 1"), ({"tokens": [[]], "draws": [0]}, "new tokens is 0"),
    ],
)  # fmt: skip
def test_bad_batches(change, message):
    runner = runner_of("scaled", pages=8)
    batch = Batch(tokens=[[3]], starts=[0], tables=[[0]], draws=[1], rows=[row_of([3])])
    with pytest.raises(Error, match=message):
        runner.step(replace(batch, **change))


def test_bad_weights_and_numbers():
    weights = packed_of("scaled", "int8")
    name, norm = "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"
    codes = weights.tensors[name]
    for tensors, message in (
        ({name: codes[:-1]}, f"{name} has .* bytes, needs"),
        ({name: torch.cat((codes, codes))[1 : len(codes) + 1]}, "multiple of 64 bytes"),
        ({name: weights.tensors[norm]}, f"{name} is Float"), ({norm: torch.zeros(39)}, f"{norm} has shape"),
    ):  # fmt: skip
        with pytest.raises(Error, match=message):
            CppRunner(replace(weights, tensors={**weights.tensors, **tensors}), 1, 4)
    with pytest.raises(Error, match=f"the weights lack {name}"):
        CppRunner(replace(weights, tensors={key: value for key, value in weights.tensors.items() if key != name}), 1, 4)
    for threads, pages in ((0, 4), (True, 4), (1, 0), (1, 1.5)):
        with pytest.raises(Error, match="allowed: a whole number of at least 1"):
            CppRunner(weights, threads, pages)
    assert PAGE == 64
