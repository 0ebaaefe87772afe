"""Metrics of classification, on plain NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BINS = 15  # of confidence, as in Guo et al. 2017


def accuracy(labels: Ints, predicted: Ints) -> float:
    """Fraction of labels [N] that are predicted."""
    return float((labels == predicted).mean())


def macro_f1(labels: Ints, predicted: Ints) -> float:
    """The mean over the classes that occur in labels [N] or predicted [N] of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for name in np.union1d(labels, predicted):
        hits = int(((labels == name) & (predicted == name)).sum())
        scores.append(2 * hits / int((labels == name).sum() + (predicted == name).sum()))
    return float(np.mean(scores))


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities [N, K] of logits [N, K] / temperature."""
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def calibration_error(labels: Ints, probabilities: Floats, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks"): over equal bins of the largest
    probability, the mean of |accuracy - mean confidence|, weighted by the bins' counts."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    total = 0.0
    for place in np.unique(places):
        here = places == place
        total += abs(right[here].mean() - confidence[here].mean()) * here.mean()
    return float(total)


def cross_entropy(labels: Ints, logits: Floats, temperature: float = 1.0) -> float:
    """Mean of -log P of the labels, in nats."""
    scaled = logits / temperature
    top = scaled.max(axis=1)
    lse = np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top
    return float((lse - scaled[np.arange(len(labels)), labels]).mean())


def fit_temperature(labels: Ints, logits: Floats) -> float:
    """The temperature in 0.01 .. 100 with the least cross entropy: a golden-section search, which finds it because the cross
    entropy is convex in 1 / temperature."""
    low, high, ratio = np.log(0.01), np.log(100.0), (5**0.5 - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if cross_entropy(labels, logits, float(np.exp(left))) <= cross_entropy(labels, logits, float(np.exp(right))):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def report(labels: Ints, logits: Floats, temperature: float) -> dict[str, Any]:
    """accuracy, macro_f1, loss (nats), and ece before and after temperature scaling, of logits [N, K]."""
    predicted = logits.argmax(axis=1)
    return {
        "accuracy": accuracy(labels, predicted), "macro_f1": macro_f1(labels, predicted),
        "loss": cross_entropy(labels, logits, temperature), "ece": calibration_error(labels, softmax(logits, temperature)),
        "ece_unscaled": calibration_error(labels, softmax(logits)), "temperature": temperature,
    }  # fmt: skip
