"""Tables and figures of several runs together: of a sweep, and of a tuning."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxnorm.analysis import stats
from jaxnorm.analysis.drawing import Look, Named, looks, new_figure, percent_axes, plain, png
from jaxnorm.analysis.results import Run, left_out, seeds_text
from jaxnorm.analysis.tables import MEAN, Table
from jaxnorm.config import counted, differing, value_text
from jaxnorm.storage.directory import RunDirectory

WIDEST = 6
"""The most norms that have a column each in a table of trials."""
FAR, NEAR = 0.2, 0.1
"""How far below the best trial another lies if a figure shows the highest apart, and how far down
these go.
"""


def caption(runs: Sequence[Run]) -> str:
    """Returns the line under every figure of a sweep: the data, the nets, the seeds of each, and
    how many nets are left out because they are not finished.
    """
    config = runs[0].info.config
    seeds = seeds_text(config.seed_numbers)
    return f"{runs[0].data}; {config.arch} nets, {seeds}{left_out(runs)}"


def _looks(runs: Sequence[Run]) -> dict[str, Look]:
    return looks(norm for run in runs for norm in run.info.config.norms)


def results(runs: Sequence[Run]) -> Table:
    """Returns the last test accuracy of every norm in every run of a sweep, of finished nets, and
    how many these are if some are lost: a row for each run.
    """
    first, rows, lost = runs[0].info.config, [], ""
    differ = differing([run.info.config for run in runs])
    others = [name for name in differ if name not in ("batch_size", "learning_rate")]
    for run in runs:
        config, cells = run.info.config, []
        for norm in first.norms:
            done = run.summaries.get(norm)
            cells.append(stats.accuracy_text(run.sample(norm)) if done else "none")
            if len(done or ()) < config.seeds:
                cells[-1] += f" ({len(done or ())} of {config.seeds})"
                lost = " Nets that are not counted diverged, or did not finish."
        settings = [value_text(getattr(config, name)) for name in others]
        rows.append([str(config.batch_size), config.rate_text, *settings, *cells])
    each = f"n = {first.seeds} each{' unless the table says otherwise' * bool(lost)}"
    note = (
        f"Last test accuracy after {counted(first.epochs, 'epoch')}, {each}"
        f"{MEAN if first.seeds > 1 else ''}; {first.arch} nets, {runs[0].data}."
    )
    if first.linear_scaling:
        note += f" The learning rate is multiplied by batch / {first.usual_batch}."
    head = ["batch", "learning rate", *(name.replace("_", " ") for name in others), *first.norms]
    return Table("The sweep", head, rows, note + lost)


def plot_against(axes: Axes, runs: Sequence[Run], setting: str) -> None:
    """Plots the last test accuracy of every norm against a setting: the mean and each seed."""
    ordered = sorted((float(getattr(run.info.config, setting)), i) for i, run in enumerate(runs))
    look_of = _looks(runs)
    for norm in runs[0].info.config.norms:
        ends = [(x, runs[i].sample(norm)) for x, i in ordered if norm in runs[i].summaries]
        if not ends:
            continue
        means, look = [sample.mean for _, sample in ends], look_of[norm]
        axes.plot([x for x, _ in ends], means, **look.keywords)
        seeds = [(x, accuracy) for x, sample in ends for accuracy in sample.values]
        axes.plot(*zip(*seeds, strict=True), ".", color=look.colour, alpha=0.5)
    axes.set_xscale("log" if ordered[0][0] > 0 else "linear")
    axes.set_xticks([x for x, _ in ordered], [f"{x:g}" for x, _ in ordered])
    axes.minorticks_off()
    percent_axes(axes, setting.replace("_", " "), "last test accuracy", decimals=1)


def draw(runs: Sequence[Run]) -> Named:
    """Draws accuracy against what differs between the runs of a sweep, if that is one number."""
    differ = differing([run.info.config for run in runs])
    if len(differ) == 1 and any(run.summaries for run in runs):
        title = f"Accuracy against {differ[0].replace('_', ' ')}"
        figure = new_figure(caption(runs), title, 8, 4.6)
        plot_against(figure.subplots(), runs, differ[0])
        yield differ[0].replace("_", "-"), figure


class Trial(NamedTuple):
    """A norm's nets at a learning rate (before linear scaling, as it is given to a command), and
    their mean accuracy on held-out images: 0 for a trial that failed, because a net was lost.
    """

    rate: float
    accuracy: float
    finished: int
    nets: int

    @property
    def failed(self) -> bool:
        """True if one of its nets diverged or did not finish."""
        return self.finished < self.nets

    @property
    def text(self) -> str:
        """Its accuracy, or how many of its nets are finished."""
        if self.failed:
            return f"none ({self.finished} of {self.nets} finished)"
        return f"{self.accuracy:.2%}"


def trials(runs: Sequence[Run]) -> dict[str, list[Trial]]:
    """The trials of a tuning by norm, by ascending learning rate. Norms may be tuned apart."""
    trials_of: dict[str, list[Trial]] = {}
    for run in runs:
        config = run.info.config
        for norm in config.norms:
            nets = run.summaries.get(norm, {}).values()
            ends = [net.validation for net in nets if net.validation is not None]
            mean = sum(ends) / len(ends) if len(ends) == config.seeds else 0.0
            trial = Trial(config.unscaled_rate(norm), mean, len(ends), config.seeds)
            trials_of.setdefault(norm, []).append(trial)
    return {norm: sorted(of_norm) for norm, of_norm in trials_of.items()}


def tuning(runs: Sequence[Run]) -> Table:
    """Returns the best trial of each norm: a row for each."""
    config, rows, trials_of = runs[0].info.config, [], trials(runs)
    count = max(map(len, trials_of.values()))
    for norm, of_norm in trials_of.items():
        best = max(of_norm, key=lambda trial: trial.accuracy)
        edge = " (the lowest)" * (best == of_norm[0]) + " (the highest)" * (best == of_norm[-1])
        half = stats.expected_best([trial.accuracy for trial in of_norm], max(1, count // 2))
        rate = "none" if best.failed else f"{best.rate:g}{edge}"
        near = sum(round(best.accuracy - t.accuracy, 9) <= 0.01 for t in of_norm if not t.failed)
        failed = sum(trial.failed for trial in of_norm)
        shares = [f"{part} of {len(of_norm)}" for part in (near, failed)]
        rows.append([norm, rate, best.text, f"{half:.2%}", *shares])
    half = f"expected best of {max(1, count // 2)}"
    note = (
        f"Accuracy on {config.validation:,} held-out training images after "
        f"{counted(config.epochs, 'epoch')}, {counted(count, 'trial')} of each norm from seed "
        f"{config.seed} on, n = {config.seeds} each; {config.arch} nets, "
        f"{runs[0].data}. An optimum that is the lowest "
        "or the highest learning rate lies on the edge: a wider range may hold a better one. "
        "Within 1 point: the learning rates that end no more than that below the best. A trial "
        "fails if a net of it diverges or does not finish, and counts as an accuracy of 0. "
        "Test accuracy is recorded too and decides nothing."
    )
    if config.linear_scaling:
        scale = f"batch / {config.usual_batch}"
        note += f" Learning rates are those before they are multiplied by {scale}."
    head = ["norm", "best learning rate", "accuracy", half, "within 1 point", "failed"]
    return Table("The tuning", head, rows, note)


def every_trial(runs: Sequence[Run]) -> Table:
    """Returns the accuracy of each trial on held-out images: a row for each learning rate, or for
    each norm if these are more than `WIDEST`.
    """
    trials_of = trials(runs)
    rates = [f"{trial.rate:g}" for trial in next(iter(trials_of.values()))]
    by_norm = [[norm, *(trial.text for trial in of_norm)] for norm, of_norm in trials_of.items()]
    if len(trials_of) > WIDEST:
        return Table("Every trial", ["norm, learning rate", *rates], by_norm)
    head, *rows = zip(["learning rate", *rates], *by_norm, strict=True)
    return Table("Every trial", list(head), [list(row) for row in rows])


def plot_rates(axes: Axes, runs: Sequence[Run]) -> None:
    """Plots the accuracy of each trial of a tuning on held-out images against its learning rate; a
    failed trial leaves a gap.
    """
    look_of = _looks(runs)
    for norm, of_norm in trials(runs).items():
        accuracies = [math.nan if trial.failed else trial.accuracy for trial in of_norm]
        axes.plot([trial.rate for trial in of_norm], accuracies, **look_of[norm].keywords)
    axes.set_xscale("log")
    percent_axes(axes, "learning rate", _held_out(runs))


def _held_out(runs: Sequence[Run]) -> str:
    return f"accuracy on {runs[0].info.config.validation:,} held-out images"


def draw_tuning(runs: Sequence[Run]) -> Named:
    """Draws accuracy on held-out images by learning rate, and the best of k trials against k. If
    some trial ends far below the best, the highest accuracies have a panel of their own beside.
    """
    ends = [trial.accuracy for each in trials(runs).values() for trial in each if not trial.failed]
    far = bool(ends) and max(ends) - min(ends) > FAR
    figure = new_figure(caption(runs), "Accuracy against learning rate", 13 if far else 8, 4.6)
    *others, last = figure.subplots(1, 1 + far, squeeze=False)[0]
    plot_rates(last, runs)
    for axes in others:
        plot_rates(axes, runs)
        axes.get_legend().remove()
        last.set(ylim=(max(ends) - NEAR, max(ends) + NEAR / 20), title="the highest of them")
    yield "learning-rate", figure
    figure = new_figure(caption(runs), "What so many trials can expect to find", 8, 4.6)
    axes, look_of = figure.subplots(), _looks(runs)
    for norm, of_norm in trials(runs).items():
        values = [trial.accuracy for trial in of_norm]
        counts = range(1, len(values) + 1)
        best = [stats.expected_best(values, k) for k in counts]
        axes.plot(counts, best, **look_of[norm].keywords)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    percent_axes(axes, "trials", f"expected best {_held_out(runs)}")
    yield "best-of-k", figure


def write(folder: RunDirectory, name: str, tables: Sequence[Table], figures: Named) -> str:
    """Writes the tables and figures of a sweep into its folder; returns the text of the tables."""
    folder.write_bytes(f"{name}.md", "\n".join(table.markdown() for table in tables).encode())
    with plain():
        for stem, figure in figures:
            folder.write_bytes(f"{stem}.png", png(figure))
    return "\n\n".join(table.plain() for table in tables)
