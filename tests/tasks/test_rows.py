"""A task's examples as rows: each once an epoch, however they are read; padding and packing change no loss."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.config import GPT2Config
from gptfast.model import GPT2ForSequenceClassification, GPT2LMHeadModel
from gptfast.tasks.rows import ExampleRows, packed
from gptfast.tasks.task import IGNORED, Encoded
from gptfast.training.loader import DataSource


def encoded(count: int, longest: int = 12, classes: bool = False) -> list[Encoded]:
    """Examples that begin with their own number."""
    draw = random.Random(count)
    made = []
    for number in range(count):
        ids = [number % 60, *(draw.randrange(60) for _ in range(draw.randrange(1, longest)))]
        last = [draw.randrange(3)] if classes else [draw.randrange(60)]
        targets = [IGNORED] * (len(ids) - 1) + last if classes else [IGNORED, *ids[2:], *last]
        made.append(Encoded(ids, targets))
    return made


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 50), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), pack=st.none() | st.integers(12, 40))
def test_every_example_once_an_epoch_however_it_is_read(count: int, cuts: list[int], pack: int | None) -> None:
    examples = encoded(count)
    whole = ExampleRows(examples, seed=4, pack=pack)
    assert isinstance(whole, DataSource)
    total = 3 * whole.windows
    numbers, first = [], 0
    for size in itertools.cycle(cuts):
        size = min(size, total - first)
        batch = ExampleRows(examples, seed=4, pack=pack).samples(first, size)  # a fresh one: nothing is remembered
        assert batch.numbers is not None
        numbers += batch.numbers.tolist()
        first += size
        if first == total:
            break
    for epoch in range(3):
        assert sorted(numbers[epoch * whole.windows : (epoch + 1) * whole.windows]) == list(range(whole.windows))
    every = whole.rows(list(range(whole.windows)))
    assert every.document_ids is not None and every.positions is not None
    real = every.document_ids >= 0
    assert int(real.sum()) == every.tokens == sum(len(example.ids) for example in examples)
    assert (every.targets[~real] == IGNORED).all()
    starts = every.ids[real & (every.positions == 0)].tolist()
    assert sorted(starts) == sorted(example.ids[0] for example in examples)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), size=st.integers(10, 30))
def test_packing_is_a_partition_that_fits(lengths: list[int], size: int) -> None:
    groups = packed(lengths, size)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in group) <= size or len(group) == 1 for group in groups)
    rooms = sorted(size - sum(lengths[n] for n in group) for group in groups)
    assert len(groups) == 1 or rooms[-1] + rooms[-2] < size, "two groups would have fitted into one"


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2ForSequenceClassification])
@pytest.mark.parametrize("pack", [None, 30])
def test_padding_and_packing_change_no_loss(kind: type, pack: int | None) -> None:
    torch.manual_seed(0)
    model = kind(GPT2Config(64, 32, 16, 2, 2, num_labels=3, initializer_range=0.3)).eval()
    examples = encoded(20, classes=kind is GPT2ForSequenceClassification)
    rows = ExampleRows(examples, pack=pack)
    assert pack is None or rows.windows < 10
    model.requires_grad_(False)
    loss, count = model.loss_sum(*rows.rows(list(range(rows.windows))).inputs)
    alone = [model.loss_sum(torch.tensor([e.ids]), torch.tensor([e.targets])) for e in examples]
    assert int(count) == sum(int(n) for _, n in alone) == sum(t != IGNORED for e in examples for t in e.targets)
    assert float(loss) == pytest.approx(sum(float(value) for value, _ in alone), rel=1e-5)


def test_order_depends_on_the_seed_and_the_hash_on_the_examples(tmp_path: Path) -> None:
    examples = encoded(40)
    a, b = ExampleRows(examples, seed=0), ExampleRows(examples, seed=1)
    assert a.samples(0, 40).numbers.tolist() != b.samples(0, 40).numbers.tolist()  # type: ignore[union-attr]
    assert a.samples(0, 40).numbers.tolist() != a.samples(40, 40).numbers.tolist()  # type: ignore[union-attr]
    changed = [*examples[:-1], Encoded(examples[-1].ids, [*examples[-1].targets[:-1], 1 + examples[-1].targets[-1] % 59])]
    assert len({a.fingerprint, ExampleRows(changed).fingerprint, ExampleRows(examples, pack=30).fingerprint}) == 3
    assert a.fingerprint == b.fingerprint
