"""Pictures from a run directory: every figure the study showed, for every norm, and the norms
together.

`save_examples` keeps, right after training, the few images that the pictures need, so that `draw`
needs the directory alone. Every figure names its data. Colours are Okabe and Ito's, told apart by
the colour-blind, and every line has its own dash or marker too.

A new figure is one more function of `Run` that returns (file name, Figure) pairs, named in
`FIGURES`.
"""

import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxnorm.analysis import stats
from jaxnorm.analysis.results import Run
from jaxnorm.config import UserError
from jaxnorm.data.datasets import Dataset

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FIRST = ("batch", "group", "layer", "instance", "rms", "none")
SAMPLE = 20
"""Training images shown."""


Named = Iterator[tuple[str, Figure]]


class _ByNorm(dict):
    """A style for each norm: the study's own first, others in the order in which they are met."""

    def __init__(self, styles: Sequence[str]) -> None:
        self._styles = itertools.cycle(styles)
        super().__init__((norm, next(self._styles)) for norm in _FIRST)

    def __missing__(self, norm: str) -> str:
        return self.setdefault(norm, next(self._styles))


COLOURS, MARKERS = _ByNorm(_PALETTE), _ByNorm("os^Dv*X")


def save_examples(run: Run, dataset: Dataset) -> None:
    """Keeps the images that `draw` shows: test images by their row, and a sample of the training
    images drawn by the seed.
    """
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *run.rows().values()]))
    count = min(SAMPLE, len(dataset.train_labels))
    sample = np.sort(
        np.random.default_rng(run.info.config.seed).choice(
            len(dataset.train_labels), count, replace=False
        )
    )
    arrays = {
        "test_rows": rows,
        "test_images": dataset.test_images[rows],
        "train_rows": sample,
        "train_images": dataset.train_images[sample],
        "train_labels": dataset.train_labels[sample],
    }
    run.directory.write_arrays("examples.npz", arrays)


def draw(run: Run) -> tuple[dict[str, str], list[str]]:
    """Draws every figure that the records allow into `figures/`.

    Returns the figures' titles by file name, and a line for each record that was missing or
    damaged.
    """
    titles, missing = {}, []
    try:
        if not run.epochs:
            return {}, [f"{run.directory.path / 'metrics.jsonl'} holds no epoch"]
    except UserError as error:
        return {}, [str(error)]
    for figure_of in FIGURES:
        try:
            for name, figure in figure_of(run):
                run.directory.write_bytes(f"figures/{name}.png", png(figure))
                titles[f"{name}.png"] = title_of(figure)
        except UserError as error:
            if str(error) not in missing:
                missing.append(str(error))
    return titles, missing


def png(figure: Figure, dots_per_inch: int = 130) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph", UserWarning
        )  # drawn as a box: names may hold any
        figure.savefig(content, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return content.getvalue()


def title_of(figure: Figure) -> str:
    """What stands over a figure."""
    return figure.get_suptitle().replace(r"\$", "$")


def _figure(run: Run, title: str, width: float, height: float) -> Figure:
    return _captioned(run.caption, title, width, height)


def _captioned(caption: str, title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_literal(title), fontsize=13)
    figure.supxlabel(_literal(caption), fontsize=8, color="#444444")
    return figure


def _literal(text: str) -> str:
    """Text in which Matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _label(name: str) -> str:
    """A class's name beside an axis, cut where it would leave the axis no room."""
    return _literal(name if len(name) <= 24 else name[:23] + "\N{HORIZONTAL ELLIPSIS}")


def _line(
    axes: Axes, run: Run, field: str, norm: str, label: str, style: str = "-", band: bool = True
) -> None:
    """The mean over a norm's seeds by epoch, and a band from the lowest to the highest seed."""
    values: dict[int, list[float]] = {}
    for seed in run.seeds(norm):
        for epoch in run.epochs[norm, seed]:
            values.setdefault(epoch.epoch, []).append(getattr(epoch, field))
    numbers = sorted(values)
    axes.plot(
        numbers,
        [np.mean(values[number]) for number in numbers],
        style,
        color=COLOURS[norm],
        marker=MARKERS[norm],
        markersize=4,
        markerfacecolor=COLOURS[norm] if style == "-" else "white",
        label=label,
    )
    if band and len(run.seeds(norm)) > 1:
        low, high = ([f(values[number]) for number in numbers] for f in (min, max))
        axes.fill_between(numbers, low, high, color=COLOURS[norm], alpha=0.2, linewidth=0)


def _by_epoch(axes: Axes, what: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if "accuracy" in what:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)


def curves(run: Run) -> Named:
    """The study's four curves, for each norm: train loss of every batch, train accuracy, test loss,
    test accuracy.
    """
    for norm in run.norms:
        title = f"{norm} norm: {run.info.parameters[norm]:,} parameters"
        figure = _figure(run, title + _band_note(run, norm), 9, 6.4)
        panels = figure.subplots(2, 2).ravel()
        _step_losses(panels[0], run, norm)
        for axes, field in zip(
            panels[1:], ("train_accuracy", "test_loss", "test_accuracy"), strict=True
        ):
            _line(axes, run, field, norm, norm)
            _by_epoch(axes, field.replace("_", " "))
        yield f"curves-{norm}", figure


def _band_note(run: Run, norm: str) -> str:
    count = len(run.seeds(norm))
    return f"; mean and range of {count} seeds" if count > 1 else ""


def _step_losses(axes: Axes, run: Run, norm: str) -> None:
    """The loss of every batch of the first seed, and the moving mean of each seed."""
    for number, seed in enumerate(run.seeds(norm)):
        losses = run.directory.step_losses((norm, seed))
        window = max(1, len(losses) // 200)
        colour = COLOURS[norm]
        if number == 0:
            steps = np.arange(1, len(losses) + 1)
            axes.plot(steps, losses, alpha=0.3, linewidth=0.5, color=colour, label="each batch")
        means = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(
            np.arange(window, len(losses) + 1),
            means,
            alpha=1 if number == 0 else 0.5,
            label=None if number else f"mean of {window}",
            color=colour,
        )
    axes.set(xlabel="batch", ylabel="train loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def together(run: Run) -> Named:
    """All norms on one loss graph and one accuracy graph."""
    for what in ("loss", "accuracy"):
        title = f"{what.capitalize()} of every norm" + _band_note(run, run.norms[0])
        figure = _figure(run, title, 8, 5)
        axes = figure.subplots()
        for norm in run.norms:
            _line(axes, run, f"test_{what}", norm, f"{norm}, test")
            _line(axes, run, f"train_{what}", norm, f"{norm}, train", "--", band=False)
        _by_epoch(axes, what)
        axes.legend(fontsize=9, ncols=2)
        yield what, figure


def seeds(run: Run) -> Named:
    """The last test accuracy of every seed under every norm, the seeds joined into pairs; and the
    paired differences with their intervals. Only where there are several seeds.
    """
    norms: list[str] = [norm for norm in run.summaries if run.sample(norm).n > 1]
    if not norms:
        return
    found = [each for each in run.differences if each.sample.n > 1]
    figure = _figure(run, "What the seeds say: test accuracy after the last epoch", 9, 4.2)
    widths = (1, 1.2) if found else (1,)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    left = panels[0]
    for seed in run.info.config.seed_numbers:
        pairs = [(i, run.summaries[norm].get(seed)) for i, norm in enumerate(norms)]
        points = [(i, net.last) for i, net in pairs if net]
        left.plot(*zip(*points, strict=True), color="#999999", linewidth=0.8) if points else None
    for i, norm in enumerate(norms):
        sample = run.sample(norm)
        style = {"color": COLOURS[norm], "marker": MARKERS[norm]}
        left.plot([i] * sample.n, sample.values, linestyle="", markersize=5, **style)
        low, high = sample.interval or (sample.mean, sample.mean)
        left.errorbar(
            i + 0.18, sample.mean, [[sample.mean - low], [high - sample.mean]], capsize=4, **style
        )
    left.set_xticks(range(len(norms)), norms)
    left.set_xlim(-0.4, len(norms) - 0.4)
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    left.set_title("each seed; mean and 95 % t interval", fontsize=9)
    left.grid(alpha=0.3, axis="y")
    if found:
        _paired(panels[1], found)
    yield "seeds", figure


def mistakes(run: Run) -> Named:
    """Misclassified test images, 5x2: the true class, the predicted class and its probability."""
    for grid in run.mistakes:
        title = grid.title[0].lower() + grid.title[1:] if grid.tiles else "no mistake to show"
        title = f"{grid.norm} norm: {title}" if grid.norm else title
        lines = len(grid.tiles[0].said) if grid.tiles else 1
        figure = _figure(run, title, 9, 4.9 + 0.35 * lines)
        for axes, tile in zip(_tiles(figure, 2), grid.tiles, strict=False):
            axes.imshow(tile.image, interpolation="nearest")
            said = [f"predicted: {line}" if grid.norm else line for line in tile.said]
            axes.set_title(_literal("\n".join([f"true: {tile.true}", *said])), fontsize=9)
        yield grid.name, figure


def _tiles(figure: Figure, rows: int) -> np.ndarray:
    tiles = figure.subplots(rows, 5).ravel()
    for axes in tiles:
        axes.set(xticks=[], yticks=[])  # laying out ticks that nobody sees takes half of the time
        axes.set_axis_off()
    return tiles


def _paired(axes: Axes, found: Sequence[stats.Difference]) -> None:
    """Paired differences in points: each pair, the mean, and both intervals."""
    for i, each in enumerate(found):
        points = 100 * np.array(each.sample.values)
        axes.plot(points, [i] * len(points), "o", color="#999999", markersize=4)
        for offset, interval, colour in (
            (-0.15, each.sample.interval, "#000000"),
            (0.15, each.sample.bootstrap_interval, "#0072B2"),
        ):
            low, high = (100 * edge for edge in interval or (0, 0))
            middle = 100 * each.sample.mean
            axes.errorbar(
                middle,
                i + offset,
                xerr=[[middle - low], [high - middle]],
                fmt="D",
                color=colour,
                markersize=5,
                capsize=4,
                label=("t interval", "bootstrap")[offset > 0] if i == 0 else None,
            )
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{each.first} - {each.second}" for each in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("paired difference, points")
    axes.set_title("each pair; mean and 95 % intervals", fontsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)


def confusion(run: Run) -> Named:
    """The confusion matrix of each norm, in counts (the mean of its seeds); and the accuracy of
    each class, all norms together, with the range of the seeds.
    """
    names = [_label(name) for name in run.class_names]
    numbered = len(names) <= 20
    for norm in run.norms:
        matrix = run.confusion(norm)
        count = len(run.seeds(norm))
        mean = f", mean of {count} seeds" if count > 1 else ""
        title = f"{norm} norm: confusion matrix of {len(run.labels):,} test images{mean}"
        figure = _figure(run, title, 7.4, 7)
        axes = figure.subplots()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if numbered:
            for (row, column), each in np.ndenumerate(matrix):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, f"{each:.0f}", ha="center", va="center", fontsize=8, color=colour
                )
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted class", ylabel="true class")
        yield f"confusion-{norm}", figure
    figure = _figure(run, "Test accuracy of each class", 8, 1.6 + 0.36 * len(names))
    axes = figure.subplots()
    for number, norm in enumerate(run.norms):
        heights = np.arange(len(names)) + (number - (len(run.norms) - 1) / 2) * 0.2
        accuracies = run.class_accuracies(norm)
        middle = accuracies.mean(0)
        axes.plot(middle, heights, MARKERS[norm], color=COLOURS[norm], label=norm, markersize=6)
        if len(accuracies) > 1:
            axes.hlines(heights, accuracies.min(0), accuracies.max(0), color=COLOURS[norm], lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=9)
    yield "class-accuracy", figure


def training_images(run: Run) -> Named:
    """Training images drawn by the seed, as they are, with their classes."""
    images, labels = run.examples["train_images"], run.examples["train_labels"]
    figure = _figure(run, f"{len(images)} training images", 9, 8)
    for axes, image, label in zip(_tiles(figure, SAMPLE // 5), images, labels, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(_label(run.class_names[int(label)]), fontsize=9)
    yield "training-images", figure


def inside(run: Run) -> Named:
    """What the norms do inside the trained nets of the first seed."""
    seed = run.info.config.seed
    caption = f"{run.info.dataset.caption}; seed {seed}, after the last epoch"
    return of_probes(run.probes, caption)


def of_probes(probes: Mapping[str, Mapping[str, np.ndarray]], caption: str) -> Named:
    """What `probes.measure` gave of each norm: activations before and after each norm, the
    gradient of each layer, and batch norm's gap between training and evaluation.
    """
    figure = _captioned(caption, "Activations before and after each norm", 9, 5.2)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for norm, measured in probes.items():
        for column, when in enumerate(("before", "after")):
            for row in range(2):
                layers = list(map(str, measured["layers"]))
                values = measured[when][:, row]
                _marked(panels[row, column], layers, values, norm)
    for column, when in enumerate(("before", "after")):
        panels[0, column].set_title(f"{when} the norm", fontsize=10)
        for row in range(2):
            panels[row, column].grid(alpha=0.3)
    panels[0, 0].set_ylabel("mean")
    panels[1, 0].set_ylabel("standard deviation")
    panels[0, 0].legend(fontsize=8)
    yield "activations", figure
    figure = _captioned(caption, "Size of the loss's gradient at each kernel", 8, 4.2)
    axes = figure.subplots()
    for norm, measured in probes.items():
        _marked(axes, list(map(str, measured["kernels"])), measured["gradients"], norm)
    axes.set_yscale("log")
    axes.set(xlabel="layer, input to output", ylabel="Euclidean norm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    yield "gradients", figure
    title = "Evaluated with each batch's own statistics, not running averages"
    figure = _captioned(caption, title, 8, 4.2)
    axes = figure.subplots()
    for norm, measured in probes.items():
        sizes = list(map(str, measured["sizes"]))
        _marked(axes, sizes, measured["batch_accuracy"], norm)
        if norm == "batch":
            label = "batch, running averages"
            height = float(measured["running_accuracy"])
            axes.axhline(height, color=COLOURS[norm], linestyle=":", label=label)
    tested = max(int(measured["tested"]) for measured in probes.values())
    axes.set(xlabel="images in a batch", ylabel=f"accuracy on {tested:,} test images")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    yield "batch-statistics", figure


def _marked(axes: Axes, names: Sequence[str], values: np.ndarray, norm: str) -> None:
    axes.plot(names, values, color=COLOURS[norm], marker=MARKERS[norm], markersize=5, label=norm)


def batch_sizes(
    accuracies: Mapping[str, Mapping[int, Sequence[float]]], caption: str
) -> tuple[str, Figure]:
    """The last test accuracy of each norm by the batch size that it was trained with: {norm: {batch
    size: a value for each seed}}.
    """
    figure = _captioned(caption, "Test accuracy by the batch size of training", 8, 4.6)
    axes = figure.subplots()
    sizes = sorted({size for own in accuracies.values() for size in own})
    for norm, by_size in accuracies.items():
        own = [(i, by_size[size]) for i, size in enumerate(sizes) if size in by_size]
        places = [i for i, _ in own]
        means = [float(np.mean(values)) for _, values in own]
        axes.plot(places, means, color=COLOURS[norm], marker=MARKERS[norm], label=norm)
        low, high = ([f(values) for _, values in own] for f in (min, max))
        axes.fill_between(places, low, high, color=COLOURS[norm], alpha=0.2, linewidth=0)
    axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
    axes.set(xlabel="images in a batch", ylabel="test accuracy after the last epoch")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return "batch-sizes", figure


def averaged(masks: Mapping[str, np.ndarray]) -> tuple[str, Figure]:
    """What one output of each norm depends on (`probes.averaged_over`): a square for each image
    (row) and channel (column), dark where the norm averages over pixels of it.
    """
    caption = "dark: averaged over with the output marked by a cross"
    figure = _captioned(caption, "What each norm averages over", 2 * len(masks) + 1, 2.6)
    panels = figure.subplots(1, len(masks), squeeze=False)[0]
    for axes, (norm, mask) in zip(panels, masks.items(), strict=True):
        count, height, width, channels = mask.shape
        # Images stand above each other, and the pixels of each channel side by side.
        picture = mask.transpose(0, 1, 3, 2).reshape(count * height, channels * width)
        axes.imshow(picture, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        for edge in range(1, count):
            axes.axhline(edge * height - 0.5, color="#666666", linewidth=1)
        for edge in range(1, channels):
            axes.axvline(edge * width - 0.5, color="#666666", linewidth=0.5)
        axes.set_title(f"{norm} norm", fontsize=10)
        axes.set(xlabel="channels", ylabel="images", xticks=[], yticks=[])
    return "averaged", figure


def example_gradients(matrices: Mapping[str, np.ndarray], caption: str) -> tuple[str, Figure]:
    """How much each image's loss depends on each image's pixels (`probes.example_gradients`), as
    shares of the largest.
    """
    title = "How much an image's loss depends on each image of its batch"
    figure = _captioned(caption, title, 3.4 * len(matrices) + 1, 4)
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (norm, matrix) in zip(panels, matrices.items(), strict=True):
        shown = axes.imshow(matrix / matrix.max(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"{norm} norm", fontsize=10)
        axes.set(xlabel="pixels of image", ylabel="loss of image")
    figure.colorbar(shown, ax=list(panels), shrink=0.8, label="share of the largest")
    return "example-gradients", figure


FIGURES: tuple[Callable[[Run], Named], ...] = (
    seeds,
    together,
    curves,
    mistakes,
    confusion,
    inside,
    training_images,
)
