"""What several runs say together: the table of a sweep, and what a tuning found."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxnorm.analysis import stats
from jaxnorm.analysis.drawing import COLOURS, Named, look_of, new_figure, percent_axes, png
from jaxnorm.analysis.figures import save_examples
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.tables import MEAN, Table
from jaxnorm.config import counted, differing, value_text
from jaxnorm.data.datasets import Dataset
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep


def runs_of(sweep: Sweep, dataset: Dataset) -> list[Run]:
    """The runs of a trained sweep, each with the images kept that its figures show."""
    runs = [Run(directory) for directory in sweep.directories]
    for run in runs:
        if run.epochs:  # else the loss of every net of it was not finite
            save_examples(run, dataset)
    return runs


def results(runs: Sequence[Run]) -> Table:
    """The last test accuracy of every norm in every run of a sweep: a row a run."""
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
                lost = " Of nets that are not counted the loss was not finite."
        settings = [value_text(getattr(config, name)) for name in others]
        rows.append([str(config.batch_size), config.rate_text, *settings, *cells])
    note = (
        f"Last test accuracy after {counted(first.epochs, 'epoch')}, n = {first.seeds} each"
        f"{MEAN if first.seeds > 1 else ''}; {first.arch} nets, {runs[0].info.dataset.caption}."
    )
    if first.linear_scaling:
        note += f" The learning rate is multiplied by batch / {first.usual_batch}."
    head = ["batch", "learning rate", *(name.replace("_", " ") for name in others), *first.norms]
    return Table("The sweep", head, rows, note + lost)


def plot_against(axes: Axes, runs: Sequence[Run], setting: str) -> None:
    """The last test accuracy of every norm against a setting of a sweep: the mean and each seed."""
    ordered = sorted((float(getattr(run.info.config, setting)), i) for i, run in enumerate(runs))
    for norm in runs[0].info.config.norms:
        ends = [(x, runs[i].sample(norm)) for x, i in ordered if norm in runs[i].summaries]
        if not ends:
            continue
        axes.plot([x for x, _ in ends], [sample.mean for _, sample in ends], **look_of(norm))
        seeds = [(x, accuracy) for x, sample in ends for accuracy in sample.values]
        axes.plot(*zip(*seeds, strict=True), ".", color=COLOURS[norm], alpha=0.5)
    axes.set_xscale("log" if ordered[0][0] > 0 else "linear")
    axes.set_xticks([x for x, _ in ordered], [f"{x:g}" for x, _ in ordered])
    axes.minorticks_off()
    percent_axes(axes, setting.replace("_", " "), "last test accuracy", decimals=1)


def draw(runs: Sequence[Run]) -> Named:
    """Accuracy against what differs between the runs of a sweep, where that is one number."""
    differ = differing([run.info.config for run in runs])
    if len(differ) == 1 and any(run.summaries for run in runs):
        title = f"Accuracy against {differ[0].replace('_', ' ')}"
        figure = new_figure(runs[0].caption, title, 8, 4.6)
        plot_against(figure.subplots(), runs, differ[0])
        yield differ[0].replace("_", "-"), figure


def trials(runs: Sequence[Run]) -> dict[str, list[tuple[float, float]]]:
    """The learning rate of each trial of a tuning, ascending and before linear scaling, and the
    mean accuracy on held-out images at its end, by norm; 0 where no net's loss stayed finite. Norms
    may be tuned apart.
    """
    trials_of: dict[str, list[tuple[float, float]]] = {}
    for run in sorted(runs, key=lambda run: run.info.config.unscaled_rate("")):
        for norm in run.info.config.norms:
            nets = run.summaries.get(norm, {}).values()
            ends = [net.validation for net in nets if net.validation is not None]
            trial = (run.info.config.unscaled_rate(norm), sum(ends) / len(ends) if ends else 0.0)
            trials_of.setdefault(norm, []).append(trial)
    return trials_of


def tuning(runs: Sequence[Run]) -> Table:
    """What each norm won with: a row a norm."""
    config, rows, trials_of = runs[0].info.config, [], trials(runs)
    count = max(map(len, trials_of.values()))
    for norm, pairs in trials_of.items():
        rates = [rate for rate, _ in pairs]
        best = max(pairs, key=lambda trial: trial[1])[0]
        accuracies = [accuracy for _, accuracy in pairs]
        edge = " (the lowest)" * (best == rates[0]) + " (the highest)" * (best == rates[-1])
        half = stats.expected_best(accuracies, max(1, count // 2))
        failed = sum(accuracy == 0 for accuracy in accuracies)
        cells = [f"{best:g}{edge}", f"{max(accuracies):.2%}", f"{half:.2%}", str(failed)]
        rows.append([norm, *cells])
    half = f"expected best of {max(1, count // 2)}"
    note = (
        f"Accuracy on {config.validation:,} held-out training images after "
        f"{counted(config.epochs, 'epoch')}, {counted(count, 'trial')} of each norm from seed "
        f"{config.seed} on, n = {config.seeds} each; {config.arch} nets, "
        f"{runs[0].info.dataset.caption}. An optimum that is the lowest "
        "or the highest learning rate lies on the edge: a wider range may hold a better one. Test "
        "accuracy is recorded too and decides nothing."
    )
    return Table(
        "The tuning", ["norm", "best learning rate", "accuracy", half, "failed"], rows, note
    )


def every_trial(runs: Sequence[Run]) -> Table:
    """What each trial of a tuning ended with on held-out images: a row a learning rate."""
    trials_of = trials(runs)
    rows = [
        [f"{pairs[0][0]:g}", *(f"{accuracy:.2%}" if accuracy else "none" for _, accuracy in pairs)]
        for pairs in zip(*trials_of.values(), strict=True)
    ]
    return Table("Every trial", ["learning rate", *trials_of], rows)


def plot_rates(axes: Axes, runs: Sequence[Run]) -> None:
    """What each trial of a tuning ended with on held-out images, against its learning rate."""
    for norm, pairs in trials(runs).items():
        axes.plot(*zip(*pairs, strict=True), **look_of(norm))
    axes.set_xscale("log")
    percent_axes(axes, "learning rate", _held_out(runs))


def _held_out(runs: Sequence[Run]) -> str:
    return f"accuracy on {runs[0].info.config.validation:,} held-out images"


def draw_tuning(runs: Sequence[Run]) -> Named:
    """Accuracy on held-out images against the learning rate; and the best of k trials against k."""
    figure = new_figure(runs[0].caption, "Accuracy against learning rate", 8, 4.6)
    plot_rates(figure.subplots(), runs)
    yield "learning-rate", figure
    figure = new_figure(runs[0].caption, "What so many trials can expect to find", 8, 4.6)
    axes = figure.subplots()
    for norm, pairs in trials(runs).items():
        values = [accuracy for _, accuracy in pairs]
        counts = range(1, len(values) + 1)
        axes.plot(counts, [stats.expected_best(values, k) for k in counts], **look_of(norm))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    percent_axes(axes, "trials", f"expected best {_held_out(runs)}")
    yield "best-of-k", figure


def write(folder: RunDirectory, name: str, tables: Sequence[Table], figures: Named) -> str:
    """Writes the tables and figures of a sweep into its folder; returns the text of the tables."""
    folder.write_bytes(f"{name}.md", "\n".join(table.markdown() for table in tables).encode())
    for stem, figure in figures:
        folder.write_bytes(f"{stem}.png", png(figure))
    return "\n\n".join(table.plain() for table in tables)
