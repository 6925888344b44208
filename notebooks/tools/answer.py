"""The front page's answer: a picture of three panels and three sentences, made from the records in
`results/`. `fill_pages.py` writes both.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxnorm.analysis import drawing, sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.stats import Sample, differences
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
        sentences = (self.at_the_end(), self.behind(), self.by_learning_rate())
        return "\n".join(f"- {sentence}" for sentence in (*sentences, self.by_batch_size())) + "\n"

    def at_the_end(self) -> str:
        """Where each norm ends under the tuned recipe, and which differences are shown."""
        samples = {norm: self.tuned.sample(norm) for norm in self.tuned.summaries}
        ends = [f"{x.mean:.1%}{between(x)} with {norm} norm" for norm, x in samples.items()]
        pairs = [
            f"{pair.first} minus {pair.second} norm is {points(pair.sample.mean)} points"
            f"{between(pair.sample, points)}, p {pair.adjusted_p:.2g}, "
            f"{'shown' if pair.shown else 'not shown'}"
            for pair in self.tuned.differences
        ]
        return (
            f"**After {self.tuned.info.config.epochs} epochs of the tuned recipe** test accuracy "
            f"is {listed(ends)}. Paired by seed, {'; '.join(pairs)} (n = {fewest([self.tuned])}; "
            "95 % intervals, not corrected for their number; p: exact sign-flip test, "
            f"Holm-corrected for three pairs; shown: p < 0.05{self.growth()})."
        )

    def growth(self) -> str:
        """How the seeds were added, and what was not shown before the last ones were; in words."""
        info = self.tuned.info
        commands = " ".join(e.command for e in self.tuned.environments)
        counts = list(dict.fromkeys(map(int, re.findall(r"--seeds (\d+)", commands))))
        if len(counts) < 2:
            return ""
        last = {
            norm: {seed: nets[seed].last for seed in list(nets)[: counts[-2]]}
            for norm, nets in self.tuned.summaries.items()
        }
        before = differences(last, info.dataset.test_count)
        gained = [
            f"{then.first} minus {then.second} was not (p {then.adjusted_p:.2g})"
            for then, now in zip(before, self.tuned.differences, strict=True)
            if now.shown and not then.shown
        ]
        grown = "; seeds were added, " + " to ".join(map(str, counts))
        return grown + (f": at {counts[-2]} {listed(gained)}" if gained else "")

    def behind(self) -> str:
        """How far layer norm ends behind batch norm, on one net and on the study's."""
        runs = [Run(RunDirectory(RESULTS / name)) for name in ("tuned", "matched", "original")]
        pairs = [
            pair
            for run in runs
            for pair in run.differences
            if (pair.first, pair.second) == ("batch", "layer")
        ]
        assert all(pair.shown for pair in pairs)
        tuned, matched, original = (f"{100 * pair.sample.mean:.1f}" for pair in pairs)
        return (
            f"**Layer norm is not far behind**: on one net it ends {tuned} points below batch norm "
            f"by the tuned recipe and {matched} by the study's; with the study's own nets "
            f"{original} (n = {fewest(runs)} each, all shown)."
        )

    def by_learning_rate(self) -> str:
        """In which range the learning rate hardly matters, and where the two highest end: of one
        net each, so that nothing is shown.
        """
        config, trials = self.rates[0].info.config, sweeps.trials(self.rates)
        best = {norm: max(trial.accuracy for trial in all_of) for norm, all_of in trials.items()}
        half = max(1.96 * math.sqrt(p * (1 - p) / config.validation) for p in best.values())
        lost = {norm: [best[norm] - trial.accuracy for trial in trials[norm]] for norm in trials}
        rates = [trial.rate for trial in next(iter(trials.values()))]
        most = [max(all_lost) for all_lost in zip(*lost.values(), strict=True)]
        near = [i for i, cost in enumerate(most) if cost <= half]
        assert near == list(range(near[0], near[-1] + 1))  # no hole in it

        def ends(i: int) -> str:
            """How far below its best rate each norm ends at a rate."""
            return listed(
                [
                    f"{norm} norm "
                    + (
                        f"{100 * lost[norm][i]:.1f}"
                        if trials[norm][i].accuracy > 0.11
                        else "at chance"
                    )
                    for norm in trials
                ]
            )

        return (
            f"**At the {len(near)} learning rates tried from {rates[near[0]]:g} to "
            f"{rates[near[-1]]:g}** every net ends within {100 * max(most[i] for i in near):.1f} "
            f"points of its norm's best; at {rates[-2]:g} {ends(-2)} points below it, at "
            f"{rates[-1]:g} {ends(-1)} ({config.epochs} epochs, {config.validation:,} held-out "
            f"images, n = {config.seeds}, which can show no difference)."
        )

    def by_batch_size(self) -> str:
        """What small and large batches change, with intervals and no verdict: no family of tests
        was fixed for them, and so few pairs could show none.
        """
        info = self.batch_sizes[0].info
        assert info.config.linear_scaling
        steps = {
            size: f"{info.config.epochs * math.ceil(info.dataset.train_count / size):,}"
            for size in (*COMPARED, REFERENCE)
        }
        changes = [
            f"{norm} norm at {size} {points(change.mean)}{between(change, points)}"
            for norm, size, change in self.changes()
        ]
        return (
            f"**Batches of {' or '.join(map(str, COMPARED))} instead of {REFERENCE}, the learning "
            f"rate in proportion** ({' or '.join(steps[size] for size in COMPARED)} steps instead "
            f"of {steps[REFERENCE]}), change accuracy by, in points: {listed(changes)} "
            f"({info.config.epochs} epochs; 95 % intervals, no verdict: n = "
            f"{fewest(self.batch_sizes)} pairs can show no difference)."
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
