"""How every figure looks: its caption, its colours, its axes, and the PNG that it becomes.

Every figure names its data. Colours are Okabe and Ito's, told apart by the colour-blind, and every
line has its own dash or marker too.
"""

import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FIRST = ("batch", "group", "layer", "pixel", "instance", "rms", "none")
Named = Iterator[tuple[str, Figure]]


class _ByNorm(dict):
    """A style for each norm: the study's own first, others in the order in which they are met."""

    def __init__(self, styles: Sequence[str]) -> None:
        self._styles = itertools.cycle(styles)
        super().__init__((norm, next(self._styles)) for norm in _FIRST)

    def __missing__(self, norm: str) -> str:
        return self.setdefault(norm, next(self._styles))


COLOURS, MARKERS = _ByNorm(_PALETTE), _ByNorm("os^Dv*X")


def new_figure(caption: str, title: str, width: float, height: float) -> Figure:
    """An empty figure with its title, the data named below; width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(literal(title), fontsize=13)
    figure.supxlabel(literal(caption), fontsize=8, color="#444444")
    return figure


def png(figure: Figure, dots_per_inch: int = 130) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a box: names may hold any
        figure.savefig(content, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return content.getvalue()


def literal(text: str) -> str:
    """Text in which Matplotlib finds no formula."""
    return text.replace("$", r"\$")


def label_of(name: str) -> str:
    """A class's name beside an axis, cut where it would leave the axis no room."""
    return literal(name if len(name) <= 24 else name[:23] + "\N{HORIZONTAL ELLIPSIS}")


def percent_axes(axes: Axes, across: str, up: str, decimals: int = 0) -> None:
    """Names the axes of accuracies and adds the legend."""
    axes.set(xlabel=across, ylabel=up)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def look_of(norm: str) -> dict[str, Any]:
    """The line of a norm."""
    return {"color": COLOURS[norm], "marker": MARKERS[norm], "markersize": 5, "label": norm}


def log_scale(axes: Axes) -> None:
    """A logarithmic axis upwards, but where no value is positive, as in a dead net."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log")


def plot_marked(
    axes: Axes, names: np.ndarray, values: np.ndarray, norm: str, line: str = "-"
) -> None:
    """A norm's values over names, as layers are."""
    axes.plot(list(map(str, names)), values, line, **look_of(norm))
