"""The numbers that tables and figures show, computed from epochs and predictions alone.

A seed is the unit: a net's accuracy is one value, and norms are compared by the differences between
nets of the same seed, which start from the same kernels and see the same batches and masks in
`matched`. SciPy does the tests that it has. A new number is one more function here.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special
from scipy import stats as scipy_stats

from jaxnorm.config import ALL, UserError
from jaxnorm.records import Epoch, Predictions

TARGET = 0.70
"""The test accuracy that the study's exercise asks for."""
LEVEL = 0.05
"""The level below which a p-value shows a difference; intervals cover one minus it."""
FAMILY = tuple(itertools.combinations(ALL, 2))
"""The comparisons that were fixed beforehand, for which p-values are corrected: a difference is
shown if its p-value after Holm's correction is below `LEVEL`. All others have no verdict.
"""
MARGIN, MARGIN_SINCE = 0.005, "2026-11-29"
"""The difference below which two norms are equivalent, half a point, and the day on which it was
fixed: runs begun earlier did not have it beforehand.
"""
POWER = 0.8
"""The probability with which a difference is to be found by the seeds that are asked for."""
DRAWS, ALL_FLIPS, ALIKE, MOST_SEEDS = 2_000, 12, 100, 1_000
"""Of the simulated power of the sign flips: its draws, the most pairs with which every flip is
tried, the most with which they are simulated at all, and the most seeds that are asked for.
"""
RESAMPLES = 9_999
"""The resamples of the bootstrap."""
MOST_SHOWN = 15
"""The most differences of which tables and figures show every one: those of six norms."""
MOST = 10_000_000
"""The largest sum of differences, in images, for which the sign flips fit in memory."""


@dataclass(frozen=True)
class Summary:
    """One net's training in a line. Accuracies are fractions of the test set; `chosen` is that of
    the epoch with the best validation accuracy, `train` the last epoch's on the training batches,
    `validation` its accuracy on held-out images.
    """

    best: float
    best_epoch: int
    last: float
    first_at_target: int | None
    chosen: float | None
    train: float
    validation: float | None = None


def summarize(epochs: Sequence[Epoch]) -> Summary:
    """Sums up the epochs of one net.

    The best epoch, picked on the test set, is the study's rule; the first wins a tie.
    """
    best = max(epochs, key=lambda epoch: (epoch.test_accuracy, -epoch.epoch))
    first = next((epoch.epoch for epoch in epochs if epoch.test_accuracy >= TARGET), None)
    held_out = [epoch for epoch in epochs if epoch.validation_accuracy is not None]
    chosen = max(held_out, key=lambda e: (e.validation_accuracy, -e.epoch), default=None)
    last, accuracy = epochs[-1], chosen and chosen.test_accuracy
    ends = (last.test_accuracy, first, accuracy, last.train_accuracy, last.validation_accuracy)
    return Summary(best.test_accuracy, best.epoch, *ends)


@dataclass(frozen=True)
class Sample:
    """The values of one quantity, one for each seed, and what they say of its mean."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """The number of values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float | None:
        """The standard deviation (dividing by n - 1), or None for one value."""
        return float(np.std(self.values, ddof=1)) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean of normally distributed values; None for one."""
        if self.deviation is None:
            return None
        half = scipy_stats.t.ppf(1 - LEVEL / 2, self.n - 1) * self.deviation / math.sqrt(self.n)
        return self.mean - float(half), self.mean + float(half)

    @cached_property
    def bootstrap_interval(self) -> tuple[float, float] | None:
        """The percentile bootstrap's 95 % interval of the mean, or None for one value. With few
        values it is too narrow: it never leaves their range.
        """
        if self.n == 1:
            return None
        options = {"confidence_level": 1 - LEVEL, "n_resamples": RESAMPLES, "method": "percentile"}
        random = np.random.default_rng(0)
        result = scipy_stats.bootstrap((self.values,), np.mean, rng=random, **options)
        return float(result.confidence_interval.low), float(result.confidence_interval.high)

    @property
    def next_above_zero(self) -> float | None:
        """The probability that the next of these normally distributed values is above zero, or None
        for one value: T(mean / (deviation sqrt(1 + 1 / n))) with n - 1 degrees of freedom (Geisser,
        "Predictive Inference", 1993).
        """
        if not self.deviation:
            return None if self.deviation is None else (1 + float(np.sign(self.mean))) / 2
        ratio = self.mean / (self.deviation * math.sqrt(1 + 1 / self.n))
        return float(scipy_stats.t.cdf(ratio, self.n - 1))


class Crossed(NamedTuple):
    """A mean over seeds and test images, the variance that both give it, and the degrees of freedom
    of that variance.
    """

    mean: float
    variance: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval of the mean over other seeds and other images."""
        half = scipy_stats.t.ppf(1 - LEVEL / 2, self.freedom) * math.sqrt(self.variance)
        return self.mean - float(half), self.mean + float(half)

    @property
    def equivalence_p(self) -> float:
        """The p-value of two one-sided t tests, which is the larger one of theirs: that the mean is
        above -`MARGIN`, and that it is below `MARGIN` (Schuirmann, 1987).
        """
        below, above = (np.array([-1, 1]) * self.mean - MARGIN) / math.sqrt(self.variance)
        return float(scipy_stats.t.cdf(max(below, above), self.freedom))


def crossed(
    cells: np.ndarray,  # i8[S, N], each -1, 0 or 1
) -> Crossed | None:
    """Returns the mean of S seeds and N test images, each drawn from many: its variance is

        (MS_seed + MS_image - MS_residual) / (S N)

    with the mean squares of the two-way table without replication, and its degrees of freedom are
    Satterthwaite's (1946): (sum)^2 / (MS_seed^2 / f_seed + MS_image^2 / f_image + ...), and at
    least 1, under which an interval says nothing: the estimate is often lower for two seeds. None
    for one seed or image, or if the estimate of the variance is not positive.
    """
    (seeds, images), size = cells.shape, cells.size
    if min(seeds, images) < 2:
        return None
    by_seed, by_image = (cells.sum(axis, dtype=np.int64) for axis in (1, 0))
    overall = by_seed.sum() ** 2 / size
    of_seeds = (by_seed**2).sum() / images - overall
    of_images = (by_image**2).sum() / seeds - overall
    rest = np.count_nonzero(cells) - overall - of_seeds - of_images  # a square is 0 or 1
    freedoms = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    squares = np.array([of_seeds, of_images, rest]) / freedoms
    total = float(squares @ [1, 1, -1])
    if total < 1e-12:
        return None
    freedom = total**2 / float((squares**2 / freedoms).sum())
    return Crossed(float(by_seed.sum() / size), total / size, max(freedom, 1.0))


class Spread(NamedTuple):
    """Standard deviations of a norm's test accuracy over seeds: as seen, with its 95 % interval; if
    errors on the test images were independent; and over all images that there could be.
    """

    seen: float
    interval: tuple[float, float]
    independent: float
    left: float


def spread(
    correct: np.ndarray,  # bool[S, N]
) -> Spread | None:
    """Returns how much of the spread over S seeds is the noise of N test images; None for one seed.

    With V the variance over seeds: seen^2 = V(accuracy), independent^2 = sum of V(correct_i) / N^2,
    left^2 = (seen^2 - independent^2) N / (N - 1), or 0 if that is negative (Jordan, "Calibrated
    Chaos", 2023). The interval is that of normally distributed accuracies, by chi squared.
    """
    seeds, images = correct.shape
    if seeds < 2:
        return None
    rights = correct.sum(0, dtype=np.int64)
    seen = float(correct.mean(1).var(ddof=1))
    independent = float((rights * (seeds - rights)).sum()) / (seeds * (seeds - 1) * images**2)
    left = max(seen - independent, 0.0) * images / max(images - 1, 1)
    ends = (seeds - 1) * seen / scipy_stats.chi2.ppf([1 - LEVEL / 2, LEVEL / 2], seeds - 1)
    low, high = map(math.sqrt, ends)
    return Spread(math.sqrt(seen), (low, high), math.sqrt(independent), math.sqrt(left))


@dataclass(frozen=True)
class Difference:
    """One norm minus another, paired by seed; p is the exact sign-flip test's, `adjusted_p` after
    Holm's correction for `FAMILY`, or None for a pair outside of it. `crossed` is over seeds and
    test images, or None if that is not known, and `equivalence_p` after the same correction.
    """

    first: str
    second: str
    sample: Sample
    p: float
    adjusted_p: float | None
    crossed: Crossed | None = None
    equivalence_p: float | None = None

    @property
    def equivalent(self) -> bool:
        """True if the norms are found to be equivalent, within `MARGIN`."""
        return self.equivalence_p is not None and self.equivalence_p < LEVEL

    @property
    def shown(self) -> bool:
        """True if the difference is shown. The word has no other meaning."""
        return self.adjusted_p is not None and self.adjusted_p < LEVEL


def differences(
    values: Mapping[str, Mapping[int, float]],
    count: int,
    correct: Mapping[str, Mapping[int, np.ndarray]] | None = None,
) -> list[Difference]:
    """Compares every pair of norms by the seeds that both have; pairs without any are left out, and
    count in the correction of `FAMILY` all the same.

    values: for each norm, an accuracy for each seed, a fraction of `count` test images; raises
    `UserError` if one is not. correct: which images were right, bool[count], of those for which
    that is known.
    """
    pairs = []
    for value in itertools.chain.from_iterable(of_norm.values() for of_norm in values.values()):
        if round(value * count) / count != value:
            raise UserError(f"a test accuracy of {value:g} is not one of {count:,} test images")
    for first, second in itertools.combinations(values, 2):
        if seeds := sorted(values[first].keys() & values[second].keys()):
            rights = [[round(values[n][seed] * count) for seed in seeds] for n in (first, second)]
            paired = [a - b for a, b in zip(*rights, strict=True)]
            pairs.append((first, second, paired, _crossed(correct or {}, first, second, seeds)))
    adjusted = _of_family({(one, other): sign_flip_p(paired) for one, other, paired, _ in pairs})
    equivalent = _of_family({(one, other): c.equivalence_p for one, other, _, c in pairs if c})
    return [
        Difference(first, second, Sample(tuple(d / count for d in paired)), *ps, both, same)
        for first, second, paired, both in pairs
        for ps in [(sign_flip_p(paired), adjusted.get(frozenset((first, second))))]
        for same in [equivalent.get(frozenset((first, second))) if both else None]
    ]


def selected(differences: Sequence[Difference]) -> list[Difference]:
    """Returns the differences that tables and figures show: all, or, if they are more than
    `MOST_SHOWN`, those that have a verdict and those between the first norm and another.
    """
    if len(differences) <= MOST_SHOWN:
        return list(differences)
    first = differences[0].first
    return [pair for pair in differences if pair.adjusted_p is not None or pair.first == first]


def _crossed(
    correct: Mapping[str, Mapping[int, np.ndarray]], first: str, second: str, seeds: Sequence[int]
) -> Crossed | None:
    """Returns one norm minus another over seeds and images, if it is known what was right."""
    if not all(seed in correct.get(norm, {}) for norm in (first, second) for seed in seeds):
        return None
    one, other = (np.array([correct[n][seed] for seed in seeds], np.int8) for n in (first, second))
    return crossed(one - other)


def _of_family(ps: Mapping[tuple[str, str], float]) -> dict[frozenset[str], float]:
    """Returns the p-values of the comparisons of `FAMILY` after Holm's correction; one that was not
    made counts as 1.
    """
    found, family = {frozenset(pair): p for pair, p in ps.items()}, list(map(frozenset, FAMILY))
    return dict(zip(family, holm([found.get(pair, 1.0) for pair in family]), strict=True))


def sign_flip_p(differences: Sequence[int]) -> float:
    """The two-sided p-value of the sign-flip (paired permutation) test of a mean of zero: the share
    of all 2**n ways to flip the signs whose sum is at least as far from zero.

    Exact: whole numbers have no rounding that could hide a tie, and the distribution of the sum is
    built up one pair at a time (its shares are multiples of 2**-n, exact in float64 to n = 52).
    Raises `UserError` if they add up to more than `MOST`.
    """
    sizes = [abs(int(d)) for d in differences]
    if (total := sum(sizes)) > MOST:
        raise UserError(f"paired differences of {total:,} images are more than {MOST:,}")
    shares = np.zeros(2 * total + 1)  # of the sums -total to total
    shares[total] = 1.0
    for size in sizes:
        shares = (np.roll(shares, size) + np.roll(shares, -size)) / 2
    gap = abs(int(sum(differences)))
    return float(shares[: total - gap + 1].sum() + shares[total + gap :].sum()) if gap else 1.0


def expected_best(values: Sequence[float], k: int) -> float:
    """The expected maximum of k of these n values, drawn without replacement: the i-th smallest is
    it in C(i - 1, k - 1) of C(n, k) draws (Dodge et al., "Show Your Work", 2019).
    """
    ways = [math.comb(i, k - 1) for i in range(len(values))]
    return float(np.dot(sorted(values), ways) / math.comb(len(values), k))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values adjusted for all being looked at (Holm, 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def smallest_p(n: int) -> float:
    """The smallest p-value that the sign-flip test can give with n pairs: 2 of 2**n flips."""
    return min(1.0, 2.0 ** (1 - n))


def fewest_pairs(comparisons: int) -> int:
    """Returns the fewest pairs with which the sign flips can show a difference in one of this many
    comparisons.
    """
    return next(n for n in itertools.count(1) if comparisons * smallest_p(n) < LEVEL)


def what_n_can_show(n: int, comparisons: int = len(FAMILY)) -> str:
    """Says in a sentence what n pairs can show in a family of comparisons."""
    needed = fewest_pairs(comparisons)
    if n == 1:
        return (
            "With one seed there is no telling a difference between norms from one between two "
            f"runs of the same net; {needed} seeds are the fewest that can."
        )
    head = f"With {n} paired seeds no p-value under {smallest_p(n):.2g} exists"
    if comparisons > 1:
        head += f" (under {min(1.0, comparisons * smallest_p(n)):.2g} after Holm's correction)"
    if n < needed:
        return (
            f"{head}: no difference can be shown, however large it is; {needed} seeds are the "
            "fewest that can show one."
        )
    return f"{head}: enough to show a difference, which takes a p-value under {LEVEL:g}."


def t_power(n: Any, effect: float, level: float = LEVEL) -> Any:
    """Returns the power of the two-sided paired t test of n differences whose mean is `effect`
    standard deviations, not below 0: noncentral t, with n - 1 degrees of freedom and effect sqrt(n)
    (Cohen, "Statistical Power Analysis", 1988).
    """
    critical, apart = scipy_stats.t.ppf(1 - level / 2, n - 1), effect * np.sqrt(n)
    above = scipy_stats.nct.sf(critical, n - 1, apart)
    below = scipy_stats.nct.cdf(-critical, n - 1, apart)  # not a number if it is next to 0
    return above + np.nan_to_num(below)


def sign_flip_power(n: int, effect: float, level: float = LEVEL) -> float:
    """Returns the power of the sign flips, as `t_power`, by simulation: the share of `DRAWS` of n
    normal differences that are tested at this level, by every flip if n is at most `ALL_FLIPS` and
    else by as many random ones. Beyond `ALIKE` pairs it is the t test's, which it comes near.
    """
    if n > ALIKE:
        return float(t_power(n, effect, level))
    random, count = np.random.default_rng(0), 2 ** min(n - 1, ALL_FLIPS - 1)
    draws = random.standard_normal((n, DRAWS)) + effect
    if n > ALL_FLIPS:
        signs = random.choice([-1.0, 1.0], (count, n))
        signs[0] = 1
    else:  # of the first difference alone: all flipped, a sum is as far from zero
        signs = 1.0 - 2 * (np.arange(count)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ draws)
    return float(((sums >= sums[0] * (1 - 1e-9)).mean(0) < level).mean())


def seeds_needed(effect: float, level: float = LEVEL) -> tuple[int | None, int | None]:
    """Returns the fewest seeds with which the paired t test, and the sign flips, find a mean of
    `effect` standard deviations with a probability of `POWER`; None if `MOST_SEEDS` are too few.
    """
    enough = t_power(np.arange(2, MOST_SEEDS + 1), effect, level) >= POWER
    if not enough.any():
        return None, None
    by_t = 2 + int(enough.argmax())
    ns = range(max(by_t - 3, 2), MOST_SEEDS + 1)
    return by_t, next((n for n in ns if sign_flip_power(n, effect, level) >= POWER), None)


@cache
def smallest_effect(n: int, level: float) -> float | None:
    """Returns the smallest mean, in standard deviations, that the sign flips of n pairs find with a
    probability of `POWER`; None if they find none.
    """
    if smallest_p(n) >= level:
        return None
    root: Any = optimize.bisect(
        lambda effect: sign_flip_power(n, effect, level) - POWER, 0, 10, xtol=1e-3
    )
    return float(root)


def epochs_to_target(nets: Sequence[Summary]) -> str:
    """Says in words when the nets of a norm first reached `TARGET`."""
    reached = sorted(net.first_at_target for net in nets if net.first_at_target)
    if not reached:
        return "never"
    text = str(reached[0]) + (f" to {reached[-1]}" if reached[-1] != reached[0] else "")
    never = len(nets) - len(reached)
    return text + (f", never in {never} of {len(nets)}" if never else "")


def accuracy_text(sample: Sample, plus_minus: str = "\N{PLUS-MINUS SIGN}") -> str:
    """Returns a mean accuracy and its deviation as a percentage."""
    text = f"{sample.mean:.2%}"
    if sample.deviation is not None:
        text += f" {plus_minus} {100 * sample.deviation:.2f}"
    return text


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis, in float64."""
    return special.softmax(logits.astype(np.float64), axis=-1)


def calibration_error(
    probabilities: np.ndarray,  # f64[N, classes]
    labels: np.ndarray,  # i32[N]
    bins: int = 15,
) -> float:
    """The expected calibration error: how far confidence and accuracy lie apart, over bins of
    confidence of the same width (Guo et al., "On Calibration of Modern Neural Networks", 2017).
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(places, confidence - correct)).sum() / len(labels))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number that logits f32[N, classes] are divided by for the least cross-entropy; 1 if there
    are none.
    """
    if not len(labels):
        return 1.0

    def loss(logarithm: float) -> float:
        scaled = special.log_softmax(logits / np.exp(logarithm), axis=-1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    best: Any = optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return float(np.exp(best.x))


def tempered(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:  # f64[N, classes]
    """Returns probabilities after every other image's logits are divided by the temperature of the
    rest, so that none is scaled by itself.
    """
    scaled, even = logits.astype(np.float64), np.arange(len(labels)) % 2 == 0
    for part in (even, ~even):
        scaled[part] /= temperature(logits[~part], labels[~part])
    return probabilities(scaled)


class Calibration(NamedTuple):
    """The calibration of a net: its expected calibration error, that with a temperature (see
    `tempered`), and the temperature of all its logits.
    """

    error: float
    tempered_error: float
    temperature: float


def calibration(net: Predictions) -> Calibration:
    """Returns the calibration of a net, from its logits or as it was kept."""
    if net.calibration is not None:
        return Calibration(*map(float, net.calibration))
    assert net.logits is not None
    return Calibration(
        calibration_error(probabilities(net.logits), net.labels),
        calibration_error(tempered(net.logits, net.labels), net.labels),
        temperature(net.logits, net.labels),
    )


def class_accuracy(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns the fraction of each class classified rightly, f64[classes]; NaN for an empty one."""
    from sklearn.metrics import recall_score  # which takes a third of a second to load

    options: Any = {"labels": range(classes), "average": None, "zero_division": np.nan}
    return np.asarray(recall_score(labels, predicted, **options))


def confident_mistakes(logits: Sequence[np.ndarray], labels: np.ndarray, count: int) -> np.ndarray:
    """The images that every one of these nets gets wrong, those with the highest mean confidence in
    the wrong classes first.
    """
    wrong = np.flatnonzero(np.all([net.argmax(1) != labels for net in logits], axis=0))
    confidence = np.mean([probabilities(net[wrong]).max(1) for net in logits], axis=0)
    return wrong[np.argsort(-confidence, kind="stable")[:count]]


def drawn_mistakes(logits: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws mistakes without replacement, every one as likely; returns them in order."""
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    return np.sort(np.random.default_rng(seed).choice(wrong, min(count, len(wrong)), replace=False))
