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
        data = f"{self.tuned.data}; {self.tuned.info.config.arch} nets, tuned recipe"
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
        """Where each norm ends under the tuned recipe, and which differences are shown."""
        samples = {norm: self.tuned.sample(norm) for norm in self.tuned.summaries}
        ends = [
            f"{sample.mean:.1%}{between(sample)} with {norm} norm"
            for norm, sample in samples.items()
        ]
        pairs = self.tuned.differences
        shown, others = (
            [
                f"{pair.first} norm minus {pair.second} norm is {points(pair.sample.mean)} points"
                f"{between(pair.sample, points)}, p {pair.adjusted_p:.2g}"
                for pair in pairs
                if pair.shown == wanted
            ]
            for wanted in (True, False)
        )
        verdicts = [f"shown: {listed(shown)}"] if shown else []
        verdicts += [f"not shown: {listed(others)}"] if others else []
        return (
            f"**After {self.tuned.info.config.epochs} epochs of the tuned recipe** test accuracy "
            f"is {listed(ends)}; {'; '.join(verdicts)} (paired by seed, n = "
            f"{fewest([self.tuned])}; 95 % intervals, each for itself; p of exact sign flips after "
            "Holm for three pairs)."
        )

    def by_learning_rate(self) -> str:
        """In which range the learning rate hardly matters, and what the two highest cost: of one
        net each, so that nothing is shown.
        """
        config, trials = self.rates[0].info.config, sweeps.trials(self.rates)
        best = {norm: max(trial.accuracy for trial in all_of) for norm, all_of in trials.items()}
        half = max(1.96 * math.sqrt(p * (1 - p) / config.validation) for p in best.values())
        rates = [trial.rate for trial in next(iter(trials.values()))]
        lost = {norm: [best[norm] - trial.accuracy for trial in trials[norm]] for norm in trials}
        near = [
            r
            for r, all_lost in zip(rates, zip(*lost.values(), strict=True), strict=True)
            if max(all_lost) <= half
        ]
        assert near == rates[rates.index(near[0]) : rates.index(near[-1]) + 1]  # no hole in it
        less, most = (
            listed([f"{norm} norm {100 * costs[end]:.1f}" for norm, costs in lost.items()])
            for end in (-2, -1)
        )
        return (
            f"**Learning rates from {near[0]:g} to {near[-1]:g}** cost no net more than "
            f"{100 * half:.1f} points of its norm's best rate, half the 95 % interval of one "
            f"accuracy on {config.validation:,} held-out images; {rates[-2]:g} costs {less} "
            f"points; {rates[-1]:g} costs {most} ({config.epochs} epochs, n = {config.seeds}, "
            "which can show no difference)."
        )

    def by_batch_size(self) -> str:
        """What small and large batches change, with intervals and no verdict: no family of tests
        was fixed for them, and so few pairs could show none.
        """
        changes = [
            f"{norm} norm at {size} {points(change.mean)}{between(change, points)}"
            for norm, size, change in self.changes()
        ]
        return (
            f"**Batches of {' or '.join(map(str, COMPARED))} instead of {REFERENCE}** change "
            f"accuracy, in points: {listed(changes)} (after "
            f"{self.batch_sizes[0].info.config.epochs} epochs; 95 % intervals, each for itself, "
            f"and no verdict: n = {fewest(self.batch_sizes)} pairs can show no difference)."
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
        epochs, look = np.arange(1, len(samples) + 1), drawing.looks(run.norms)[norm]
        means = [sample.mean for sample in samples]
        axes.plot(epochs, means, **{**look.keywords, "markersize": 3})
        low, high = zip(*(sample.interval or (sample.mean,) * 2 for sample in samples), strict=True)
        axes.fill_between(epochs, low, high, color=look.colour, alpha=0.2, linewidth=0)
    drawing.percent_axes(axes, "epoch", "test accuracy")
