"""Speculation: the tokens are those of the plain run, whatever is proposed, and it is off where it does not pay."""

import random
from collections.abc import Callable

import pytest

from gptfast import SamplingParams
from gptfast.cache import PAGE
from gptfast.generation.request import Answer, Request
from gptfast.generation.rows import Drawn
from gptfast.generation.runner import Batch
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.speculation import DraftModel, PromptLookup, Speculation, agreeing
from gptfast.testing.generation import VOCAB, OneByOne, alone, made, random_request, row, tiny

GREEDY = SamplingParams(temperature=0.0, logprobs=1)
SAMPLED = SamplingParams(temperature=1.0, top_k=0, seed=3, logprobs=2)


def answer(ids: list[int]) -> Answer:
    question = row(ids, 100, GREEDY)
    return Answer(question, Request([question]), list(ids))


class Wrong:
    """Proposes anything, sometimes what is right."""

    guess = 0.5

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def propose(self, answers, counts):
        return [[self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(count + 1))] for count in counts]

    def keep(self, answers) -> None:
        pass

    def close(self) -> None:
        pass


def proposers(make) -> dict[str, Callable]:
    return {
        "lookup": PromptLookup, "wrong": lambda: Wrong(1), "itself": lambda: DraftModel(make(60)),
        "smaller": lambda: DraftModel(make(60, tiny(1, 7))), "few pages": lambda: DraftModel(make(3), chunk=30),
        "short context": lambda: DraftModel(make(60, tiny(1, 7, 100))),
    }


# -------------------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("source", ["lookup", "wrong", "itself", "smaller", "few pages", "short context"])
def test_random_requests_are_given_what_they_are_given_without(make, source):
    rng = random.Random(f"{source} 2")
    pages = rng.choice([7, 40])
    speculation = Speculation(proposers(make)[source](), most=5, adaptive=False)
    scheduler = Scheduler(make(pages), 6, 100, speculation=speculation)
    prefixes = [[rng.randrange(5) for _ in range(70)]]
    waiting, requests = [random_request(rng, prefixes) for _ in range(6)], []
    while waiting or scheduler.busy:
        if waiting and rng.random() < 0.5:
            requests.append(scheduler.submit(waiting.pop()))
        scheduler.step()
        scheduler.check()
    assert scheduler.pool.available == pages and speculation.proposed > 0
    reference = make(8)
    for request in requests:
        for each in request.rows:
            assert made(each) == alone(reference, each)


def test_a_draft_that_is_the_model_is_always_right(make):
    runner = make(20)
    steps = []
    step = runner.step
    runner.step = lambda batch: steps.append(None) or step(batch)
    speculation = Speculation(DraftModel(make(20)), most=4, adaptive=False)
    scheduler = Scheduler(runner, speculation=speculation)
    answers = [row([3] * 70, 41, SAMPLED, choice) for choice in range(2)]
    scheduler.run([scheduler.submit(answers)])
    assert speculation.accepted == speculation.proposed > 0
    assert len(steps) == 1 + 40 // 5  # the prompt, then five tokens a step
    assert [made(a) for a in answers] == [alone(make(8), a) for a in answers]


def test_a_text_that_repeats_is_made_in_fewer_steps(make):
    runner = make(20)
    rows = []
    step = runner.step
    runner.step = lambda batch: rows.append(sum(map(len, batch.tokens))) or step(batch)
    forced = SamplingParams(temperature=0.0, logit_bias={7: 1e6})
    scheduler = Scheduler(runner, speculation=Speculation(PromptLookup(), most=8, adaptive=False))
    answer = row([5, 7, 7, 7], 60, forced)
    scheduler.run([scheduler.submit([answer])])
    assert answer.tokens == [7] * 60 and len(rows) < 10
    assert sum(rows) < 80  # and none of it wasted


@pytest.mark.parametrize(
    "settings", [{"frequency_penalty": 0.5}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.2}, {"order": "llama.cpp"}]
)
def test_rows_that_look_at_their_tokens_draw_one_at_a_time(make, settings):
    speculation = Speculation(Wrong(2), most=4, adaptive=False)
    scheduler = Scheduler(make(20), speculation=speculation)
    plain = row([3] * 10, 20, SamplingParams(temperature=1.0, top_k=0, seed=4, **settings))
    scheduler.run([scheduler.submit([plain])])
    assert speculation.proposed == 0 and made(plain) == alone(make(8), plain)
    both = [row([3] * 10, 20, plain.params), row([4] * 10, 20, SAMPLED)]
    scheduler.run([scheduler.submit([each]) for each in both])
    assert speculation.proposed > 0 and [made(each) for each in both] == [alone(make(8), each) for each in both]


def test_bad_words_and_early_ends_hold_in_speculation(make):
    scheduler = Scheduler(make(20), speculation=Speculation(Wrong(3), most=4, adaptive=False))
    words = [[a, b] for a in range(0, VOCAB, 2) for b in range(VOCAB)]
    bad = row([3] * 4, 20, SAMPLED, bad_words=words)
    early = row([3] * 4, 30, SamplingParams(temperature=1.0, top_k=0, seed=4, min_tokens=10), stops=range(0, VOCAB, 2))
    scheduler.run([scheduler.submit([bad]), scheduler.submit([early])])
    assert all(token % 2 for token in early.tokens[:10]) and early.finish_reason == "stop"
    assert [made(each) for each in (bad, early)] == [alone(make(8), each) for each in (bad, early)]


def test_an_end_among_the_proposals_ends_the_answer(make):
    free = row([3] * 4, 12, SAMPLED)
    scheduler = Scheduler(make(20), speculation=Speculation(DraftModel(make(20)), most=6, adaptive=False))
    scheduler.run([scheduler.submit([free])])
    for n in (1, 3, 5):
        stopped = row([3] * 4, 12, SAMPLED, stops=[free.tokens[n]])
        scheduler.run([scheduler.submit([stopped])])
        scheduler.check()
        assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[n]) + 1] and stopped.finish_reason == "stop"


def test_ended_answers_give_their_draft_pages_back(make):
    draft = DraftModel(make(6))
    scheduler = Scheduler(make(20), speculation=Speculation(draft, most=4, adaptive=False))
    for _ in range(4):
        scheduler.run([scheduler.submit([row([3] * 150, 10, SAMPLED)])])
    assert draft._pool.available == 6


# ----------------------------------------------------------------------------------------------------------------- prompt lookup


def test_lookup_proposes_what_followed_last():
    lookup = PromptLookup()
    one = answer([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.propose([one], [4]) == [[4, 5, 6, 1]]
    one.ids += [9, 2, 3]
    assert lookup.propose([one], [3]) == [[9, 2, 3]]  # the run of two is found where it was last
    one.ids += [50]
    assert lookup.propose([one], [3]) == [[]]
    assert lookup.propose([one], [0]) == [[]]


def test_lookup_repeats_a_period_and_needs_a_run_of_two():
    lookup = PromptLookup()
    assert lookup.propose([answer([1, 8, 8, 8])], [5]) == [[8] * 5]
    assert lookup.propose([answer([3, 4, 3, 4, 3, 4])], [5]) == [[3, 4, 3, 4, 3]]
    assert lookup.propose([answer([8])], [2]) == [[]] and lookup.propose([answer([8, 8])], [2]) == [[]]
    one = answer([1, 2, 1, 2])
    lookup.propose([one], [1])
    lookup.keep([])
    assert not lookup._indices


def test_lookup_does_not_depend_on_when_it_is_asked():
    rng = random.Random(1)
    often, ids = answer([]), [rng.randrange(4) for _ in range(300)]
    lookup = PromptLookup()
    for token in ids:
        often.ids.append(token)
        got = lookup.propose([often], [3])
    assert got == PromptLookup().propose([answer(ids)], [3])


def test_agreeing():
    assert [agreeing([1, 2, 3], drawn) for drawn in ([1, 2, 3, 4], [1, 2, 9, 3], [2, 2, 3], [1], [])] == [3, 2, 0, 1, 0]
    assert agreeing([], [4]) == 0


# -------------------------------------------------------------------------------------------------------------- whether it pays


class Machine:
    """A runner whose clock is its own: a step takes 1 ms and `row` ms for each further row; texts are made by `text(ids)`."""

    vocab, context, pages = VOCAB, 100_000, 4000

    def __init__(self, text: Callable[[list[int]], int], row: float, noise: float = 0.0) -> None:
        self.text, self.row, self.noise, self.now = text, row, noise, 0.0
        self.texts: dict[int, list[int]] = {}
        self.rng = random.Random(0)

    def clock(self) -> float:
        return self.now

    def step(self, batch: Batch) -> Drawn:
        tokens = []
        for new, start, table, draws in zip(batch.tokens, batch.starts, batch.tables, batch.draws, strict=True):
            known = self.texts.setdefault(table[0], [])
            known[start:] = new
            assert start + len(new) <= PAGE * len(table)
            tokens += [self.text(known[: len(known) - draws + 1 + j]) for j in range(draws)]
        rows = sum(map(len, batch.tokens))
        self.now += (1.0 + self.row * (rows - 1)) * 1e-3 * (1 + self.rng.uniform(-self.noise, self.noise))
        count = len(tokens)
        return Drawn(tokens, [0] * count, [0.0] * count, [[]] * count, [[]] * count)

    decode = OneByOne.decode

    def copy_pages(self, pairs) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def plain_text(ids: list[int]) -> int:
    """Never what it was: nothing that lookup finds is right."""
    return (ids[-1] * 5 + ids[-2] * 3 + len(ids) * len(ids)) % 3


def copied_text(ids: list[int]) -> int:
    return ids[-20]


def changing_text(ids: list[int]) -> int:
    return copied_text(ids) if len(ids) // 300 % 2 else plain_text(ids)


def seconds(monkeypatch, text, row_cost: float, tokens: int, lookup: bool, noise: float = 0.0) -> tuple[float, list[int]]:
    machine = Machine(text, row_cost, noise)
    monkeypatch.setattr("gptfast.generation.scheduler.time.perf_counter", machine.clock)
    speculation = Speculation(PromptLookup()) if lookup else None
    scheduler = Scheduler(machine, 1, speculation=speculation)
    answer = row([i % 3 for i in range(40)], tokens, GREEDY)
    scheduler.run([scheduler.submit([answer])])
    return machine.now, answer.tokens


@pytest.mark.parametrize("text", [plain_text, copied_text, changing_text])
@pytest.mark.parametrize("row_cost", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_it_is_never_slower(monkeypatch, text, row_cost, noise):
    for tokens in (128, 3000):
        without, expected = seconds(monkeypatch, text, row_cost, tokens, False, noise)
        with_it, got = seconds(monkeypatch, text, row_cost, tokens, True, noise)
        assert got == expected and without / with_it >= 0.98


@pytest.mark.parametrize("row_cost, least", [(0.02, 4.0), (0.3, 1.7)])
def test_it_pays_where_texts_repeat(monkeypatch, row_cost, least):
    without, _ = seconds(monkeypatch, copied_text, row_cost, 2000, False)
    with_it, _ = seconds(monkeypatch, copied_text, row_cost, 2000, True)
    assert without / with_it >= least


def test_it_comes_back_when_the_text_changes(monkeypatch):
    without, _ = seconds(monkeypatch, changing_text, 0.05, 3000, False)
    with_it, _ = seconds(monkeypatch, changing_text, 0.05, 3000, True)
    assert without / with_it >= 1.3
