"""What a run found, in sentences: with n and intervals, and what it does not show."""

from collections.abc import Sequence

from jaxnorm.analysis import stats
from jaxnorm.analysis.results import Run, left_out
from jaxnorm.analysis.tables import (
    MARGIN,
    MINUS,
    chance,
    listed,
    points,
    spreads_of,
    what_pairs_can_show,
)
from jaxnorm.config import Config, activating, named


def headline(run: Run) -> str:
    """Says in two sentences what the run found: the end of each norm, and which differences between
    them are shown.
    """
    return " ".join([_ends(run), *filter(None, [_shown(run.differences, _equivalent(run))])])


def finding(run: Run) -> str:
    """Says what the run found, with n and intervals, and what it does not show: a sentence on the
    ends of the norms, one for each pair, one on what n seeds can show, and those of `further`.
    """
    sentences = [_ends(run), *filter(None, [_untuned(run.info.config)])] if run.summaries else []
    if len(run.summaries) > 1:
        sentences += compared(stats.selected(run.differences))
    return " ".join([*(sentences or [_ends(run)]), *further(run)])


def _ends(run: Run) -> str:
    """The last test accuracy of each norm, the best first, in a sentence."""
    if not run.summaries:
        return "No net is finished yet, so nothing is found."
    compares, ends = "With the study's own nets, which differ in more than the norm", []
    config = run.info.config
    if config.arch != "original":
        apart = len({config.rate(norm) for norm in config.norms}) > 1
        parts = ["the norm", *["its learning rate"] * apart]
        parts += ["the activation of some"] * bool(activating(run.summaries))
        compares = f"With one net in which only {listed(parts)} differ{'s' * (len(parts) == 1)}"
    samples = {norm: run.sample(norm) for norm in run.summaries}
    for norm, sample in sorted(samples.items(), key=lambda item: -item[1].mean):
        text = f"{named(norm)} {'at' if ends else 'ends at'} {sample.mean:.1%}"
        if sample.interval:
            low, high = sample.interval
            text += f" (95% interval {100 * max(low, 0):.1f} to {100 * min(high, 1):.1f})"
        ends.append(text)
    counts = sorted({sample.n for sample in samples.values()})
    n = f"n = {'/'.join(map(str, counts))}"
    n += " seeds each" if counts[-1] > 1 else ", one run of each"
    return f"{compares}, {listed(ends)} test accuracy ({n}{left_out([run])}, {run.data})."


def _shown(differences: Sequence[stats.Difference], equivalent: str) -> str:
    """Says in a sentence which differences are shown and which are not, of those with a verdict;
    and which norms are equivalent.
    """
    judged = [pair for pair in differences if pair.sample.n > 1 and pair.adjusted_p is not None]
    if not judged:
        return what_pairs_can_show(differences)
    parts = [listed(above)] if (above := [_above(pair) for pair in judged if pair.shown]) else []
    if others := [f"{pair.first} and {pair.second}" for pair in judged if not pair.shown]:
        counts = "/".join(map(str, sorted({pair.sample.n for pair in judged})))
        between = " or between ".join(others)
        parts.append(f"no difference between {between} norm is shown (n = {counts})")
    return f"Paired by seed, {'; '.join([*parts, *filter(None, [equivalent])])}."


def further(run: Run) -> list[str]:
    """Says more of the differences and of the spread over seeds: a sentence each on other images,
    on equivalence, on the next seed, on the test set's noise, and on what n seeds could show.
    """
    pairs = [pair for pair in run.differences if pair.sample.n > 1]
    if len(pairs) > 3:  # of many norms the table has the others
        pairs = [pair for pair in pairs if pair.adjusted_p is not None]
    alike = _equivalent(run) or f"no two norms are found to be equivalent within {MARGIN} points"
    tested = any(pair.equivalence_p is not None for pair in pairs)
    texts = [_over_images(pairs), f"By two one-sided tests {alike}." * tested, _next_seed(pairs)]
    return [text for text in [*texts, _noise(run), _could_show(pairs)] if text]


def _over_images(pairs: Sequence[stats.Difference]) -> str:
    """The intervals over seeds and test images, in a sentence, of the pairs that have one."""
    texts = [
        f"{pair.first} minus {named(pair.second)} is {points(pair.crossed.mean)} points "
        f"({' to '.join(map(points, pair.crossed.interval))})"
        for pair in pairs
        if pair.crossed
    ]
    return f"Over other seeds and other test images, {listed(texts)}." if texts else ""


def _equivalent(run: Run) -> str:
    """Says which norms are equivalent, and if the margin was not fixed before the run."""
    pairs = [
        f"{pair.first} and {pair.second} norm (p {pair.equivalence_p:.2g} after Holm)"
        for pair in run.differences
        if pair.equivalent
    ]
    later = run.info.environment.started < stats.MARGIN_SINCE
    margin = f"{MARGIN} points{', a margin fixed after the run' * later}"
    return f"{listed(pairs)} are equivalent within {margin}" if pairs else ""


def _next_seed(pairs: Sequence[stats.Difference]) -> str:
    """The probability that one norm's net beats the other's under one more seed, in a sentence."""
    texts = [
        f"{chance(pair.sample.next_above_zero)} that {named(pair.first)} beats {named(pair.second)}"
        for pair in pairs
    ]
    return f"Under one more seed the probability is {listed(texts)}." if texts else ""


def _noise(run: Run) -> str:
    """Returns a sentence on the test set's share of each norm's deviation over seeds."""
    if not (spreads := spreads_of(run)):
        return ""
    seen = [f"{100 * one.seen:.2f} for {named(norm)}" for norm, one in spreads.items()]
    independent = [f"{100 * one.independent:.2f}" for one in spreads.values()]
    left = [f"{100 * one.left:.2f}" if one.left else "nothing" for one in spreads.values()]
    return (
        f"The deviation over seeds is, in points, {listed(seen)}; if errors on the test images "
        f"were independent, it would be {listed(independent)}, which leaves {listed(left)}."
    )


def _could_show(pairs: Sequence[stats.Difference]) -> str:
    """The smallest difference of each pair that its n could show, in a sentence."""
    texts = []
    for pair in pairs:
        effect = stats.smallest_effect(pair.sample.n, stats.LEVEL / len(stats.FAMILY))
        if effect and pair.adjusted_p is not None:
            smallest = f"{100 * effect * (pair.sample.deviation or 0):.2f}"
            texts.append(f"{smallest} between {pair.first} and {pair.second} norm")
    if not texts:
        return ""
    n = "/".join(map(str, sorted({pair.sample.n for pair in pairs})))
    return (
        f"With a probability of {stats.POWER:.0%} n = {n} would show a difference of, in points, "
        f"{listed(texts)}, if differences vary as these do."
    )


def _untuned(config: Config) -> str:
    """The learning rate of each norm, in a sentence, if some were tuned and some were not."""
    if not config.untuned:
        return ""
    texts = []
    for norm in config.norms:
        how = "not tuned" if norm in config.untuned else "tuned"
        texts.append(f"{named(norm)} {config.rate(norm):g} ({how})")
    return f"Learning rates: {listed(texts)}."


def compared(differences: Sequence[stats.Difference]) -> list[str]:
    """Says what paired differences show: a sentence for each that has an interval, and one on what
    this many pairs can show. A pair outside of the family that was fixed beforehand has no verdict.
    """
    pairs = [_compared(pair) for pair in differences if pair.sample.n > 1]
    return [*pairs, *filter(None, [what_pairs_can_show(differences)])]


def _compared(difference: stats.Difference) -> str:
    """Says what a paired difference shows."""
    first, second, sample = difference.first, difference.second, difference.sample
    low, high = sample.interval or (sample.mean, sample.mean)
    tail, interval = f"n = {sample.n}", f"{points(low)} to {points(high)}"
    if difference.adjusted_p is None:
        mean = f"{points(sample.mean)} points (95% interval {interval}, {tail})"
        return f"Paired by seed, {named(first)} minus {named(second)} is {mean}."
    if difference.shown:
        return f"Paired by seed, {_above(difference)}."
    few = sample.n < stats.fewest_pairs(len(stats.FAMILY))
    tail += ", too few to show any" if few else f", p {difference.adjusted_p:.2g} after Holm"
    return (
        f"No difference between {first} and {second} norm is shown: its 95% interval is "
        f"{interval} points ({tail})."
    )


def _above(difference: stats.Difference) -> str:
    """A difference that is shown, in words."""
    first, second, sample = difference.first, difference.second, difference.sample
    low, high = sample.interval or (sample.mean, sample.mean)
    if sample.mean < 0:
        first, second, low, high = second, first, -high, -low
    interval = f"{100 * low:.1f} to {100 * high:.1f}".replace("-", MINUS)
    return (
        f"{first} norm is above {second} norm by {abs(100 * sample.mean):.1f} points "
        f"({interval}, n = {sample.n}, p {difference.adjusted_p:.2g} after Holm)"
    )
