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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxnorm import stats
from jaxnorm.config import Norm, UserError
from jaxnorm.data import Dataset
from jaxnorm.records import Epoch, RunDirectory, RunInfo

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOURS = dict(zip(get_args(Norm), itertools.cycle(_PALETTE), strict=False))
MARKERS = dict(zip(get_args(Norm), itertools.cycle("os^Dv*X"), strict=False))
GRID = 10
"""Images in a grid of mistakes: 5 columns, 2 rows."""
SAMPLE = 20
"""Training images shown."""


@dataclass(frozen=True)
class Run:
    """One run's records, read once."""

    directory: RunDirectory

    @cached_property
    def info(self) -> RunInfo:
        """`run.json`."""
        return self.directory.info()

    @cached_property
    def epochs(self) -> dict[str, list[Epoch]]:
        """The epochs of each norm that has any, in the order of the settings."""
        epochs = self.directory.epochs()
        found = {
            norm: [epoch for epoch in epochs if epoch.norm == norm]
            for norm in self.info.config.norms
        }
        return {norm: each for norm, each in found.items() if each}

    @cached_property
    def logits(self) -> dict[str, np.ndarray]:
        """Test logits f32[N, classes] of each norm."""
        return {
            norm: self.directory.predictions(norm, self.info.config.seed)[0] for norm in self.epochs
        }

    @cached_property
    def labels(self) -> np.ndarray:
        """Test labels i32[N]."""
        return self.directory.predictions(next(iter(self.epochs)), self.info.config.seed)[1]

    @cached_property
    def examples(self) -> dict[str, np.ndarray]:
        """What `save_examples` kept."""
        return self.directory.examples()

    @property
    def class_names(self) -> Sequence[str]:
        """The classes, by number."""
        return self.info.dataset["class_names"]

    @property
    def caption(self) -> str:
        """What stands under every figure: the data, the nets and the seed."""
        config = self.info.config
        return f"{self.info.dataset['caption']}; {config.arch} nets, seed {config.seed}"

    def rows(self) -> dict[str, np.ndarray]:
        """The test images shown, by figure name: three rules, all over the whole test set."""
        seed, chosen = self.info.config.seed, {}
        for norm, logits in self.logits.items():
            chosen[f"mistakes-confident-{norm}"] = stats.confident_mistakes(
                logits, self.labels, GRID
            )
            chosen[f"mistakes-drawn-{norm}"] = stats.drawn_mistakes(logits, self.labels, GRID, seed)
        if len(self.logits) > 1:
            chosen["mistakes-common"] = stats.common_mistakes(
                list(self.logits.values()), self.labels, GRID
            )
        return chosen


Named = Iterator[tuple[str, Figure]]


def save_examples(directory: RunDirectory, dataset: Dataset) -> None:
    """Keeps the images that `draw` shows: test images by their row, and a sample of the training
    images drawn by the seed.
    """
    run = Run(directory)
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
    directory.write_arrays("examples.npz", arrays)


def draw(directory: RunDirectory) -> tuple[list[str], list[str]]:
    """Draws every figure that the records allow into `figures/`.

    Returns the figures' file names, and a line for each record that was missing or damaged.
    """
    run, names, missing = Run(directory), [], []
    for figure_of in FIGURES:
        try:
            for name, figure in figure_of(run):
                content = io.BytesIO()
                figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
                directory.write_bytes(f"figures/{name}.png", content.getvalue())
                names.append(f"{name}.png")
        except UserError as error:
            missing.append(str(error))
    return names, missing


def _figure(run: Run, title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(run.caption, fontsize=8, color="#444444")
    return figure


def _line(
    axes: Axes, epochs: Sequence[Epoch], field: str, norm: str, label: str, style: str = "-"
) -> None:
    axes.plot(
        [epoch.epoch for epoch in epochs],
        [getattr(epoch, field) for epoch in epochs],
        style,
        color=COLOURS[norm],
        marker=MARKERS[norm],
        markersize=4,
        markerfacecolor=COLOURS[norm] if style == "-" else "white",
        label=label,
    )


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
    for norm, epochs in run.epochs.items():
        figure = _figure(run, f"{norm} norm: {run.info.parameters[norm]:,} parameters", 9, 6.4)
        panels = figure.subplots(2, 2).ravel()
        losses = run.directory.step_losses(norm, run.info.config.seed)
        window = max(1, len(losses) // 200)
        panels[0].plot(
            np.arange(1, len(losses) + 1),
            losses,
            color=COLOURS[norm],
            alpha=0.3,
            linewidth=0.5,
            label="each batch",
        )
        means = np.convolve(losses, np.ones(window) / window, "valid")
        panels[0].plot(
            np.arange(window, len(losses) + 1),
            means,
            color=COLOURS[norm],
            label=f"mean of {window}",
        )
        panels[0].set(xlabel="batch", ylabel="train loss")
        panels[0].grid(alpha=0.3)
        panels[0].legend(fontsize=8)
        for axes, field in zip(
            panels[1:], ("train_accuracy", "test_loss", "test_accuracy"), strict=True
        ):
            _line(axes, epochs, field, norm, norm)
            _by_epoch(axes, field.replace("_", " "))
        yield f"curves-{norm}", figure


def together(run: Run) -> Named:
    """All norms on one loss graph and one accuracy graph."""
    for what in ("loss", "accuracy"):
        figure = _figure(run, f"{what.capitalize()} of every norm", 8, 5)
        axes = figure.subplots()
        for norm, epochs in run.epochs.items():
            _line(axes, epochs, f"test_{what}", norm, f"{norm}, test")
            _line(axes, epochs, f"train_{what}", norm, f"{norm}, train", "--")
        _by_epoch(axes, what)
        axes.legend(fontsize=9, ncols=2)
        yield what, figure


def mistakes(run: Run) -> Named:
    """Misclassified test images, 5x2: the true class, the predicted class and its probability."""
    titles = {
        "confident": "the mistakes it is surest of",
        "drawn": "mistakes drawn by the seed",
        "common": "wrong under every norm, surest first",
    }
    images = {
        int(row): image
        for row, image in zip(run.examples["test_rows"], run.examples["test_images"], strict=True)
    }
    for name, rows in run.rows().items():
        if absent := set(map(int, rows)) - images.keys():
            raise UserError(f"{name}: {len(absent)} of its images are not in examples.npz")
        _, rule, *rest = name.split("-")
        shown = {norm: run.logits[norm] for norm in (rest or run.logits)}
        title = titles[rule] if len(rows) else "no mistake to show"
        figure = _figure(
            run, f"{rest[0]} norm: {title}" if rest else title, 9, 4.9 + 0.35 * len(shown)
        )
        for axes, row in zip(_tiles(figure, 2), rows, strict=False):
            axes.imshow(images[int(row)], interpolation="nearest")
            lines = [f"true: {run.class_names[int(run.labels[row])]}"]
            for norm, logits in shown.items():
                probability = stats.probabilities(logits[row])
                said = f"{run.class_names[int(probability.argmax())]} {probability.max():.0%}"
                lines.append(f"{norm}: {said}" if not rest else f"predicted: {said}")
            axes.set_title("\n".join(lines), fontsize=9)
        yield name, figure


def _tiles(figure: Figure, rows: int) -> np.ndarray:
    tiles = figure.subplots(rows, 5).ravel()
    for axes in tiles:
        axes.set_axis_off()
    return tiles


def confusion(run: Run) -> Named:
    """The confusion matrix of each norm, in counts; and the accuracy of each class, all norms
    together.
    """
    names = run.class_names
    numbered = len(names) <= 20
    for norm, logits in run.logits.items():
        matrix = stats.confusion_matrix(logits, run.labels)
        figure = _figure(
            run, f"{norm} norm: confusion matrix of {matrix.sum():,} test images", 7.4, 7
        )
        axes = figure.subplots()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if numbered:
            for (row, column), count in np.ndenumerate(matrix):
                axes.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[row, column] > 0.5 else "black",
                )
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted class", ylabel="true class")
        yield f"confusion-{norm}", figure
    figure = _figure(run, "Test accuracy of each class", 8, 1.6 + 0.36 * len(names))
    axes = figure.subplots()
    for number, (norm, logits) in enumerate(run.logits.items()):
        heights = np.arange(len(names)) + (number - (len(run.logits) - 1) / 2) * 0.2
        accuracies = stats.class_accuracy(logits, run.labels)
        axes.plot(accuracies, heights, MARKERS[norm], color=COLOURS[norm], label=norm, markersize=6)
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
        axes.set_title(run.class_names[label], fontsize=9)
    yield "training-images", figure


FIGURES: tuple[Callable[[Run], Named], ...] = (
    curves,
    together,
    mistakes,
    confusion,
    training_images,
)
