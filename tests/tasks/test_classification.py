"""Classification: the head on the last real token, metrics beside scikit-learn's, temperature scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast import Error
from gptfast.config import GPT2Config
from gptfast.model import GPT2ForSequenceClassification
from gptfast.tasks import metrics
from gptfast.tasks.classification import Classification, Labelled
from gptfast.tokenizer import GPT2Tokenizer


def classifier(labels: int = 3, dtype: torch.dtype = torch.float32) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(64, 32, 16, 2, 2, num_labels=labels, initializer_range=0.4, eos_token_id=63)
    return GPT2ForSequenceClassification(config).to(dtype).eval()


def test_left_and_right_padding_are_equal_and_what_stands_there_does_not_count() -> None:
    model = classifier(dtype=torch.float64)
    rows = [torch.randint(0, 60, (length,)) for length in (1, 4, 9, 9, 6)]
    alone = torch.cat([model(row[None]).logits for row in rows])
    for filler in (0, 17, 63):
        ids, mask = torch.full((2, len(rows), 9), filler), torch.zeros(2, len(rows), 9, dtype=torch.int64)
        for number, row in enumerate(rows):
            for side, place in ((0, slice(0, len(row))), (1, slice(9 - len(row), 9))):
                ids[side, number, place], mask[side, number, place] = row, 1
        for side in (0, 1):
            padded = model(ids[side], attention_mask=mask[side]).logits
            assert torch.allclose(padded, alone, rtol=0, atol=1e-12)
    with torch.no_grad():  # of the text itself every token counts
        assert not torch.allclose(model((rows[2] + 1)[None]).logits, alone[2:3], atol=1e-3)


def test_the_trained_loss_is_that_of_the_labels() -> None:
    """loss_sum, which the trainer's step calls, beside forward(labels=): the same loss and the same gradients."""
    model = classifier()
    ids, labels = torch.randint(0, 60, (5, 7)), torch.tensor([0, 2, 1, 1, 0])
    model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    targets = torch.full_like(ids, -100)
    targets[:, -1] = labels
    loss, count = model.loss_sum(ids, targets)
    (loss / count).backward()
    assert int(count) == 5
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def drawn(seed: int, count: int = 400, classes: int = 4, temperature: float = 1.0) -> tuple[Any, Any]:
    """Labels drawn from the softmax of logits, and the logits multiplied by `temperature`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes)) * 1.5
    labels = np.array([random.choice(classes, p=row) for row in metrics.softmax(logits)])
    return labels, logits * temperature


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learns(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    labels, logits = drawn(seed, count=[400, 30, 7, 3, 1][seed])
    predicted = logits.argmax(1)
    assert metrics.accuracy(labels, predicted) == pytest.approx(sklearn.accuracy_score(labels, predicted), abs=1e-12)
    assert metrics.macro_f1(labels, predicted) == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"), abs=1e-12)
    expected = sklearn.log_loss(labels, metrics.softmax(logits, 2.0), labels=range(4))
    assert metrics.cross_entropy(labels, logits, 2.0) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.4, 0.6], [0.45, 0.55], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1, 0, 1])
    # ten bins: {0.55} none right; {0.6, 0.6} all right; {0.95, 0.95, 1.0} two of three right
    expected = (1 * 0.55 + 2 * 0.4 + 3 * abs(2 / 3 - 2.9 / 3)) / 6
    assert metrics.calibration_error(labels, probabilities, bins=10) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_is_found_and_calibrates(temperature: float) -> None:
    labels, logits = drawn(1, count=4000, temperature=temperature)
    found = metrics.fit_temperature(labels, logits)
    assert found == pytest.approx(temperature, rel=0.08)
    grid = [metrics.cross_entropy(labels, logits, found * factor) for factor in (0.97, 0.99, 1.01, 1.03)]
    assert metrics.cross_entropy(labels, logits, found) < min(grid)
    other_labels, other = drawn(2, count=4000, temperature=temperature)
    result = metrics.report(other_labels, other, found)
    assert result["ece"] < 0.03 and (temperature == 1.0 or result["ece_unscaled"] > 0.1)
    assert result["accuracy"] == metrics.report(other_labels, other, 1.0)["accuracy"], "scaling changes no answer"


def test_texts_are_answered_in_their_order_whatever_their_lengths(base: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(base)
    torch.manual_seed(1)
    model = GPT2ForSequenceClassification(GPT2Config(len(tokenizer), 8, 16, 1, 2, num_labels=2, initializer_range=0.5)).eval()
    task = Classification(labels=["bad", "good"], temperature=2.0)
    examples = [Labelled(text="the film and the plot of it is warm. " * count) for count in (3, 1, 40, 2)]
    together, alone = task.answer(model, tokenizer, examples), [task.answer(model, tokenizer, [e])[0] for e in examples]
    for a, b in zip(together, alone, strict=True):
        assert a["answer"] == b["answer"] and a["probability"] == pytest.approx(b["probability"], abs=1e-6)
        assert sum(a["probabilities"].values()) == pytest.approx(1) and a["probability"] == a["probabilities"][a["answer"]]
    hot = Classification(labels=["bad", "good"]).answer(model, tokenizer, examples)
    assert all(h["probability"] > a["probability"] for h, a in zip(hot, together, strict=True)), "a temperature above 1 doubts"


def test_a_new_head_for_new_classes_only(base: Path) -> None:
    model = GPT2ForSequenceClassification(GPT2Config(64, 8, 16, 1, 2, id2label={0: "bad", 1: "good"}, num_labels=2))
    head = model.score
    Classification(labels=["bad", "good"]).configure(model)
    assert model.score is head
    Classification(labels=["a", "b", "c"]).configure(model)
    assert model.score.weight.shape == (3, 16) and model.config.num_labels == 3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    with pytest.raises(Error, match="no names of classes are recorded"):
        Classification().answer(model, GPT2Tokenizer.from_pretrained(base), [Labelled(text="x")])
