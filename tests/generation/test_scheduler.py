"""The scheduler: what a request is given depends on nothing else that runs, and every page is accounted for after every step."""

import os
import random
import signal
import threading

import pytest
import torch

from gptfast import Error, SamplingParams
from gptfast.cache import PAGE
from gptfast.generation.pages import PagePool, chain, keys_of
from gptfast.generation.runner import Batch, EagerRunner
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.score import token_logprobs
from gptfast.generation.stream import TextStream
from gptfast.testing.generation import (
    CONTEXT,
    RUNNERS,
    VOCAB,
    OneByOne,
    alone,
    fresh,
    made,
    make_runner,
    random_params,
    random_request,
    row,
    runner_reason,
    tiny,
)

SAMPLED = SamplingParams(temperature=1.0, top_k=0, seed=3, logprobs=2)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(params=RUNNERS)
def kind(request):
    reason = runner_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def make(kind, model):
    return lambda pages, which=model: make_runner(kind, which, pages)


def complete(scheduler: Scheduler, *requests) -> None:
    """Steps until nothing is left, with every invariant checked between steps."""
    for _ in range(5000):
        if all(request.done for request in requests) or not scheduler.step():
            break
        scheduler.check()
    assert all(request.done for request in requests) and not scheduler.busy
    assert scheduler.pool.available == scheduler.pool.pages


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


def test_the_least_recently_used_pages_leave_first():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    assert pages == [0, 1, 2] and pool.take() is None
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.release([0])
    pool.release([2, 1])  # of one text: 1, its end, leaves before 2
    assert pool.match([bytes([0])]) == [0]
    pool.release([0])
    assert [pool.take(), pool.take(), pool.take()] == [1, 2, 0] and pool.match([bytes([0])]) == []
    pool.check([[1, 2, 0]])
    with pytest.raises(AssertionError):
        pool.check([[1, 2]])


def test_few_pages_are_kept_where_few_are_asked_for():
    pool = PagePool(4, idle=1)
    pages = [pool.take(), pool.take()]
    for page in pages:
        pool.publish(page, bytes([page]))
    pool.release(pages)
    pool.check([])
    assert pool.match([bytes([0])]) == [0] and pool.match([bytes([1])]) == [] and pool.available == 3


def test_a_key_is_its_whole_text():
    ids = list(range(192))
    keys = keys_of(ids, [], 3)
    assert keys[1] == chain(chain(b"", ids[:64]), ids[64:128]) and len(set(keys)) == 3
    assert keys_of([1, *ids[1:]], [], 3)[2] != keys[2] and keys_of(ids[64:], [], 1)[0] != keys[1]


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


# ------------------------------------------------------------------------------------------------------ cancelling and failing


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


def test_nan_fails_its_request_alone(make, model):
    broken = tiny()
    broken.transformer.wte.weight.data[50] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # only those that read 50
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


def test_scores_are_the_models(make, kind, model):
    ids = [i * 7 % VOCAB for i in range(CONTEXT + 1)]
    whole = Scheduler(make(8)).score(ids[:-1], ids[1:])
    if kind in ("double", "cpp-fp32"):
        assert torch.allclose(torch.tensor(whole), token_logprobs(model, ids), atol=1e-4)
    scheduler = Scheduler(make(8), chunk=50)
    for first in (1, 60, 200):
        assert scheduler.score(ids[:-1], ids[first:]) == whole[first - 1 :]
    scheduler.check()
    with pytest.raises(Error, match="needs 5 pages, 2 are free"):
        Scheduler(make(2)).score(ids[:-1], ids[1:])


def test_eager_pages_are_taken_when_they_are_used(model):
    runner = EagerRunner(model, 1000)
    scheduler = Scheduler(runner)
    complete(scheduler, scheduler.submit([row([5] * 100, 10, SAMPLED)]))
    assert runner.keys[0].shape[0] == 2
    with pytest.raises(Error, match="page 1000 is asked for; allowed: 0 to 999"):
        runner.step(Batch([[1]], [0], [[1000]], [0], [None]))


def test_a_row_again_is_the_row():
    answer = row([1, 2], 5, SAMPLED, 3, [4])
    assert made(fresh(answer)) == made(answer) and fresh(answer).choice == 3
