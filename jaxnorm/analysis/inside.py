"""Figures of what `training.probes` measured inside trained nets."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from jaxnorm.analysis.drawing import (
    COLOURS,
    Named,
    label_of,
    log_scale,
    look_of,
    new_figure,
    percent_axes,
    plot_marked,
)
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.tables import CORRUPTED

ACTIVATIONS = {"layers": "U L", "before": "f L 2", "after": "f L 2"}
GRADIENTS = {"kernels": "U K", "gradients": "f K"}
BATCHES = {"sizes": "iu S", "batch_accuracy": "f S", "running_accuracy": "f", "tested": "iu"}
DEPTH = {"layers": "U L", "similarities": "f 2 L", "kernels": "U K", "gradients": "f K"}
DEPTH |= {"initial_gradients": "f K"}
"""The arrays of a probe that a figure shows (see `training.probes.measure`)."""
Probes = Mapping[str, Mapping[str, np.ndarray]]


def inside(run: Run) -> Named:
    """What the norms do inside the trained nets of the first seed."""
    caption = f"{run.info.dataset.caption}; seed {run.info.config.seed}, after the last epoch"
    measured = run.probes(ACTIVATIONS | GRADIENTS | BATCHES)
    return of_probes({norm: nets[0] for norm, nets in measured.items()}, caption)


def of_probes(probes: Probes, caption: str) -> Named:
    """What `probes.measure` gave of each norm: activations before and after each norm, the gradient
    of each layer, and batch norm's gap between training and evaluation.
    """
    if not probes:
        return
    figure = new_figure(caption, "Activations before and after each norm", 9, 5.2)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, when in enumerate(("before", "after")):
        panels[0, column].set_title(f"{when} the norm", fontsize=10)
        for row, moment in enumerate(("mean", "standard deviation")):
            for norm, measured in probes.items():
                plot_marked(panels[row, column], measured["layers"], measured[when][:, row], norm)
            panels[row, column].grid(alpha=0.3)
            panels[row, 0].set_ylabel(moment)
    panels[0, 0].legend(fontsize=8)
    yield "activations", figure
    figure = new_figure(caption, "Size of the loss's gradient at each kernel", 8, 4.2)
    axes = figure.subplots()
    for norm, measured in probes.items():
        plot_marked(axes, measured["kernels"], measured["gradients"], norm)
    log_scale(axes)
    axes.set(xlabel="layer, input to output", ylabel="Euclidean norm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    yield "gradients", figure
    title = "Evaluated with each batch's own statistics, not running averages"
    figure = new_figure(caption, title, 8, 4.2)
    axes = figure.subplots()
    for norm, measured in probes.items():
        plot_marked(axes, measured["sizes"], measured["batch_accuracy"], norm)
        if norm == "batch":
            height, label = float(measured["running_accuracy"]), "batch, running averages"
            axes.axhline(height, color=COLOURS[norm], linestyle=":", label=label)
    tested = max(int(measured["tested"]) for measured in probes.values())
    percent_axes(axes, "images in a batch", f"accuracy on {tested:,} test images")
    yield "batch-statistics", figure


def depth(run: Run) -> Named:
    """Before and after training, over depth: the gradient at each kernel, and how alike a norm
    makes different images. Means over the seeds.
    """
    measured = run.probes(DEPTH)
    if not measured:
        return
    caption = _caption(run, measured)
    figure = new_figure(caption, "Over depth, before training (dashed) and after it", 10, 4.4)
    left, right = figure.subplots(1, 2)
    for norm, nets in measured.items():
        for when, line in (("initial_gradients", "--"), ("gradients", "-")):
            values = np.mean([net[when] for net in nets], axis=0)
            plot_marked(left, nets[0]["kernels"], values, norm, line)
        values = np.mean([net["similarities"] for net in nets], axis=0)
        for row, line in zip(values, ("--", "-"), strict=True):
            plot_marked(right, nets[0]["layers"], row, norm, line)
    left.set(xlabel="layer, input to output", ylabel="norm of the gradient")
    log_scale(left)
    right.set(xlabel="layer, input to output", ylabel="cosine between two images")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(*_once(right), fontsize=9)
    yield "depth", figure


def corruptions(run: Run) -> Named:
    """The accuracy on corrupted images: the mean of the seeds and their range."""
    measured = run.probes(CORRUPTED)
    if not measured:
        return
    figure = new_figure(_caption(run, measured), "Test accuracy on corrupted images", 8, 4.4)
    axes, kinds = figure.subplots(), ["none", *next(iter(measured.values()))[0]["corruptions"]]
    for number, (norm, nets) in enumerate(measured.items()):
        values = np.array([[net["running_accuracy"], *net["corrupted_accuracy"]] for net in nets])
        places = np.arange(len(kinds)) + (number - (len(measured) - 1) / 2) * 0.15
        axes.plot(places, values.mean(0), linestyle="", **look_of(norm))
        axes.vlines(places, values.min(0), values.max(0), color=COLOURS[norm], lw=1)
    axes.set_xticks(range(len(kinds)), [label_of(str(kind)) for kind in kinds])
    tested = int(next(iter(measured.values()))[0]["tested"])
    percent_axes(axes, "corruption", f"accuracy on {tested:,} test images")
    yield "corruptions", figure


def _caption(run: Run, measured: Mapping[str, list]) -> str:
    """A run's caption, and of how many seeds this was measured where it was not of all."""
    count = min(map(len, measured.values()))
    return run.caption + (f", {count} measured" if count < len(run.seed_numbers) else "")


def _once(axes: Axes) -> tuple[list, list]:
    """What a legend shows where a norm has two lines: the second."""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    return list(handles.values()), list(handles)
