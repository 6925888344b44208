"""Figures of what `training.probes` measured inside trained nets."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from jaxnorm.analysis.drawing import (
    TOGETHER,
    Named,
    label_of,
    legend,
    log_scale,
    looks,
    new_figure,
    percent_axes,
    plot_marked,
    spread,
)
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.tables import CORRUPTED
from jaxnorm.config import named

ACTIVATIONS = {"layers": "U L", "before": "f L 2", "after": "f L 2"}
GRADIENTS = {"kernels": "U K", "gradients": "f K"}
BATCHES = {"sizes": "iu S", "batch_accuracy": "f S", "running_accuracy": "f", "tested": "iu"}
DEPTH = {"layers": "U L", "similarities": "f 2 L", "kernels": "U K", "gradients": "f K"}
DEPTH |= {"initial_gradients": "f K"}
"""The arrays of a probe that a figure shows (see `training.probes.measure`)."""
Probes = Mapping[str, Mapping[str, np.ndarray]]


def inside(run: Run) -> Named:
    """Draws what the norms do inside the trained nets of the first seed."""
    measured = run.probes(ACTIVATIONS | GRADIENTS | BATCHES)
    firsts = {norm: min(nets) for norm, nets in measured.items()}
    seeds = [f"seed {seed} ({named(norm)})" for norm, seed in firsts.items()]
    if len(set(firsts.values())) == 1:
        seeds = [f"seed {min(firsts.values())}"]
    caption = f"{run.data}; {', '.join(seeds)}, after the last epoch"
    probes = {norm: measured[norm][seed] for norm, seed in firsts.items()}
    return of_probes(probes, caption, run.info.config.norms)


def of_probes(probes: Probes, caption: str, norms: Sequence[str] = ()) -> Named:
    """Draws what `probes.measure` gave of each norm: activations before and after each norm, the
    gradient of each layer, and batch norm's gap between training and evaluation. Each norm looks as
    in the other figures of a run of `norms`.
    """
    if not probes:
        return
    look_of = looks([*norms, *probes])
    figure = new_figure(caption, "Activations before and after each norm", 9, 5.2)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, when in enumerate(("before", "after")):
        panels[0, column].set_title(f"{when} the norm", fontsize=10)
        for row, moment in enumerate(("mean", "standard deviation")):
            for norm, measured in probes.items():
                values, look = measured[when][:, row], look_of[norm]
                plot_marked(panels[row, column], measured["layers"], values, look)
            panels[row, column].grid(alpha=0.3)
            panels[row, 0].set_ylabel(moment)
    legend(panels[0, 1] if len(probes) > 8 else panels[0, 0], fontsize=8)
    yield "activations", figure
    figure = new_figure(caption, "Size of the loss's gradient at each kernel", 8, 4.2)
    axes = figure.subplots()
    for norm, measured in probes.items():
        plot_marked(axes, measured["kernels"], measured["gradients"], look_of[norm])
    log_scale(axes)
    axes.set(xlabel="layer, input to output", ylabel="Euclidean norm")
    axes.grid(alpha=0.3)
    legend(axes)
    yield "gradients", figure
    title = "Evaluated with each batch's own statistics, not running averages"
    figure = new_figure(caption, title, 8, 4.2)
    axes = figure.subplots()
    for norm, measured in probes.items():
        plot_marked(axes, measured["sizes"], measured["batch_accuracy"], look_of[norm])
        if norm == "batch":
            height, label = float(measured["running_accuracy"]), "batch, running averages"
            axes.axhline(height, color=look_of[norm].colour, linestyle=":", label=label)
    tested = max(int(measured["tested"]) for measured in probes.values())
    percent_axes(axes, "images in a batch", f"accuracy on {tested:,} test images")
    yield "batch-statistics", figure


def depth(run: Run) -> Named:
    """Draws, before and after training and over depth, the gradient at each kernel and how alike a
    norm makes different images. Means over the seeds.
    """
    measured = {norm: list(nets.values()) for norm, nets in run.probes(DEPTH).items()}
    if not measured:
        return
    look_of, many = looks(run.info.config.norms), len(measured) > TOGETHER
    solid = all(look_of[norm].line == "-" for norm in measured)
    how = "above" if many else "dashed" if solid else "shorter dashes"
    title = f"Over depth, before training ({how}) and after it"
    figure = new_figure(_caption(run, measured), title, 10, 8 if many else 4.4)
    panels = figure.subplots(1 + many, 2, sharex="col", sharey="col", squeeze=False)
    for norm, nets in measured.items():
        look = look_of[norm]
        for row, when in enumerate(("initial_gradients", "gradients")):
            (left, right), second = panels[row * many], not (many or row)
            gradients = np.mean([net[when] for net in nets], axis=0)
            plot_marked(left, nets[0]["kernels"], gradients, look, second)
            cosines = np.mean([net["similarities"][row] for net in nets], axis=0)
            plot_marked(right, nets[0]["layers"], cosines, look, second)
    for left, right in panels:
        left.set_ylabel("norm of the gradient")
        right.set_ylabel("cosine between two images")
        log_scale(left)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("layer, input to output")
    legend(panels[0, 1], *_once(panels[0, 1]))
    yield "depth", figure


def corruptions(run: Run) -> Named:
    """Draws the accuracy on corrupted images: the mean of the seeds and their range."""
    measured = {norm: list(nets.values()) for norm, nets in run.probes(CORRUPTED).items()}
    if not measured:
        return
    figure = new_figure(_caption(run, measured), "Test accuracy on corrupted images", 8, 4.4)
    axes, kinds = figure.subplots(), ["none", *next(iter(measured.values()))[0]["corruptions"]]
    look_of, offsets = looks(run.info.config.norms), spread(len(measured), 0.15)
    for (norm, nets), offset in zip(measured.items(), offsets, strict=True):
        values = np.array([[net["running_accuracy"], *net["corrupted_accuracy"]] for net in nets])
        places, look = np.arange(len(kinds)) + offset, look_of[norm]
        axes.plot(places, values.mean(0), **{**look.keywords, "linestyle": ""})
        axes.vlines(places, values.min(0), values.max(0), color=look.colour, lw=1)
    axes.set_xticks(range(len(kinds)), [label_of(str(kind)) for kind in kinds])
    tested = int(next(iter(measured.values()))[0]["tested"])
    percent_axes(axes, "corruption", f"accuracy on {tested:,} test images")
    yield "corruptions", figure


def _caption(run: Run, measured: Mapping[str, list]) -> str:
    """A run's caption, with the number of seeds that were measured if some were not."""
    count = min(map(len, measured.values()))
    return run.caption + (f", {count} measured" if count < len(run.seed_numbers) else "")


def _once(axes: Axes) -> tuple[list, list]:
    """Returns the handles and labels of a legend; of a norm with two lines, those of the second."""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    return list(handles.values()), list(handles)
