"""The front page's answer: pictures, three sentences and a table, made from the records in
`results/`. `fill_pages.py` writes them.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxnorm.analysis import drawing, results, sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.stats import MARGIN_SINCE, Difference, Sample, differences
from jaxnorm.analysis.tables import MARGIN, MINUS, VERSIONS, Table, listed, points
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep

RESULTS = Path(__file__).resolve().parents[1] / "results"
TUNED = ("instance", "rms", "none", "ghost", "renorm", "frn", "evonorm-s0", "dyt", "derf")
OTHERS = ("tuned-pixel", *(f"tuned-{norm}" for norm in TUNED))
"""The runs of other norms by the tuned recipe, with the seeds of the tuned run."""
TUNINGS = ("tuning", "tuning-pixel", *(f"tuning-{norm}" for norm in TUNED))
"""The tunings: every norm got the same learning rates."""
REFERENCE, COMPARED = 64, (4, 256)
"""The batch sizes that are compared in words."""


def runs_of(sweep: str) -> list[Run]:
    """The runs of a sweep in `results/`."""
    return [Run(directory) for directory in Sweep.open(RESULTS / sweep).directories]


class Answer:
    """The tuned run, the runs of other norms beside it, the trials of every tuning, those of the
    study's norms with those at rates beyond the range, and the runs with batches of several sizes.
    """

    def __init__(self) -> None:
        self.tuned = Run(RunDirectory(RESULTS / "tuned"))
        self.others = [Run(RunDirectory(RESULTS / name)) for name in OTHERS]
        self.tunings = [run for name in TUNINGS for run in runs_of(name)]
        self.rates = [*runs_of("tuning"), *runs_of("learning-rate")]
        self.batch_sizes = runs_of("batch-size")

    def figures(self) -> dict[str, Figure]:
        """The pictures by the names of their files."""
        made = {"answer": self.picture(), "curves": self.curves(), "mistakes": self.mistakes()}
        return {**made, "every-curve": self.every_curve(), "learning-rate": self.against_rate()}

    def picture(self) -> Figure:
        """The end of every norm, accuracy against learning rate and against batch size."""
        data = f"{self.tuned.data}; {self.tuned.info.config.arch} nets, tuned recipe"
        title = "Nets in which only the norm and its learning rate differ"
        figure = drawing.new_figure(data, title, 13, 4.4)
        ends, rates, sizes = figure.subplots(1, 3)
        plot_ends(ends, [self.tuned, *self.others])
        sweeps.plot_rates(rates, self.rates)
        sweeps.plot_against(sizes, self.batch_sizes, "batch_size")
        for axes, runs, what in (
            (ends, [self.tuned, *self.others], "seeds, mean, 95 % over seeds"),
            (rates, self.rates, "each trial"),
            (sizes, self.batch_sizes, "mean and each seed"),
        ):
            epochs = runs[0].info.config.epochs
            axes.set_title(f"{epochs} epochs, n = {counts(runs)}: {what}", fontsize=10)
        return figure

    def curves(self) -> Figure:
        """Test loss and accuracy by epoch under each norm of the study."""
        return draw_curves([self.tuned], self.tuned.caption, 8, 3.6)

    def every_curve(self) -> Figure:
        """`curves` of every norm that was trained to the end."""
        runs = [self.tuned, *self.others]
        caption = f"{self.tuned.data}; {self.tuned.info.config.arch} nets, n = {counts(runs)}"
        return draw_curves(runs, caption, 11, 4.6)

    def mistakes(self) -> Figure:
        """Ten test images that a net of each norm of the study gets wrong, drawn by the seed."""
        title = f"Mistakes of seed {self.tuned.shown_seed(self.tuned.norms[0])}, drawn by the seed"
        figure = drawing.new_figure(
            f"{self.tuned.data}; true class above predicted", title, 11, 5.2
        )
        axes, run = figure.subplots(), self.tuned
        for row, norm in enumerate(run.norms):
            axes.text(-0.1, row + 0.35, norm, ha="right", va="center", fontsize=12)
            rows = run.mistakes[f"mistakes-drawn-{norm}"]
            for column, (number, image) in enumerate(zip(rows, run.images(rows), strict=True)):
                names = (int(run.labels[number]), int(run.logits[norm][number].argmax()))
                true, predicted = (run.class_names[name] for name in names)
                extent = (column + 0.02, column + 0.98, row + 0.7, row)
                axes.imshow(image, interpolation="nearest", extent=extent, aspect="auto")
                words = f"{true}\n{predicted}"
                axes.text(column + 0.5, row + 0.72, words, ha="center", va="top", fontsize=10)
        axes.set(xlim=(-0.5, 10), ylim=(len(run.norms), 0))
        axes.set_axis_off()
        return figure

    def finding(self) -> str:
        """Returns what the study finds: a Markdown list of three sentences, an interval each."""
        sentences = (self.apart(), self.alike(), self.behind())
        return "\n".join(f"- {sentence}" for sentence in sentences) + "\n"

    def apart(self) -> str:
        """Returns a sentence on how far apart the best and the last norm of the study end."""
        means = {norm: self.tuned.sample(norm).mean for norm in self.tuned.summaries}
        last, *_, best = sorted(means, key=lambda norm: means[norm])
        pair = next(p for p in self.tuned.differences if {p.first, p.second} == {best, last})
        verdict = "shown" if pair.shown else "not shown"
        return (
            f"**Of the study's three, {best} norm ends highest**, at {means[best]:.1%}, and {last} "
            f"norm lowest, at {means[last]:.1%}: {interval_of(pair)} apart ({verdict}), each at "
            "its own learning rate."
        )

    def alike(self) -> str:
        """Returns a sentence on the two closest norms of the study, and if they are equivalent."""
        pair = min(self.tuned.differences, key=lambda pair: abs(pair.sample.mean))
        first, second = pair.first.capitalize(), pair.second
        apart = f"within {MARGIN} points: they end {interval_of(pair)} apart"
        if pair.equivalent:
            return f"**{first} and {second} norm are equivalent** {apart}{self.since()}."
        return f"**{first} and {second} norm end closest**, not found to be equivalent {apart}."

    def behind(self) -> str:
        """Returns a sentence on layer norm's deficit on the study's nets, and on one net."""
        runs = [Run(RunDirectory(RESULTS / name)) for name in ("matched", "original")]
        matched, original = (
            next(p for p in run.differences if (p.first, p.second) == ("batch", "layer"))
            for run in runs
        )
        assert matched.shown
        assert original.shown
        assert 2 * matched.sample.mean < original.sample.mean
        return (
            "**Most of layer norm's deficit in the study is its net's**: by the study's recipe it "
            f"ends {interval_of(original)} below batch norm on the study's nets, "
            f"{100 * matched.sample.mean:.1f} points on one net."
        )

    def caption(self) -> str:
        """Returns what the numbers of `finding` and `all_norms` are: n, the tests and the data."""
        config, held_out = self.tuned.info.config, self.tunings[0].info.config.validation
        environments = [e for run in (self.tuned, *self.others) for e in run.environments]
        processors = [e.device.partition("(")[2].rstrip(")") for e in environments]
        versions = [f"{name} {e.versions[name]}" for e in environments for name in VERSIONS]
        measured = "; ".join(", ".join(dict.fromkeys(texts)) for texts in (processors, versions))
        first, last = self.tuned.seed_numbers[0], self.tuned.seed_numbers[-1]
        return (
            "Last test accuracy by the tuned recipe; brackets: 95 % intervals over seeds and test "
            f"images{self.coverage()}, for these learning rates, not corrected for their number; "
            "shown: p < 0.05 by exact sign flips after Holm, for the three pairs planned; "
            f"equivalent: two one-sided tests{self.growth()}. The others have no verdict; pairs "
            f"are of the first n of the seeds {first} to {last}. Last column: {held_out:,} "
            "held-out training images, at each norm's best rate. The nets' kernels are "
            "standardized, without which group and layer norm lose most; "
            f"{self.tuned.data}; {config.arch} nets, {config.epochs} epochs, batch "
            f"{config.batch_size}; {measured}.\n"
        )

    def coverage(self) -> str:
        """Returns words on how often the intervals of the fewest seeds here cover, as simulated."""
        n = fewest(self.others)
        rows = json.loads((RESULTS / "coverage.json").read_text())["rows"]
        least = min(row["crossed"] for row in rows if row["seeds"] == n)
        return f" (for n = {n} they cover {100 * least:.0f} %)"

    def since(self) -> str:
        """Returns words on the margin of equivalence if it was fixed after the run."""
        later = self.tuned.info.environment.started < MARGIN_SINCE
        return "; the margin was fixed after the run" * later

    def growth(self) -> str:
        """Returns words on how seeds were added, and what was not shown before the last ones."""
        info = self.tuned.info
        commands = " ".join(e.command for e in self.tuned.environments)
        numbers = list(dict.fromkeys(map(int, re.findall(r"--seeds (\d+)", commands))))
        if len(numbers) < 2:
            return ""
        last = {
            norm: {seed: nets[seed].last for seed in list(nets)[: numbers[-2]]}
            for norm, nets in self.tuned.summaries.items()
        }
        before = differences(last, info.dataset.test_count)
        gained = [
            f"{then.first} minus {then.second} was not shown (p {then.adjusted_p:.2g})"
            for then, now in zip(before, self.tuned.differences, strict=True)
            if now.shown and not then.shown
        ]
        grown = "; seeds were added after a look, " + " to ".join(map(str, numbers))
        grown += ", for which p is not corrected"
        return grown + (f": at {numbers[-2]} {listed(gained)}" if gained else "")

    def all_norms(self) -> Table:
        """Every norm beside batch norm, a row each, the highest first; then those that were tuned
        and not trained to the end.
        """
        runs = [self.tuned, *self.others]
        run_of = {norm: run for run in runs for norm in run.summaries}
        pairs = {p.second: p for p in results.differences(runs) if p.first == "batch"}
        trials = sweeps.trials(self.tunings)
        best = {norm: max(trial.accuracy for trial in trials[norm]) for norm in trials}
        rows = []
        for norm in sorted(run_of, key=lambda norm: -run_of[norm].sample(norm).mean):
            sample, pair = run_of[norm].sample(norm), pairs.get(norm)
            row = [norm, str(sample.n), f"{sample.mean:.1%}"]
            rows.append([*row, *(below_batch(pair) if pair else ["", ""]), f"{best[norm]:.1%}"])
        only_tuned = sorted(best.keys() - run_of.keys(), key=lambda norm: -best[norm])
        rows += [[norm, "", "", "", "", f"{best[norm]:.1%}"] for norm in only_tuned]
        head = ["norm", "n", "test accuracy", "minus batch norm, points", "verdict"]
        head.append(f"{self.tunings[0].info.config.epochs} epochs, held out, n = 1")
        return Table("Every norm", head, rows)

    def against_rate(self) -> Figure:
        """Accuracy against learning rate, alone and larger."""
        _, figure = next(iter(sweeps.draw_tuning(self.rates)))
        return figure

    def by_learning_rate(self) -> str:
        """Returns a sentence on the range in which the learning rate hardly matters, and on where
        the two highest end: of one net each, so that nothing is shown.
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
            """Returns how far below its best rate each norm ends at a rate."""
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
            f"At the {len(near)} learning rates tried from {rates[near[0]]:g} to "
            f"{rates[near[-1]]:g} every net ends within {100 * max(most[i] for i in near):.1f} "
            f"points of its norm's best; at {rates[-2]:g} {ends(-2)} points below it, at "
            f"{rates[-1]:g} {ends(-1)} ({config.epochs} epochs, {config.validation:,} held-out "
            f"images, n = {config.seeds}, which can show no difference)."
        )

    def by_batch_size(self) -> str:
        """Returns a sentence on what small and large batches change, with intervals and no verdict:
        no family of tests was fixed for them, and so few pairs could show none.
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
            f"Batches of {' or '.join(map(str, COMPARED))} instead of {REFERENCE}, the learning "
            f"rate in proportion ({' or '.join(steps[size] for size in COMPARED)} steps instead "
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


def counts(runs: Sequence[Run]) -> str:
    """The numbers of finished seeds of the norms of these runs, as text."""
    numbers = sorted({len(nets) for run in runs for nets in run.summaries.values()})
    return listed(list(map(str, numbers)), "or")


def interval_of(pair: Difference) -> str:
    """The size of a difference in points, and its interval over seeds and images, if it is known,
    else over seeds; the one that ends higher minus the other.
    """
    sign = 1 if pair.sample.mean >= 0 else -1
    low, high = sorted(sign * end for end in (pair.crossed or pair.sample).interval or ())
    texts = [f"{100 * x:.2f}".replace("-", MINUS) for x in (abs(pair.sample.mean), low, high)]
    return f"{texts[0]} points ({texts[1]} to {texts[2]})"


def below_batch(pair: Difference) -> list[str]:
    """The cells of a norm beside batch norm: the difference with its interval, and the verdict of a
    pair that was planned.
    """
    verdict = "" if pair.adjusted_p is None else "not shown"
    verdict = "shown" if pair.shown else "equivalent" if pair.equivalent else verdict
    low, high = ((pair.crossed or pair.sample).interval or (math.nan, math.nan))[::-1]
    return [f"{points(-pair.sample.mean)} ({points(-low)} to {points(-high)})", verdict]


def plot_ends(axes: Axes, runs: Sequence[Run]) -> None:
    """Last test accuracy under each norm, the highest on top: each seed, the mean, its interval."""
    run_of = {norm: run for run in runs for norm in run.summaries}
    norms = sorted(run_of, key=lambda norm: run_of[norm].sample(norm).mean)
    look_of = drawing.looks(norms)
    for place, norm in enumerate(norms):
        sample, colour = run_of[norm].sample(norm), look_of[norm].colour
        axes.plot(sample.values, [place + 0.2] * sample.n, ".", color=colour, alpha=0.5)
        axes.plot([sample.mean], [place], look_of[norm].marker, color=colour)
        if sample.interval:
            axes.plot(sample.interval, [place] * 2, color=colour)
    axes.set_yticks(range(len(norms)), norms)
    axes.set(xlabel="last test accuracy", ylim=(-0.6, len(norms) - 0.4))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.grid(alpha=0.3)


def draw_curves(runs: Sequence[Run], caption: str, width: float, height: float) -> Figure:
    """Test loss and accuracy by epoch under each norm of these runs."""
    unshown = " (none for two)" * (fewest(runs) == 2)
    title = f"Test loss and accuracy: mean and 95 % interval over seeds{unshown}"
    figure = drawing.new_figure(caption, title, width, height)
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        plot_curves(axes, runs, what)
    return figure


def plot_curves(axes: Axes, runs: Sequence[Run], what: str) -> None:
    """Test loss or accuracy by epoch: the mean of a norm's finished seeds, and its 95 % t interval
    unless they are two, of which it is several times as wide as all that is shown.
    """
    run_of = {norm: run for run in runs for norm in run.summaries}
    for norm, run in run_of.items():
        look = drawing.looks(run_of)[norm]
        of_seeds = [run.epochs[norm, seed] for seed in run.summaries[norm]]
        values = [[getattr(epoch, f"test_{what}") for epoch in of_seed] for of_seed in of_seeds]
        samples = [Sample(of_epoch) for of_epoch in zip(*values, strict=True)]
        epochs = np.arange(1, len(samples) + 1)
        means = [sample.mean for sample in samples]
        axes.plot(epochs, means, **{**look.keywords, "markersize": 3})
        if len(of_seeds) == 2:
            continue
        low, high = zip(*(sample.interval or (sample.mean,) * 2 for sample in samples), strict=True)
        axes.fill_between(epochs, low, high, color=look.colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel=f"test {what}")
    if what == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    drawing.legend(axes)
