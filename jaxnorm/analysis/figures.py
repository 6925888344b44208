"""Figures made from a run directory alone, all by one function, `draw`.

A new figure is one more function of `Run` that returns (name, Figure) pairs, named in `FIGURES`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxnorm.analysis import inside, stats
from jaxnorm.analysis.drawing import (
    TOGETHER,
    Look,
    Named,
    label_of,
    legend,
    literal,
    looks,
    new_figure,
    plain,
    png,
    spread,
)
from jaxnorm.analysis.results import SAMPLE, Run
from jaxnorm.config import NetId, UserError, named


class Chart(NamedTuple):
    """A figure as it is written: its name, the words in it, and a PNG."""

    name: str
    title: str
    text: str
    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"<Chart {self.name}: {self.text}>"


def draw(run: Run) -> tuple[list[Chart], list[str]]:
    """Draws every figure that the records allow.

    Returns the figures, and a line for each record that is missing or damaged.
    """
    charts: list[Chart] = []
    missing: list[str] = []
    try:
        if not run.finished:
            return [], [f"{run.directory.path} holds no finished net"]
        missing += run.unmeasured
    except UserError as error:
        return [], [str(error)]
    for figure_of in FIGURES:
        try:
            charts += _charts(figure_of, run)
        except (UserError, OSError) as error:
            if str(error) not in missing:
                missing.append(str(error))
    return charts, missing


def charts(run: Run) -> Iterator[Chart]:
    """Yields every figure that the records allow, small, each drawn when it is asked for; none if
    no net is finished.
    """
    for figure_of in FIGURES if run.finished else ():
        with contextlib.suppress(UserError, OSError):
            yield from _charts(figure_of, run, small=True)


def _charts(figure_of: Callable[[Run], Named], run: Run, small: bool = False) -> list[Chart]:
    with plain():
        return [
            _chart(name, figure, png(figure, 80) if small else png(figure))
            for name, figure in figure_of(run)
        ]


def _chart(name: str, figure: Figure, content: bytes) -> Chart:
    title, panels = figure.get_suptitle(), [axes.get_title() for axes in figure.axes]
    words = filter(None, [title, *panels, str(figure.get_label())])
    text = "; ".join(words).replace("\n", ", ").replace(r"\$", "$")
    return Chart(name, title.replace(r"\$", "$"), text, content)


def _looks(run: Run) -> dict[str, Look]:
    return looks(run.info.config.norms)


def _seeds_note(run: Run, norms: Sequence[str], text: str) -> str:
    counts = sorted({len(run.seeds(norm)) for norm in norms})
    return text.format("/".join(map(str, counts))) if counts[-1] > 1 else ""


def _line(axes: Axes, run: Run, field: str, norm: str, what: str = "") -> None:
    """Plots the mean over a norm's seeds by epoch, and a band from the lowest to the highest seed.
    For "train", beside "test", the line is broken, its markers are empty, and it has no band.
    """
    look, second = _looks(run)[norm], what == "train"
    values: dict[int, list[float]] = {}
    for seed in run.seeds(norm):
        for epoch in run.epochs[NetId(norm, seed)]:
            values.setdefault(epoch.epoch, []).append(getattr(epoch, field))
    numbers = sorted(values)
    means = [np.mean(values[number]) for number in numbers]
    keywords = {**look.keywords, "label": ", ".join(filter(None, (look.label, what)))}
    keywords |= {"markersize": 4, "linestyle": look.second if second else look.line}
    axes.plot(numbers, means, markerfacecolor="white" if second else look.colour, **keywords)
    if not second and len(run.seeds(norm)) > 1:
        low, high = ([f(values[number]) for number in numbers] for f in (min, max))
        axes.fill_between(numbers, low, high, color=look.colour, alpha=0.2, linewidth=0)


def _by_epoch(axes: Axes, what: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if "accuracy" in what:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)


def curves(run: Run) -> Named:
    """Draws the study's four curves of each norm: train loss of every batch, train accuracy, test
    loss, test accuracy.
    """
    for norm in run.norms:
        title = f"{named(norm)}: {run.info.parameters[norm]:,} parameters"
        note = _seeds_note(run, [norm], "; mean and range of {} seeds")
        figure = new_figure(run.caption, title + note, 9, 6.4)
        panels = figure.subplots(2, 2).ravel()
        _step_losses(panels[0], run, norm)
        fields = ("train_accuracy", "test_loss", "test_accuracy")
        for axes, field in zip(panels[1:], fields, strict=True):
            _line(axes, run, field, norm)
            _by_epoch(axes, field.replace("_", " "))
        yield f"curves-{norm}", figure


def _step_losses(axes: Axes, run: Run, norm: str) -> None:
    """Plots the loss of every batch of the first seed, and the moving mean of each seed."""
    colour, label = _looks(run)[norm].colour, ""
    for seed in run.seeds(norm):
        losses = run.step_losses(norm, seed)
        steps = len(losses)
        window, first = max(1, len(losses) // 200), not label
        if first:
            look = {"alpha": 0.3, "linewidth": 0.5, "color": colour, "label": "each batch"}
            axes.plot(np.arange(1, steps + 1), losses, **look)
            label = f"mean of {window}"
        means = np.convolve(losses, np.ones(window) / window, "valid")
        line, alpha = np.arange(window, steps + 1), 1 if first else 0.5
        axes.plot(line, means, color=colour, alpha=alpha, label=label if first else None)
    axes.set(xlabel="batch", ylabel="train loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def together(run: Run) -> Named:
    """Draws all norms on one loss graph and one accuracy graph; many on two panels of each."""
    many = len(run.norms) > TOGETHER
    for what in ("loss", "accuracy"):
        note = _seeds_note(run, run.norms, "; mean and range of {} seeds")
        title = f"{what.capitalize()} of every norm{note}"
        figure = new_figure(run.caption, title, *((7, 8) if many else (8, 5)))
        panels = figure.subplots(1 + many, sharex=True, sharey=True, squeeze=False)[:, 0]
        for norm in run.norms:
            for place, when in enumerate(("test", "train")):
                _line(panels[place * many], run, f"{when}_{what}", norm, "" if many else when)
        for axes, when in zip(panels, ("test", "train"), strict=False):
            _by_epoch(axes, f"{when} {what}" if many else what)
            axes.label_outer()
        legend(panels[0], ncols=2)
        yield what, figure


def seeds(run: Run) -> Named:
    """Draws the last test accuracy of every seed under every norm, the seeds joined into pairs, and
    the paired differences with their intervals. Nothing if there is one seed.
    """
    norms: list[str] = [norm for norm in run.summaries if run.sample(norm).n > 1]
    if not norms:
        return
    differences = [pair for pair in stats.selected(run.differences) if pair.sample.n > 1]
    title = "What the seeds say: test accuracy after the last epoch"
    figure = new_figure(run.caption, title, 9, max(4.2, 0.25 * len(differences)))
    widths = (1, 1.2) if differences else (1,)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    left = panels[0]
    for seed in run.info.config.seed_numbers:
        pairs = [(i, run.summaries[norm].get(seed)) for i, norm in enumerate(norms)]
        points = [(i, net.last) for i, net in pairs if net]
        left.plot(*zip(*points, strict=True), color="#999999", linewidth=0.8) if points else None
    for i, norm in enumerate(norms):
        sample, look = run.sample(norm), _looks(run)[norm]
        style = {"color": look.colour, "marker": look.marker}
        left.plot([i] * sample.n, sample.values, linestyle="", markersize=5, **style)
        low, high = sample.interval or (sample.mean, sample.mean)
        error_bars = [[sample.mean - low], [high - sample.mean]]
        left.errorbar(i + 0.18, sample.mean, error_bars, capsize=4, **style)
    tilted = {"rotation": 90} if len(norms) > 4 else {}
    left.set_xticks(range(len(norms)), norms, **tilted)
    left.set_xlim(-0.4, len(norms) - 0.4)
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    left.set_title("each seed; mean and 95 % t interval", fontsize=9)
    left.grid(alpha=0.3, axis="y")
    if differences:
        _paired(panels[1], differences)
    yield "seeds", figure


def _paired(axes: Axes, differences: Sequence[stats.Difference]) -> None:
    """Plots paired differences in points: each pair, the mean, and both intervals."""
    for i, pair in enumerate(differences):
        points, middle = 100 * np.array(pair.sample.values), 100 * pair.sample.mean
        axes.plot(points, [i] * len(points), "o", color="#999999", markersize=4)
        for offset, interval, colour, label in (
            (-0.15, pair.sample.interval, "#000000", "t interval"),
            (0.15, pair.sample.bootstrap_interval, "#0072B2", "bootstrap"),
        ):
            low, high = (100 * edge for edge in interval or (0, 0))
            look = {"fmt": "D", "color": colour, "markersize": 5, "capsize": 4}
            error_bars, label = [[middle - low], [high - middle]], None if i else label
            axes.errorbar(middle, i + offset, xerr=error_bars, label=label, **look)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(
        range(len(differences)), [f"{pair.first} - {pair.second}" for pair in differences]
    )
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_xlabel("paired difference, points")
    axes.set_title("each pair; mean and 95 % intervals", fontsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)


def mistakes(run: Run) -> Named:
    """Draws misclassified test images, 5x2: the true class, the predicted one, its probability."""
    rules = {
        "confident": "the mistakes it is surest of",
        "drawn": "mistakes drawn by the seed",
        "common": "wrong under every norm, surest first",
    }
    for name, rows in run.mistakes.items():
        _, rule, *one = name.split("-", 2)
        norms = one or list(run.logits)
        title = rules[rule] if len(rows) else "no mistake to show"
        title = f"{named(norms[0])}: {title}" if one else title
        shown = {run.shown_seed(norm) for norm in norms} - {run.info.config.seed}
        title += f" (seed {'/'.join(map(str, sorted(shown)))})" if shown else ""
        words = []
        for row in rows:
            lines = [f"true: {run.class_names[int(run.labels[row])]}"]
            for norm in norms:
                probability = stats.probabilities(run.logits[norm][row])
                guess = f"{run.class_names[int(probability.argmax())]} {probability.max():.0%}"
                lines.append(f"{'predicted' if one else norm}: {guess}")
            words.append(literal("\n".join(lines)))
        yield name, _gallery(run.caption, title, run.images(rows), words)


def _gallery(
    caption: str, title: str, images: Sequence[np.ndarray] | np.ndarray, words: Sequence[str]
) -> Figure:
    """Draws images, five in a row, with words above each. All share one `Axes`: one for each would
    take half as long again.
    """
    lines = max((text.count("\n") + 1 for text in words), default=1)
    rows, row_height = max(1, -(-len(images) // 5)), 1 + 0.1 * lines
    figure = new_figure(caption, title, 9, 0.7 + 1.8 * rows * row_height)
    figure.set_label("; ".join(words))
    axes = figure.subplots()
    for number, (image, text) in enumerate(zip(images, words, strict=True)):
        left, bottom = number % 5, (number // 5 + 1) * row_height
        extent = (left + 0.04, left + 0.96, bottom - 0.04, bottom - 0.96)
        axes.imshow(image, interpolation="nearest", extent=extent)
        axes.text(left + 0.5, bottom - 0.99, text, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(0, 5), ylim=(rows * row_height, 0))
    axes.set_axis_off()
    return figure


def confusion(run: Run) -> Named:
    """Draws the confusion matrix of each norm, in counts (the mean of its seeds), and the accuracy
    of each class, all norms together, with the range of the seeds.
    """
    names = [label_of(name) for name in run.shown_classes]
    for norm in run.norms:
        matrix, mean = run.confusion(norm), _seeds_note(run, [norm], ", mean of {} seeds")
        title = f"{named(norm)}: confusion matrix of {len(run.labels):,} test images{mean}"
        figure = new_figure(run.caption, title, 7.4, 7)
        axes = figure.subplots()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 20:
            for (row, column), count in np.ndenumerate(matrix):
                colour = "white" if shares[row, column] > 0.5 else "black"
                look = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
                axes.text(column, row, f"{count:.0f}", **look)
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted class", ylabel="true class")
        yield f"confusion-{norm}", figure
    height = min(400, 1.6 + max(0.36, 0.07 * len(run.norms)) * len(names))  # what a PNG can hold
    figure = new_figure(run.caption, "Test accuracy of each class", 8, height)
    axes = figure.subplots()
    for norm, offset in zip(run.norms, spread(len(run.norms), 0.2), strict=True):
        heights, look = np.arange(len(names)) + offset, _looks(run)[norm]
        accuracies = run.class_accuracies(norm)
        style = {**look.keywords, "linestyle": "", "markersize": 6}
        axes.plot(accuracies.mean(0), heights, **style)
        if len(accuracies) > 1:
            axes.hlines(heights, accuracies.min(0), accuracies.max(0), color=look.colour, lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    legend(axes, ncols=3)
    yield "class-accuracy", figure


def training_images(run: Run) -> Named:
    """Draws training images chosen by the seed, as they are, with their classes."""
    images, labels = (run.examples[f"train_{what}"][:SAMPLE] for what in ("images", "labels"))
    if not np.isin(labels, np.arange(len(run.class_names))).all():
        raise UserError(f"{run.directory.path / 'examples.npz'}: a label is none of the classes")
    names = [label_of(run.class_names[int(label)]) for label in labels]
    title = f"{len(images)} training images"
    yield "training-images", _gallery(run.caption, title, images, names)


FIGURES: tuple[Callable[[Run], Named], ...] = (
    seeds,
    together,
    curves,
    mistakes,
    confusion,
    inside.inside,
    inside.depth,
    inside.corruptions,
    training_images,
)
