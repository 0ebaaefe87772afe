"""The scheduler: what a request is given depends on nothing else that runs, and every page is accounted for after every step."""

import random
import threading

import pytest
import torch

from gptfast import Error, SamplingParams
from gptfast.cache import PAGE
from gptfast.generation.runner import Batch, EagerRunner
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.score import token_logprobs
from gptfast.generation.stream import TextStream
from gptfast.testing.generation import CONTEXT, VOCAB, alone, complete, fresh, made, random_params, random_request, row

SAMPLED = SamplingParams(temperature=1.0, top_k=0, seed=3, logprobs=2)


# ------------------------------------------------------------------------------------------------------------ whatever else runs


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_are_given_what_they_are_given_alone(make, seed):
    rng = random.Random(seed)
    reference = make(8)
    pages = rng.choice([5, 7, 12, 40])
    scheduler = Scheduler(make(pages), rng.choice([1, 3, 8, 64]), rng.choice([1, 7, 64, 100, 512]), rng.choice([None, 0, 3]))
    prefixes = [[rng.randrange(VOCAB) for _ in range(count)] for count in (64, 128, 150)]
    waiting = [random_request(rng, prefixes) for _ in range(6)]
    requests = []
    while waiting or scheduler.busy:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                requests.append(scheduler.submit(waiting.pop()))
        scheduler.step()
        scheduler.check()
    assert scheduler.pool.available == pages
    for request in requests:
        for answer in request.rows:
            assert made(answer) == alone(reference, answer)


def test_a_prompt_in_chunks_is_the_prompt(make):
    prompt = [i % VOCAB for i in range(200)]
    expected = alone(make(8), row(prompt, 10, SAMPLED))
    for chunk in (1, 63, 64, 65, 199, 200, 512):
        scheduler = Scheduler(make(8), chunk=chunk)
        answer = row(prompt, 10, SAMPLED)
        complete(scheduler, scheduler.submit([answer]))
        assert made(answer) == expected


def test_chunks_run_beside_answers_in_the_making(make):
    runner = make(16)
    scheduler = Scheduler(runner, chunk=50)
    first = row([5, 6], 30, SAMPLED)
    requests = [scheduler.submit([first])]
    scheduler.step()
    long = row([7] * 200, 5, SAMPLED)
    requests.append(scheduler.submit([long]))
    before = len(first.tokens)
    for step in range(1, 5):
        assert not long.tokens
        scheduler.step()
        assert len(first.tokens) == before + step
    assert len(long.tokens) == 1
    complete(scheduler, *requests)
    assert made(long) == alone(make(8), long) and made(first) == alone(make(8), first)


def test_64_answers_in_one_step(make):
    runner = make(80)
    scheduler = Scheduler(runner, 64)
    answers = [row([i % VOCAB] * (1 + i % 7), 6, SamplingParams(temperature=1.0, top_k=0, seed=i)) for i in range(70)]
    requests = [scheduler.submit([answer]) for answer in answers]
    scheduler.step()
    assert len(scheduler.running) == 64
    complete(scheduler, *requests)
    reference = make(8)
    assert [made(answer) for answer in answers] == [alone(reference, answer) for answer in answers]


# ----------------------------------------------------------------------------------------------------------------- prefix reuse


def test_a_known_beginning_is_taken_from_the_cache(make):
    scheduler = Scheduler(make(20))
    prompt = [i % VOCAB for i in range(150)]
    answers = [row(prompt, 8, SAMPLED), row(prompt, 8, SAMPLED), row([*prompt[:100], 3, 4], 8, SAMPLED)]
    reused = []
    for answer in answers:
        before = scheduler.reused
        complete(scheduler, scheduler.submit([answer]))
        reused.append(scheduler.reused - before)
        assert made(answer) == alone(make(8), answer)
    assert reused == [0, 128, 64]


def test_answers_are_known_too_and_whole_prompts_are_computed_to_their_last_token(make):
    scheduler = Scheduler(make(20))
    first = row([9] * 60, 70, SAMPLED)
    complete(scheduler, scheduler.submit([first]))
    more = row([*first.prompt, *first.tokens[:68]], 5, SAMPLED)
    assert len(more.prompt) == 128
    complete(scheduler, scheduler.submit([more]))
    assert scheduler.reused == 64 and made(more) == alone(make(8), more)


# ----------------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_choices_share_the_prompts_pages_and_copy_the_last(make, length):
    runner = make(30)
    scheduler = Scheduler(runner)
    computed = []
    step = runner.step
    runner.step = lambda batch: computed.append(sum(map(len, batch.tokens))) or step(batch)
    answers = [row([7] * length, 4, SAMPLED, choice) for choice in range(5)]
    request = scheduler.submit(answers)
    scheduler.step()
    scheduler.check()
    assert computed == [length] and len(scheduler.running) == 5
    full = {tuple(sequence.pages[: length // PAGE]) for sequence in scheduler.running}
    assert len(full) == 1
    complete(scheduler, request)
    reference = make(8)
    assert [made(answer) for answer in answers] == [alone(reference, answer) for answer in answers]
    assert len({tuple(answer.tokens) for answer in answers}) > 1


def test_choices_that_do_not_fit_wait_for_their_turn(make):
    for pages, sequences in ((3, 64), (30, 2)):
        scheduler = Scheduler(make(pages), sequences)
        answers = [row([7] * 100, 4, SAMPLED, choice) for choice in range(5)]
        complete(scheduler, scheduler.submit(answers))
        reference = make(8)
        assert [made(answer) for answer in answers] == [alone(reference, answer) for answer in answers]
        assert scheduler.reused > 0


# ------------------------------------------------------------------------------------------------------------- too few of a thing


def test_the_youngest_gives_way_and_loses_nothing(make):
    scheduler = Scheduler(make(4), idle=0)
    answers = [row([i] * 60, 100, SamplingParams(temperature=1.0, top_k=0, seed=i, frequency_penalty=0.1)) for i in range(4)]
    requests = [scheduler.submit([answer]) for answer in answers]
    complete(scheduler, *requests)
    assert scheduler.preemptions > 0
    reference = make(8)
    assert [made(answer) for answer in answers] == [alone(reference, answer) for answer in answers]


def test_what_cannot_fit_is_refused_when_it_is_asked_for(make):
    scheduler = Scheduler(make(2))
    with pytest.raises(Error, match="a request of 150 tokens needs 3 pages; allowed: 2"):
        scheduler.submit([row([1] * 100, 50, SAMPLED)])
    with pytest.raises(Error, match="allowed: 1 to 320"):
        scheduler.submit([row([1] * 300, 50, SAMPLED)])
    with pytest.raises(Error, match="allowed: 1 to 320"):
        scheduler.submit([row([], 5, SAMPLED)])
    for name in ("sequences", "chunk"):
        with pytest.raises(Error, match=f"{name} is 0"):
            Scheduler(make(2), **{name: 0})
    assert not scheduler.busy and not scheduler.step()


def test_no_tokens_and_one_token(make):
    scheduler, told = Scheduler(make(4)), []
    none, one = row([3], 0, SAMPLED), row([3], 1, SAMPLED)
    complete(scheduler, scheduler.submit([none], told.append), scheduler.submit([one]))
    assert none.finish_reason == one.finish_reason == "length" and (none.tokens, len(one.tokens)) == ([], 1) and told == [none]


# --------------------------------------------------------------------------------------------------------------------- the rest


def test_stop_texts_end_an_answer_within_a_call_of_many_tokens(make):
    def stream() -> TextStream:
        return TextStream(lambda token: bytes([97 + token % 26]), ["q", "zz"])

    results = []
    for others in (0, 3):
        scheduler = Scheduler(make(20))
        answer = row([3] * 5, 60, SamplingParams(temperature=1.0, top_k=0, seed=8), stream=stream())
        requests = [scheduler.submit([answer])]
        requests += [scheduler.submit([row([i], 50, SAMPLED)]) for i in range(others)]
        complete(scheduler, *requests)
        assert answer.finish_reason == "stop" and len(answer.tokens) < 60
        letters = "".join(chr(97 + token % 26) for token in answer.tokens)
        assert letters.endswith(("q", "zz")) and letters.startswith(answer.text) and "q" not in answer.text
        results.append((answer.tokens, answer.text))
    assert results[0] == results[1]


def test_requests_come_from_other_threads(make):
    scheduler = Scheduler(make(40), 8)
    rng = random.Random(5)
    answers = [row([rng.randrange(VOCAB)] * 20, 12, random_params(rng)) for _ in range(24)]
    requests, lock = [], threading.Lock()

    def feed(part) -> None:
        for answer in part:
            request = scheduler.submit([answer])
            with lock:
                requests.append(request)

    threads = [threading.Thread(target=feed, args=(answers[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or scheduler.busy:
        scheduler.step()
    assert len(requests) == 24 and all(request.done for request in requests)
    reference = make(8)
    assert [made(answer) for answer in answers] == [alone(reference, answer) for answer in answers]


def test_scores_are_the_models(make, kind, tiny_model):
    ids = [i * 7 % VOCAB for i in range(CONTEXT + 1)]
    whole = Scheduler(make(8)).score(ids[:-1], ids[1:])
    if kind in ("double", "cpp-fp32"):
        assert torch.allclose(torch.tensor(whole), token_logprobs(tiny_model, ids), atol=1e-4)
    scheduler = Scheduler(make(8), chunk=50)
    for first in (1, 60, 200):
        assert scheduler.score(ids[:-1], ids[first:]) == whole[first - 1 :]
    scheduler.check()
    with pytest.raises(Error, match="needs 5 pages, 2 are free"):
        Scheduler(make(2)).score(ids[:-1], ids[1:])


def test_eager_pages_are_taken_when_they_are_used(tiny_model):
    runner = EagerRunner(tiny_model, 1000)
    scheduler = Scheduler(runner)
    complete(scheduler, scheduler.submit([row([5] * 100, 10, SAMPLED)]))
    assert runner.keys[0].shape[0] == 2
    with pytest.raises(Error, match="page 1000 is asked for; allowed: 0 to 999"):
        runner.step(Batch([[1]], [0], [[1000]], [0], [None]))


def test_a_row_again_is_the_row():
    answer = row([1, 2], 5, SAMPLED, 3, [4])
    assert made(fresh(answer)) == made(answer) and fresh(answer).choice == 3
