"""The front page's answer: a picture of three panels and three sentences, made from the records in
`results/`. `fill_pages.py` writes both.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxnorm.analysis import drawing, sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.stats import Sample
from jaxnorm.analysis.tables import MINUS, Table, listed, points
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep

RESULTS = Path(__file__).resolve().parents[1] / "results"
REFERENCE, COMPARED = 64, (4, 256)
"""The batch sizes that the third sentence compares."""


def runs_of(sweep: str) -> list[Run]:
    """The runs of a sweep in `results/`."""
    return [Run(directory) for directory in Sweep.open(RESULTS / sweep).directories]


class Answer:
    """The tuned run, the trials of the tuning with those at rates beyond its range, and the runs
    with batches of several sizes.
    """

    def __init__(self) -> None:
        self.tuned = Run(RunDirectory(RESULTS / "tuned"))
        self.rates = [*runs_of("tuning"), *runs_of("learning-rate")]
        self.batch_sizes = runs_of("batch-size")

    def picture(self) -> Figure:
        """Learning curves, accuracy against learning rate and against batch size, each with n."""
        data = (
            f"{self.tuned.info.dataset.caption}; {self.tuned.info.config.arch} nets, tuned recipe"
        )
        title = "Batch, group and layer norm where only the norm differs"
        figure = drawing.new_figure(data, title, 13, 4.4)
        curves, rates, sizes = figure.subplots(1, 3)
        plot_curves(curves, self.tuned)
        sweeps.plot_rates(rates, self.rates)
        sweeps.plot_against(sizes, self.batch_sizes, "batch_size")
        for axes, runs, what in (
            (curves, [self.tuned], "mean and 95 % interval"),
            (rates, self.rates, "each trial"),
            (sizes, self.batch_sizes, "mean and each seed"),
        ):
            epochs = runs[0].info.config.epochs
            axes.set_title(f"{epochs} epochs, n = {fewest(runs)}: {what}", fontsize=10)
        return figure

    def against_rate(self) -> Figure:
        """Accuracy against learning rate, alone and larger."""
        _, figure = next(iter(sweeps.draw_tuning(self.rates)))
        return figure

    def sentences(self) -> str:
        """What the study finds, each sentence with its n and its intervals, as a Markdown list."""
        sentences = (self.at_the_end(), self.by_learning_rate(), self.by_batch_size())
        return "\n".join(f"- {sentence}" for sentence in sentences) + "\n"

    def at_the_end(self) -> str:
        """Where each norm ends under the tuned recipe, and the differences whose t interval leaves
        zero out.
        """
        samples = {norm: self.tuned.sample(norm) for norm in self.tuned.summaries}
        ends = [
            f"{sample.mean:.1%}{between(sample)} with {norm} norm"
            for norm, sample in samples.items()
        ]
        shown = [
            f"{pair.first} norm minus {pair.second} norm is {points(pair.sample.mean)} points"
            f"{between(pair.sample, points)}, p {pair.adjusted_p:.2g}"
            for pair in self.tuned.differences
            if pair.sample.excludes_zero
        ]
        clear = f"paired by seed, {listed(shown)}" if shown else "no difference is shown"
        return (
            f"**After {self.tuned.info.config.epochs} epochs of the tuned recipe** test accuracy "
            f"is {listed(ends)}; {clear} (n = {fewest([self.tuned])} seeds; 95 % intervals, each "
            "for itself; p of exact sign flips after Holm)."
        )

    def by_learning_rate(self) -> str:
        """In which range the learning rate does not matter, and what the two highest cost."""
        config, trials = self.rates[0].info.config, sweeps.trials(self.rates)
        best = {norm: max(accuracy for _, accuracy in pairs) for norm, pairs in trials.items()}
        half = max(1.96 * math.sqrt(p * (1 - p) / config.validation) for p in best.values())
        rates = [rate for rate, _ in next(iter(trials.values()))]
        lost = {norm: [best[norm] - accuracy for _, accuracy in trials[norm]] for norm in trials}
        near = [
            r
            for r, all_lost in zip(rates, zip(*lost.values(), strict=True), strict=True)
            if max(all_lost) <= half
        ]
        assert near == rates[rates.index(near[0]) : rates.index(near[-1]) + 1]  # no hole in it
        least = {min(lost, key=lambda norm: lost[norm][end]) for end in (-2, -1)}
        best_above = f"above, {least.pop()} norm loses least: " if len(least) == 1 else ""
        less, most = (
            listed([f"{norm} norm {100 * costs[end]:.1f}" for norm, costs in lost.items()])
            for end in (-2, -1)
        )
        return (
            f"**Learning rates may differ by a factor of {near[-1] / near[0]:.0f}**: from "
            f"{near[0]:g} to {near[-1]:g} every norm stays within {100 * half:.1f} points of its "
            f"best, the 95 % interval of one accuracy on {config.validation:,} held-out images; "
            f"{best_above}{rates[-2]:g} costs {less} points; {rates[-1]:g} costs {most} "
            f"({config.epochs} epochs, n = {config.seeds})."
        )

    def by_batch_size(self) -> str:
        """Which changes of accuracy by small and large batches are shown, and which are not."""
        shown, held = [], []
        for norm, size, change in self.changes():
            text = f"{norm} norm at {size}, {points(change.mean)}{between(change, points)}"
            (shown if change.excludes_zero else held).append((change.mean, text))
        parts = []
        if shown:
            parts.append(f": {listed([text for _, text in shown])} points")
        if held:
            ends = f"{points(min(held)[0])} to {points(max(held)[0])}"
            parts.append(f"; the other {len(held)}, {ends} points, have intervals that hold zero")
        verb = "is" if len(shown) == 1 else "are"
        return (
            f"**Of {len(shown + held)} changes by batches of {' or '.join(map(str, COMPARED))} "
            f"instead of {REFERENCE}, {len(shown)} {verb} shown**{''.join(parts)} (accuracy after "
            f"{self.batch_sizes[0].info.config.epochs} epochs, n = {fewest(self.batch_sizes)} "
            "pairs, 95 % intervals)."
        )

    def changes(self) -> list[tuple[str, int, Sample]]:
        """What each batch size of `COMPARED` changes for each norm against `REFERENCE`: the
        differences of last test accuracies, paired by seed.
        """
        runs = {run.info.config.batch_size: run.summaries for run in self.batch_sizes}
        return [
            (norm, size, Sample(tuple(nets[s].last - runs[REFERENCE][norm][s].last for s in nets)))
            for size in COMPARED
            for norm, nets in runs[size].items()
        ]

    def table(self) -> Table:
        """`changes`, a row each."""
        rows = []
        for norm, size, change in self.changes():
            interval = (
                " to ".join(map(points, change.interval)) if change.interval else "none: n = 1"
            )
            name = f"{norm}, {size} {MINUS} {REFERENCE}"
            rows.append([name, str(change.n), points(change.mean), interval])
        head = ["norm, batches", "pairs", "mean, points", "95% t interval"]
        return Table("Changes by batch size", head, rows)


def fewest(runs: Sequence[Run]) -> int:
    """The fewest finished seeds of a norm of these runs."""
    return min(len(nets) for run in runs for nets in run.summaries.values())


def between(sample: Sample, text: Callable[[float], str] = lambda x: f"{100 * x:.1f}") -> str:
    """Student's 95 % interval of a mean, in brackets; nothing for a single value."""
    return f" ({' to '.join(map(text, sample.interval))})" if sample.interval else ""


def plot_curves(axes: Axes, run: Run) -> None:
    """Test accuracy by epoch: the mean of a norm's finished seeds, and its 95 % t interval."""
    for norm, nets in run.summaries.items():
        curves = [[epoch.test_accuracy for epoch in run.epochs[norm, seed]] for seed in nets]
        samples = [Sample(values) for values in zip(*curves, strict=True)]
        epochs, look = np.arange(1, len(samples) + 1), drawing.look_of(norm)
        axes.plot(epochs, [sample.mean for sample in samples], **{**look, "markersize": 3})
        low, high = zip(*(sample.interval or (sample.mean,) * 2 for sample in samples), strict=True)
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.2, linewidth=0)
    drawing.percent_axes(axes, "epoch", "test accuracy")
