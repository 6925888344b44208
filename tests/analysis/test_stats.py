"""Numbers from records, each pinned by a case worked out by hand."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import interval_coverage
import numpy as np
import pytest
from scipy import stats as scipy_stats

from jaxnorm.analysis import stats
from jaxnorm.config import UserError
from jaxnorm.records import Epoch


def epochs(*accuracies: float) -> list[Epoch]:
    return [Epoch("batch", 1, i, 1.0, 0.5, 1.0, a, 1.0, 1.0) for i, a in enumerate(accuracies, 1)]


def test_best_is_the_first_of_the_highest_and_target_the_first_that_reaches_it():
    assert stats.summarize(epochs(0.5, 0.7, 0.8, 0.8, 0.6)) == stats.Summary(
        best=0.8, best_epoch=3, last=0.6, first_at_target=2, chosen=None, train=0.5
    )
    assert stats.summarize(epochs(0.5, 0.6999)).first_at_target is None


def test_the_validation_chooses_an_epoch_without_a_look_at_the_test_set():
    history = [
        dataclasses.replace(epoch, validation_loss=1.0, validation_accuracy=accuracy)
        for epoch, accuracy in zip(epochs(0.5, 0.7, 0.9), (0.6, 0.6, 0.4), strict=True)
    ]
    assert stats.summarize(history).chosen == 0.5


def test_mean_deviation_and_students_interval_by_hand():
    # 1, 2, 6: squares of -2, -1, 3 add up to 14; t for 2 degrees of freedom is 4.302653
    sample = stats.Sample((1.0, 2.0, 6.0))
    assert (sample.n, sample.mean) == (3, 3.0)
    assert sample.deviation == pytest.approx(7**0.5)
    half = 4.302653 * (7 / 3) ** 0.5
    assert sample.interval == pytest.approx((3 - half, 3 + half), rel=1e-6)
    one = stats.Sample((0.7,))
    assert (one.mean, one.deviation, one.interval, one.bootstrap_interval) == (0.7, *3 * [None])


def test_the_bootstrap_interval_by_hand():
    # Of the 27 resamples of three values, one is the lowest thrice: 3.7 %, more than 2.5 %.
    assert stats.Sample((1.0, 2.0, 6.0)).bootstrap_interval == (1.0, 6.0)
    # One of five is 1: k ones in a resample is binomial; P(k = 0) = 32.8 %, P(k > 2) = 5.8 %,
    # P(k > 3) = 0.7 %. So 2.5 % lie at the top within k = 3.
    low, high = stats.Sample((0.0, 0.0, 0.0, 0.0, 1.0)).bootstrap_interval
    assert (low, high) == pytest.approx((0, 0.6))


@pytest.mark.parametrize(
    ("values", "extreme", "flips"),
    [
        ((1, 2, 3), 2, 8),  # +6 and -6 alone
        ((-1, -2, -3), 2, 8),
        ((1, -1, 3), 6, 8),  # sums 5, 3, 3, 1 and their negatives: six reach 3
        ((1, 1, 1, -1), 10, 16),  # 2 or more: 4 once, 2 four times, and negatives
        ((0, 0), 4, 4),
        ((5,), 2, 2),
        ((1,) * 8, 2, 256),
    ],
)
def test_the_sign_flip_p_value_by_hand(values, extreme, flips):
    assert stats.sign_flip_p(values) == pytest.approx(extreme / flips)


BATCH = (6902, 6911, 6906, 6905, 6925, 6916, 6856)
GROUP = (6894, 6918, 6902, 6884, 6915, 6909, 6828)


def test_the_sign_flip_p_value_counts_ties_that_rounding_would_hide():
    """Right of 10,000 under two norms: as fractions, SciPy gives 0.046875."""
    values = {
        name: {seed: count / 10_000 for seed, count in enumerate(counts)}
        for name, counts in (("batch", BATCH), ("group", GROUP))
    }
    (pair,) = stats.differences(values, 10_000)
    assert pair.p == 0.0625


def test_the_sign_flip_p_value_is_exact_for_many_seeds():
    assert stats.sign_flip_p([1] * 32) == stats.smallest_p(32) == 2**-31
    tail = sum(math.comb(32, k) for k in range(12)) / 2**31  # 11 or fewer of one sign
    assert stats.sign_flip_p([1] * 21 + [-1] * 11) == pytest.approx(tail, rel=1e-12)


def test_accuracies_that_the_test_images_cannot_give_are_refused():
    with pytest.raises(UserError, match="is not one of 100 test images"):
        stats.differences({"batch": {1: 0.333}, "group": {1: 0.5}}, 100)
    with pytest.raises(UserError, match="paired differences of 250,000,000 images are more than"):
        stats.differences({"batch": {1: 0.25}, "group": {1: 0.5}}, 10**9)


def test_holms_correction_by_hand():
    # 3 x 0.01; then 2 x 0.03; then 0.04, but never below the one before
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_differences_pair_by_seed_and_correct_for_the_pairs_of_the_three_norms():
    values = {
        "batch": {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.1},
        "group": {3: 0.4, 2: 0.4, 1: 0.4},
        "layer": {1: 0.5, 2: 0.4, 3: 0.6},
        "rms": {9: 0.5},
    }
    pairs = stats.differences(values, 10)
    assert [(pair.first, pair.second) for pair in pairs] == [
        ("batch", "group"),
        ("batch", "layer"),
        ("group", "layer"),
    ]
    assert pairs[0].sample.values == pytest.approx((0.1, 0.2, 0.3))
    assert pairs[1].sample.values == pytest.approx((0.0, 0.2, 0.1))
    assert pairs[2].sample.values == pytest.approx((-0.1, 0.0, -0.2))
    # All of one sign: 2 of 8 flips; a zero's two flips are the same, so 4 of 8.
    assert [pair.p for pair in pairs] == pytest.approx([0.25, 0.5, 0.5])
    assert [pair.adjusted_p for pair in pairs] == pytest.approx([0.75, 1, 1])
    assert not any(pair.shown for pair in pairs)


def test_a_difference_is_shown_by_its_p_value_in_the_family_fixed_beforehand_alone():
    """Ten images of 100 in each of eight seeds: p = 2/256, and three times that after Holm, if the
    third norm is there or not; norms outside of the family have no verdict, and change none.
    """
    seeds = range(8)
    values = {norm: dict.fromkeys(seeds, a) for norm, a in (("layer", 0.5), ("batch", 0.6))}
    (pair,) = stats.differences(values, 100)
    assert (pair.adjusted_p, pair.shown) == (pytest.approx(3 * 2 / 256), True)
    values |= {norm: dict.fromkeys(seeds, 0.1) for norm in ("pixel", "rms", "mine:Norm")}
    first, *others = stats.differences(values, 100)
    assert first == pair
    assert {(other.adjusted_p, other.shown) for other in others} == {(None, False)}


def test_what_so_many_seeds_can_show():
    assert [stats.smallest_p(n) for n in (1, 2, 3, 8)] == [1, 0.5, 0.25, 2 / 256]
    assert "7 seeds are the fewest" in stats.what_n_can_show(1, 3)  # 3 x 2/64 > 0.05 > 3 x 2/128
    three = stats.what_n_can_show(3, 3)
    assert "no p-value under 0.25 exists (under 0.75 after Holm" in three
    assert "no difference can be shown" in three
    assert "6 seeds are the fewest" in stats.what_n_can_show(3, 1)
    assert "enough" in stats.what_n_can_show(7, 3)


def test_when_the_target_was_reached_in_words():
    def nets(*firsts):
        return [stats.Summary(0.8, 1, 0.8, first, None, 0.8) for first in firsts]

    assert stats.epochs_to_target(nets(18, 13, 15)) == "13 to 18"
    assert stats.epochs_to_target(nets(13)) == "13"
    assert stats.epochs_to_target(nets(13, None, 13)) == "13, never in 1 of 3"
    assert stats.epochs_to_target(nets(None, None)) == "never"


def test_an_accuracy_in_words():
    assert stats.accuracy_text(stats.Sample((0.5,))) == "50.00%"
    assert stats.accuracy_text(stats.Sample((0.5, 0.6)), "+-") == "55.00% +- 7.07"


# Four images of three classes, by hand. Predicted: 0, 2, 1, 2; true: 0, 1, 1, 0.
LOGITS = np.log(
    np.array([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.1, 0.6, 0.3], [0.05, 0.05, 0.9]], np.float32)
)
LABELS = np.array([0, 1, 1, 0], np.int32)


def test_probabilities_are_softmax_even_of_large_logits():
    np.testing.assert_allclose(stats.probabilities(LOGITS), np.exp(LOGITS), rtol=1e-6)
    large = stats.probabilities(np.array([1e4, 0.0], np.float32))
    np.testing.assert_array_equal(large, [1, 0])


def test_accuracy_of_a_class_is_that_of_its_images_and_nan_without_any():
    np.testing.assert_array_equal(
        stats.class_accuracy(LOGITS.argmax(1), LABELS, 3), [0.5, 0.5, np.nan]
    )


def test_mistakes_by_each_rule():
    np.testing.assert_array_equal(stats.confident_mistakes([LOGITS], LABELS, 10), [3, 1])
    np.testing.assert_array_equal(stats.confident_mistakes([LOGITS], LABELS, 1), [3])
    other = LOGITS[:, [1, 0, 2]]  # right about none of 0 and 2; wrong on 1 and 3 too
    np.testing.assert_array_equal(stats.confident_mistakes([LOGITS, other], LABELS, 10), [3, 1])
    correct = np.eye(3, dtype=np.float32)[LABELS]
    assert len(stats.confident_mistakes([LOGITS, correct], LABELS, 10)) == 0


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


def test_no_mistake_gives_no_row():
    correct = (LOGITS[:1], LABELS[:1])
    assert len(stats.confident_mistakes([correct[0]], correct[1], 10)) == 0
    assert len(stats.drawn_mistakes(*correct, 10, 0)) == 0


def test_the_expected_best_of_k_is_the_mean_over_all_choices_of_k():
    values = [0.3, 0.9, 0.1, 0.5]
    for k in range(1, 5):
        wanted = np.mean([max(chosen) for chosen in itertools.combinations(values, k)])
        assert stats.expected_best(values, k) == pytest.approx(wanted)


def test_calibration_error_by_hand():
    """Of four images two are called at 0.9, one of them rightly, and two at 0.6, both rightly."""
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    labels = np.array([0, 0, 0, 0])
    assert stats.calibration_error(p, labels) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert stats.calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0
    # One wrong at 0.9 and one right at 0.97, of the two highest of 15 bins: not to be averaged.
    apart = stats.calibration_error(np.array([[0.1, 0.9], [0.97, 0.03]]), np.array([0, 0]))
    assert apart == pytest.approx((0.9 + 0.03) / 2)


def test_a_temperature_of_a_single_image_is_that_of_none_and_changes_nothing():
    logits = np.array([[2.0, 1.0]])
    probabilities = stats.tempered(logits, np.array([0]))
    np.testing.assert_array_equal(probabilities, stats.probabilities(logits))


def test_a_temperature_undoes_a_scale_and_is_of_the_other_half():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4_000, 5)) * 2
    labels = np.array([rng.choice(5, p=p) for p in stats.probabilities(logits)])
    assert stats.temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    raw = stats.calibration_error(stats.probabilities(3 * logits), labels)
    assert stats.calibration_error(stats.tempered(3 * logits, labels), labels) < raw / 5
    even = labels.copy()
    even[::2] = 0  # what the even images are scaled by does not depend on them
    tempered, other = (stats.tempered(logits, truth) for truth in (labels, even))
    np.testing.assert_array_equal(tempered[::2], other[::2])
    assert (tempered[1::2] != other[1::2]).any()


def test_the_variance_over_seeds_and_images_by_hand():
    """Two seeds, three images, a sum of 3, of squares 3: 3^2/6 = 3/2. Seeds (2, 1): 5/3 - 3/2 =
    1/6, by 1. Images (1, 0, 2): 5/2 - 3/2 = 1, by 2. What is left of 3: 1/3, by 2. Mean squares
    1/6, 1/2 and 1/6 add up to 1/2; the degrees of freedom are 1/4 by 1/36 + 1/8 + 1/72. Of a sole
    1 all three are 1/6, and 1/36 by 1/36 + 1/72 + 1/72, 1/2, is raised to 1.
    """
    both = stats.crossed(np.array([[1, 0, 1], [0, 0, 1]], np.int8))
    assert both == pytest.approx((1 / 2, (1 / 2) / 6, 3 / 2))
    one = stats.crossed(np.array([[0, 0, 0], [0, 0, 1]], np.int8))
    assert one == pytest.approx((1 / 6, (1 / 6) / 6, 1))
    assert stats.crossed(np.array([[1, 0, 1]], np.int8)) is None
    assert stats.crossed(np.array([[1], [0]], np.int8)) is None
    for no_variance in ([[1, 0], [0, 1]], [[1, 1], [1, 1]]):
        assert stats.crossed(np.array(no_variance, np.int8)) is None


def test_the_variance_over_seeds_and_images_is_that_of_the_two_way_table():
    """By residuals, of many more images than an int8 can count."""
    rng = np.random.default_rng(0)
    cells = (rng.integers(-1, 2, (6, 900)) * rng.integers(0, 2, 900)).astype(np.int8)
    cells[:, :200] = 1
    mean, by_seed, by_image = cells.mean(), cells.mean(1, keepdims=True), cells.mean(0)
    seed, image = 900 * by_seed.var(ddof=1), 6 * by_image.var(ddof=1)
    residual = ((cells - by_seed - by_image + mean) ** 2).sum() / (5 * 899)
    total = seed + image - residual
    freedom = total**2 / (seed**2 / 5 + image**2 / 899 + residual**2 / (5 * 899))
    both = stats.crossed(cells)
    assert both == pytest.approx((mean, total / 5400, freedom))
    # The interval is where the t test of its ends has p = 5 %.
    for end in both.interval:
        ratio = abs(end - mean) / (total / 5400) ** 0.5
        assert 2 * scipy_stats.t.sf(ratio, freedom) == pytest.approx(0.05)


def test_equivalence_by_hand():
    """One standard error is a tenth of a point: 0.1 points lie four of them below the margin."""
    for mean in (0.001, -0.001):
        p = stats.Crossed(mean, 1e-6, 10).equivalence_p
        assert p == pytest.approx(0.0012592, rel=1e-4)  # t of 10 degrees of freedom below -4
    assert stats.Crossed(stats.MARGIN, 1e-6, 10).equivalence_p == pytest.approx(0.5)
    assert stats.Crossed(-0.2, 1e-6, 10).equivalence_p == pytest.approx(1)


def test_differences_over_images_are_of_the_same_seeds_and_corrected_like_the_others():
    rng = np.random.default_rng(0)
    easy = rng.random(2_000) < 0.8
    right = {
        norm: {seed: easy ^ (rng.random(2_000) < flipped) for seed in range(1, 6)}
        for norm, flipped in (("batch", 0.001), ("group", 0.001), ("layer", 0.3), ("rms", 0.001))
    }
    values = {n: {seed: float(r.mean()) for seed, r in of.items()} for n, of in right.items()}
    shuffled = {norm: dict(sorted(of.items(), reverse=True)) for norm, of in right.items()}
    pairs = stats.differences(values, 2_000, shuffled)
    for pair in pairs:
        cells = [
            right[pair.first][seed].astype(int) - right[pair.second][seed] for seed in range(1, 6)
        ]
        assert pair.crossed == stats.crossed(np.array(cells, np.int8))
        assert pair.crossed.mean == pytest.approx(pair.sample.mean)
    family = [pair for pair in pairs if pair.adjusted_p is not None]
    raw = [pair.crossed.equivalence_p for pair in family]
    assert [pair.equivalence_p for pair in family] == stats.holm(raw)
    assert [(p.first, p.second) for p in pairs if p.equivalent] == [("batch", "group")]
    assert raw[0] < stats.LEVEL / 3
    del right["layer"][3]
    known = {(p.first, p.second) for p in stats.differences(values, 2_000, right) if p.crossed}
    assert known == {("batch", "group"), ("batch", "rms"), ("group", "rms")}
    assert not any(pair.crossed or pair.equivalent for pair in stats.differences(values, 2_000))


def test_the_spread_over_seeds_by_hand():
    """Accuracies 1 and 1/3: variance 2/9. Two of three images vary, each by 1/2: 1/9 of them. What
    is left is 1/9 x 3/2. The quantiles of chi squared are 5.023886 and 0.000982069.
    """
    found = stats.spread(np.array([[1, 1, 1], [1, 0, 0]], bool))
    interval = ((2 / 9 / 5.023886) ** 0.5, (2 / 9 / 0.000982069) ** 0.5)
    assert found.interval == pytest.approx(interval, rel=1e-5)
    deviations = ((2 / 9) ** 0.5, (1 / 9) ** 0.5, (1 / 6) ** 0.5)
    assert (found.seen, found.independent, found.left) == pytest.approx(deviations)
    nothing = stats.spread(np.array([[1, 0, 1], [1, 1, 0]], bool))
    assert (nothing.seen, nothing.left) == (0, 0)
    assert nothing.independent == pytest.approx((1 / 9) ** 0.5)
    assert stats.spread(np.ones((1, 5), bool)) is None


def test_the_probability_that_the_next_is_above_zero_by_hand():
    """Of 0 and 2 the mean is 1, the deviation sqrt 2, that of the next sqrt 2 x sqrt 3/2; Student's
    distribution with one degree of freedom is Cauchy's: 1/2 + atan(1 / sqrt 3) / pi.
    """
    assert stats.Sample((0.0, 2.0)).next_above_zero == pytest.approx(2 / 3)
    assert stats.Sample((0.0, -2.0)).next_above_zero == pytest.approx(1 / 3)
    assert [stats.Sample((x, x)).next_above_zero for x in (0.1, 0.0, -0.1)] == [1, 0.5, 0]
    assert stats.Sample((0.1,)).next_above_zero is None


def test_the_power_of_the_t_test_is_that_of_the_tables():
    """Cohen's small, medium and large effects, two-sided at 5 %: the sample sizes of G*Power."""
    assert [stats.seeds_needed(effect)[0] for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert stats.t_power(9, 0.0, 0.01) == pytest.approx(0.01)
    ours, rng = stats.t_power(5, 0.7, 0.1), np.random.default_rng(0)
    p = scipy_stats.ttest_1samp(rng.normal(0.7, 1, (20_000, 5)), 0, axis=1).pvalue
    assert ours == pytest.approx((p < 0.1).mean(), abs=0.01)
    assert stats.t_power(10, 10.0) == pytest.approx(1)  # SciPy's lower tail is not a number


def test_the_power_of_the_sign_flips_by_hand():
    """With six pairs only equal signs give p < 0.05, with five nothing does."""
    for effect in (0.0, 0.5, 1.5):
        share = scipy_stats.norm.cdf(effect)
        wanted = share**6 + (1 - share) ** 6
        assert stats.sign_flip_power(6, effect) == pytest.approx(wanted, abs=0.03)
    assert stats.sign_flip_power(5, 10.0) == 0
    assert stats.sign_flip_power(8, 0.0) <= stats.LEVEL + 0.015
    assert stats.seeds_needed(10.0) == (3, 6)
    assert stats.seeds_needed(1.0) == (10, 11)
    assert stats.seeds_needed(10.0, stats.LEVEL / 3) == (3, 7)
    assert stats.seeds_needed(0.01) == (None, None)
    assert stats.smallest_effect(6, stats.LEVEL / 3) is None
    all_of_seven = scipy_stats.norm.ppf(0.8 ** (1 / 7))
    assert stats.smallest_effect(7, stats.LEVEL / 3) == pytest.approx(all_of_seven, abs=0.05)


def test_the_power_of_random_flips_is_near_that_of_all_and_of_the_t_test(monkeypatch):
    some = stats.sign_flip_power(14, 0.8)
    assert stats.sign_flip_power(100, 0.25) == pytest.approx(stats.t_power(100, 0.25), abs=0.03)
    assert stats.sign_flip_power(101, 0.25) == stats.t_power(101, 0.25)
    monkeypatch.setattr(stats, "ALL_FLIPS", 14)
    assert stats.sign_flip_power(14, 0.8) == pytest.approx(some, abs=0.01)


def test_the_power_of_the_sign_flips_is_that_of_the_test_of_whole_images():
    """The same draws, as differences of thousands of images, by the test of the reports."""
    draws = np.random.default_rng(0).standard_normal((7, stats.DRAWS)) + 1.2
    ps = [stats.sign_flip_p((100 * one).round().astype(int).tolist()) for one in draws.T[:500]]
    ours = stats.sign_flip_power(7, 1.2)
    assert ours == pytest.approx(np.mean(np.array(ps) < 0.05), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("left", interval_coverage.LEFT)
def test_what_each_interval_covers(left):
    """In 2,000 made-up runs of eight seeds and 2,000 images (three deviations are 1.5 %): Student's
    interval covers the difference on the same images, and on others less; that over seeds and
    images covers both a little less often than 95 %, and norms that differ by the whole margin are
    rarely called equivalent.
    """
    covers = interval_coverage.simulate(8, left, images=2_000)
    assert covers["t, these images"] == pytest.approx(0.95, abs=0.015)
    assert covers["bootstrap"] < covers["t"] - 0.02
    assert 0.90 < covers["crossed"] < 0.965
    assert covers["equivalent"] < 0.07


@pytest.mark.slow
def test_the_coverage_on_the_page_is_what_the_simulation_says():
    path = Path(interval_coverage.__file__).parents[1] / "results" / "coverage.json"
    (row,) = [
        row
        for row in json.loads(path.read_text())["rows"]
        if (row["seeds"], row["left"]) == (4, interval_coverage.LEFT[0])
    ]
    again = interval_coverage.simulate(4, row["left"], draws=1_000)
    for name, share in again.items():
        assert share == pytest.approx(row[name], abs=0.03), name


@pytest.mark.slow
def test_the_spread_that_is_left_and_the_next_seed_are_what_is_simulated():
    """Without the rounding up to 0, what is left is unbiased; the interval of what is seen covers
    the deviation that other seeds would have; and the next value is above zero as often as said.
    """
    left, covered, accuracies = [], [], []
    for correct, _ in interval_coverage.runs(8, 0.004, images=1_000, draws=2_000):
        one = stats.spread(correct[0])
        left.append((one.seen**2 - one.independent**2) * 1_000 / 999)
        accuracies.append(one.seen**2)
        covered.append(one.interval)
    error = np.std(left) / 2_000**0.5
    assert np.mean(left) == pytest.approx(0.004**2, abs=4 * error)
    (low, high), truth = np.array(covered).T, np.mean(accuracies) ** 0.5
    assert ((low < truth) & (truth < high)).mean() == pytest.approx(0.95, abs=0.02)
    values = np.random.default_rng(0).normal(3, 2, (2_000, 6))
    ps = [stats.Sample(tuple(v[:5] - v[5])).next_above_zero for v in values]
    assert scipy_stats.kstest(ps, "uniform").pvalue > 0.001
