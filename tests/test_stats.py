"""Numbers from records, each pinned by a case worked out by hand."""

import numpy as np
import pytest

from jaxnorm import stats
from jaxnorm.records import Epoch


def epochs(*accuracies: float) -> list[Epoch]:
    return [Epoch("batch", 1, i, 1.0, 0.5, 1.0, a, 1.0, 1.0) for i, a in enumerate(accuracies, 1)]


def test_best_is_the_first_of_the_highest_and_target_the_first_that_reaches_it():
    assert stats.summarize(epochs(0.5, 0.7, 0.8, 0.8, 0.6)) == stats.Summary(0.8, 3, 0.6, 2)
    assert stats.summarize(epochs(0.5, 0.6999)) == stats.Summary(0.6999, 2, 0.6999, None)


# Four images of three classes, by hand. Predicted: 0, 2, 1, 2; true: 0, 1, 1, 0.
LOGITS = np.log(
    np.array([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.1, 0.6, 0.3], [0.05, 0.05, 0.9]], np.float32)
)
LABELS = np.array([0, 1, 1, 0], np.int32)


def test_probabilities_are_softmax_even_of_large_logits():
    np.testing.assert_allclose(stats.probabilities(LOGITS), np.exp(LOGITS), rtol=1e-6)
    large = stats.probabilities(np.array([1e4, 0.0], np.float32))
    np.testing.assert_array_equal(large, [1, 0])


def test_confusion_has_a_row_for_each_true_class():
    matrix = stats.confusion_matrix(LOGITS, LABELS)
    np.testing.assert_array_equal(matrix, [[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(stats.class_accuracy(LOGITS, LABELS), [0.5, 0.5, np.nan])


def test_mistakes_by_each_rule():
    np.testing.assert_array_equal(stats.mistakes(LOGITS, LABELS), [1, 3])
    np.testing.assert_array_equal(stats.confident_mistakes(LOGITS, LABELS, 10), [3, 1])
    np.testing.assert_array_equal(stats.confident_mistakes(LOGITS, LABELS, 1), [3])
    other = LOGITS[:, [1, 0, 2]]  # right about none of 0 and 2; wrong on 1 and 3 too
    np.testing.assert_array_equal(stats.common_mistakes([LOGITS, other], LABELS, 10), [3, 1])
    right = np.eye(3, dtype=np.float32)[LABELS]
    assert len(stats.common_mistakes([LOGITS, right], LABELS, 10)) == 0


def test_drawn_mistakes_are_a_fair_draw_by_the_seed_from_the_whole_set():
    labels = np.zeros(1000, np.int32)
    logits = np.zeros((1000, 2), np.float32)
    logits[100:, 1] = 1
    draws = [stats.drawn_mistakes(logits, labels, 10, seed) for seed in range(300)]
    for rows in draws:
        assert len(set(rows)) == 10
        assert rows.min() >= 100
    np.testing.assert_array_equal(draws[7], stats.drawn_mistakes(logits, labels, 10, 7))
    mean = np.concatenate(draws).mean()
    assert abs(mean - 549.5) < 5 * 900 / 12**0.5 / 3000**0.5
    assert len(stats.drawn_mistakes(logits[:103], labels[:103], 10, 0)) == 3


@pytest.mark.parametrize("rule", [stats.confident_mistakes, stats.drawn_mistakes])
def test_no_mistake_gives_no_row(rule):
    arguments = (0,) if rule is stats.drawn_mistakes else ()
    assert len(rule(LOGITS[:1], LABELS[:1], 10, *arguments)) == 0
