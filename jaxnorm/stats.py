"""Numbers from records: what a table or a figure shows, computed from epochs and test logits, and
nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxnorm.records import Epoch

TARGET = 0.70
"""The test accuracy that the study's exercise asks for."""


@dataclass(frozen=True)
class Summary:
    """One net's training in a line. Accuracies are fractions of the test set."""

    best: float
    best_epoch: int
    last: float
    first_at_target: int | None
    """The first epoch at `TARGET`, or None."""


def summarize(epochs: Sequence[Epoch]) -> Summary:
    """Sums up the epochs of one norm and seed.

    The best epoch, picked on the test set, is the study's rule; the first wins a tie.
    """
    best = max(epochs, key=lambda epoch: (epoch.test_accuracy, -epoch.epoch))
    first = next((epoch.epoch for epoch in epochs if epoch.test_accuracy >= TARGET), None)
    return Summary(best.test_accuracy, best.epoch, epochs[-1].test_accuracy, first)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(-1, keepdims=True)


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts i64[classes, classes]: row the true class, column the predicted one."""
    classes = logits.shape[1]
    return np.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(
        classes, classes
    )


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The fraction of each class classified rightly, f64[classes]; NaN for an empty class."""
    matrix = confusion_matrix(logits, labels)
    totals = matrix.sum(1)
    return np.where(totals, matrix.diagonal() / np.maximum(totals, 1), np.nan)


def mistakes(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rows that were classified wrongly, in order."""
    return np.flatnonzero(logits.argmax(1) != labels)


def confident_mistakes(logits: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The mistakes with the highest predicted probability, highest first."""
    wrong = mistakes(logits, labels)
    confidence = probabilities(logits[wrong]).max(1)
    return wrong[np.argsort(-confidence, kind="stable")[:count]]


def drawn_mistakes(logits: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Mistakes drawn without replacement, every one as likely, in order."""
    wrong = mistakes(logits, labels)
    return np.sort(np.random.default_rng(seed).choice(wrong, min(count, len(wrong)), replace=False))


def common_mistakes(logits: Sequence[np.ndarray], labels: np.ndarray, count: int) -> np.ndarray:
    """The images that every net gets wrong, those with the highest mean confidence in the wrong
    classes first.
    """
    wrong = np.flatnonzero(np.all([each.argmax(1) != labels for each in logits], axis=0))
    confidence = np.mean([probabilities(each[wrong]).max(1) for each in logits], axis=0)
    return wrong[np.argsort(-confidence, kind="stable")[:count]]
