"""Requests that are cancelled, fail or are interrupted: nothing else is touched, and every page comes back."""

import os
import signal

import pytest
import torch

from gptfast import SamplingParams
from gptfast.generation.runner import Batch
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.stream import TextStream
from gptfast.testing.generation import OneByOne, alone, complete, made, row, tiny

SAMPLED = SamplingParams(temperature=1.0, top_k=0, seed=3, logprobs=2)


def test_cancelling(make):
    scheduler = Scheduler(make(40), 4)
    pieces = []
    stream = TextStream(lambda token: b"ab"[token % 2 :][:1], ["abababababababababababababababababab"])
    first = [row([3] * 70, 50, SAMPLED, choice, stream=stream if choice == 0 else None) for choice in range(3)]
    other, queued = row([4] * 5, 50, SAMPLED), row([5] * 5, 20, SAMPLED)
    requests = [scheduler.submit(first, lambda r: pieces.append((r.choice, r.piece))), scheduler.submit([other])]
    scheduler.step()
    last = scheduler.submit([queued])
    scheduler.step()
    scheduler.cancel(requests[0])
    scheduler.cancel(last)
    complete(scheduler, *requests, last)
    assert [r.finish_reason for r in (*first, queued)] == ["cancelled"] * 4 and queued.tokens == []
    assert made(other) == alone(make(8), other) and 0 < len(first[0].tokens) < 50
    assert first[0].text == "".join("ab"[token % 2] for token in first[0].tokens)  # what was held back has been released
    assert "".join(piece for choice, piece in pieces if choice == 0) == first[0].text
    expected = alone(make(8), first[0])
    assert first[0].tokens == expected[0][: len(first[0].tokens)]


def test_choices_are_cancelled_with_a_prompt_that_is_not_computed(make):
    scheduler = Scheduler(make(10), chunk=10)
    answers = [row([3] * 70, 5, SAMPLED, choice) for choice in range(3)]
    request = scheduler.submit(answers)
    scheduler.step()
    scheduler.cancel(request)
    complete(scheduler, request)
    assert [answer.finish_reason for answer in answers] == ["cancelled"] * 3


def test_nan_fails_its_request_alone(make, tiny_model):
    broken = tiny()
    broken.transformer.wte.weight.data[50] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.detach().clone())  # only those that read 50
    broken.config.tie_word_embeddings = False
    scheduler = Scheduler(make(6, broken), idle=None)
    banned = SamplingParams(temperature=1.0, top_k=0, seed=3, banned_tokens=(50,))
    for _ in range(3):  # pages go from failed requests to others
        good = [row([i] * 70, 10, banned) for i in range(2)]
        bad = [row([50 if i == 65 else i for i in range(70)], 10, banned, choice) for choice in range(2)]
        complete(scheduler, *[scheduler.submit(rows) for rows in ([good[0]], bad, [good[1]])])
        reference = make(8, broken)
        assert [made(answer) for answer in good] == [alone(reference, answer) for answer in good]
        assert [answer.finish_reason for answer in bad] == ["error"] * 2 and all("NaN" in (a.error or "") for a in bad)
        assert all(answer.finish_reason == "length" for answer in good)


def test_an_exception_in_a_step_loses_nothing(make):
    runner = OneByOne(make(12))
    scheduler = Scheduler(runner)
    answers = [[row([5] * 70, 6, SAMPLED, choice) for choice in range(3)], [row([6] * 3, 6, SAMPLED)]]
    step, calls = runner.step, []

    def failing(batch: Batch):
        calls.append(None)
        if len(calls) in (1, 3):
            raise RuntimeError("out of memory")
        return step(batch)

    runner.step = failing
    requests = [scheduler.submit(rows) for rows in answers]
    for _ in range(2):
        with pytest.raises(RuntimeError):
            while True:
                scheduler.step()
        scheduler.check()
    complete(scheduler, *requests)
    reference = make(8)
    for answer in (*answers[0], *answers[1]):
        assert made(answer) == alone(reference, answer)


def test_run_cancels_what_it_leaves(make):
    runner = OneByOne(make(12))
    scheduler = Scheduler(runner)
    answer = row([5] * 70, 60, SAMPLED)
    step, calls = runner.step, []

    def failing(batch: Batch):
        calls.append(None)
        if len(calls) > 4:
            raise RuntimeError("out of memory")
        return step(batch)

    runner.step = failing
    with pytest.raises(RuntimeError):
        scheduler.run([scheduler.submit([answer])])
    assert answer.finish_reason == "cancelled" and not scheduler.busy and scheduler.pool.available == 12


def test_ctrl_c_in_a_step_keeps_what_it_drew(make):
    runner = OneByOne(make(12))
    scheduler = Scheduler(runner)
    answer, told = row([5] * 70, 60, SAMPLED), []
    step = runner.step

    def interrupted(batch: Batch):
        if batch.starts[0] == 75:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    runner.step = interrupted
    request = scheduler.submit([answer], lambda r: told.append(r.tokens[-1]))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(70):  # more than it has tokens
            scheduler.step()
    scheduler.check()
    assert len(answer.tokens) == 76 - 70 + 1 and told == answer.tokens  # the token of the interrupted step is the last
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    complete(scheduler, request)
    assert made(answer) == alone(make(8), answer)
