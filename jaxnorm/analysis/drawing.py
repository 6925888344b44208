"""The look of every figure: its caption, its colours, its axes, and the PNG that it becomes.

Every figure names its data. The study's norms have Okabe and Ito's colours, told apart by the
colour-blind, the next seven Tol's "muted" ones. Every norm has a colour of its own, and a marker
and dashes of its own too.
"""

import colorsys
import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colors, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PALETTE += ("#117733", "#882255", "#332288", "#999933", "#661100", "#777777", "#44AA99")
_MARKERS = "os^Dv*XP<>phd8H"
_FIRST = ("batch", "group", "layer", "pixel", "instance", "rms", "none")
TOGETHER = len(_FIRST)
"""The most norms of which two lines each are told apart in one panel."""
Named = Iterator[tuple[str, Figure]]


class Look(NamedTuple):
    """The look of a norm: `line` is the dashes of its line, `second` those of another line of it,
    `label` its name in a legend.
    """

    colour: str
    marker: str
    line: Any
    second: Any
    label: str

    @property
    def keywords(self) -> dict[str, Any]:
        """The norm's line, for `Axes.plot`."""
        look = {"color": self.colour, "marker": self.marker, "markersize": 5}
        return {**look, "linestyle": self.line, "label": self.label}


def looks(norms: Iterable[str]) -> dict[str, Look]:
    """The look of each norm of a run: those of the study always have the same, others the next ones
    in order. No two have the same colour, and no two the same marker and dashes.
    """
    others = dict.fromkeys(norm for norm in norms if norm not in _FIRST)
    return {norm: _look(number, norm) for number, norm in enumerate((*_FIRST, *others))}


def _look(number: int, norm: str) -> Look:
    turn, line, second = number // len(_FIRST), "-", "--"
    if number < len(_PALETTE):
        colour = _PALETTE[number]
    else:  # hues a golden ratio of the circle apart
        colour = colors.to_hex(colorsys.hsv_to_rgb(0.618034 * number % 1, 0.9, 0.6))
    if turn:  # a dash and as many dots as turns
        line, second = ((0, (length, 1.5) + turn * (1, 1.5)) for length in (7, 3))
    return Look(colour, _MARKERS[number % len(_MARKERS)], line, second, legible(norm))


def legible(label: str) -> str:
    """Returns a label that a legend shows: Matplotlib leaves out those that begin with "_"."""
    return f" {label}" if label.startswith("_") else label


def plain() -> contextlib.AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever the user's matplotlibrc says: it may ask for LaTeX."""
    return style.context("default")


def new_figure(caption: str, title: str, width: float, height: float) -> Figure:
    """An empty figure with its title, the data named below; width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(literal(title), fontsize=13)
    figure.supxlabel(literal(caption), fontsize=8, color="#444444")
    return figure


def png(figure: Figure, dots_per_inch: int = 130) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings(), plain():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a box: names may hold any
        figure.savefig(content, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return content.getvalue()


def literal(text: str) -> str:
    """Returns text in which Matplotlib finds no formula."""
    return text.replace("$", r"\$")


def label_of(name: str) -> str:
    """A class's name beside an axis, cut if it would leave the axis no room."""
    return literal(name if len(name) <= 24 else name[:23] + "\N{HORIZONTAL ELLIPSIS}")


def percent_axes(axes: Axes, across: str, up: str, decimals: int = 0) -> None:
    """Names the axes of accuracies and adds the legend."""
    axes.set(xlabel=across, ylabel=up)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))
    axes.grid(alpha=0.3)
    legend(axes)


def legend(axes: Axes, *entries: list, ncols: int = 1, fontsize: int = 9) -> None:
    """Adds the legend; beside the axes, in one column, if it is long. `entries` are its handles and
    labels, if they are not those of all lines.
    """
    entries = entries or axes.get_legend_handles_labels()
    if len(entries[0]) <= 8:
        axes.legend(*entries, ncols=ncols, fontsize=fontsize)
    else:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(*entries, fontsize=7, labelspacing=0.3, **place)


def log_scale(axes: Axes) -> None:
    """Makes the axis upwards logarithmic, unless no value is positive, as in dead nets; the label
    of a line that then has no place says so.
    """
    dead = [line for line in axes.lines if not (np.asarray(line.get_ydata()) > 0).any()]
    if len(dead) < len(axes.lines):
        axes.set_yscale("log")
        for line in dead:
            line.set_label(f"{line.get_label()}: 0")


def plot_marked(
    axes: Axes, names: np.ndarray, values: np.ndarray, look: Look, second: bool = False
) -> None:
    """Plots a norm's values over names, such as those of layers."""
    keywords = {**look.keywords, "linestyle": look.second} if second else look.keywords
    axes.plot(list(map(str, names)), values, **keywords)


def spread(count: int, apart: float) -> np.ndarray:
    """Returns the places of `count` norms beside a position: f64[count] around 0, `apart` from each
    other, or closer if they would reach the next position, which is 1 away.
    """
    return (np.arange(count) - (count - 1) / 2) * min(apart, 0.85 / max(1, count))
