"""What `explore_norms` and `norms` measure and draw, beside what a run records of every net."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxnorm.analysis import inside
from jaxnorm.analysis.drawing import looks, png
from jaxnorm.data.datasets import Dataset
from jaxnorm.model.cnn import CNN
from jaxnorm.training import probes
from jaxnorm.training.fit import Fit
from jaxnorm.training.step import Program, TrainState, derive_key, standard_of, standardize


def show(drawn: Figure) -> None:
    """Shows a figure."""
    display(Image(png(drawn, 80)))


def draw_inside(fits: Iterable[Fit], dataset: Dataset, caption: str) -> Iterator[Figure]:
    """Draws what is measured inside trained nets, one of each norm."""
    measured = {fit.norm: probes.measure(fit.program, fit, dataset, fit.seed) for fit in fits}
    for _, figure in inside.of_probes(measured, caption):
        yield figure


def averaged_over(
    norm: str,
    shape: tuple[int, int, int, int] = (3, 4, 4, 8),
    at: tuple[int, int, int, int] = (0, 1, 1, 2),
    groups: int = 4,
) -> np.ndarray:  # bool[N, H, W, C]
    """The inputs that one output of a norm depends on: those whose statistics it is given.

    Found by differentiating the module itself.
    """
    module = CNN(norm, "matched", groups=groups, fast=False).normalization(train=True)
    inputs = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(module.init)(jax.random.key(1), inputs)

    def output(x):
        return module.apply(variables, x, mutable=["batch_stats"])[0][at]

    return np.asarray(jax.jit(jax.grad(output))(inputs) != 0)


def example_gradients(
    program: Program,
    state: TrainState,
    images: np.ndarray,  # u8[N, 32, 32, 3]
    labels: np.ndarray,  # i32[N]
) -> np.ndarray:  # f32[N, N]
    """How much each image's loss depends on each image's pixels: entry (i, j) is the Euclidean norm
    of the gradient of image i's loss with respect to image j.

    Off the diagonal it is zero for every norm but batch norm, which mixes the images of a batch.
    """
    net = program.model.clone(dropout=0.0)

    def losses(inputs):
        logits, _ = net.apply(state.variables, inputs, train=True, mutable=list(state.norm_state))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))

    jacobian = jax.jit(jax.jacrev(losses))(standardize(state, jnp.asarray(images)))
    return np.asarray(jnp.sqrt((jacobian**2).sum((2, 3, 4))))


def draw_averaged(masks: Mapping[str, np.ndarray]) -> Figure:
    """What one output of each norm depends on: the images stand above each other, and the pixels of
    each channel side by side; dark is averaged over.
    """
    figure = Figure(figsize=(2 * len(masks) + 1, 2.6), layout="constrained")
    panels = figure.subplots(1, len(masks), squeeze=False)[0]
    for axes, (norm, mask) in zip(panels, masks.items(), strict=True):
        count, height, width, channels = mask.shape
        picture = mask.transpose(0, 1, 3, 2).reshape(count * height, channels * width)
        axes.imshow(picture, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        for edge in range(1, count):
            axes.axhline(edge * height - 0.5, color="#666666", linewidth=1)
        for edge in range(1, channels):
            axes.axvline(edge * width - 0.5, color="#666666", linewidth=0.5)
        axes.set_title(f"{norm} norm", fontsize=10)
        axes.set(xlabel="channels", ylabel="images", xticks=[], yticks=[])
    return figure


def draw_example_gradients(matrices: Mapping[str, np.ndarray]) -> Figure:
    """How much each image's loss depends on each image's pixels, as shares of the largest."""
    figure = Figure(figsize=(3.4 * len(matrices) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (norm, matrix) in zip(panels, matrices.items(), strict=True):
        shown = axes.imshow(matrix / matrix.max(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"{norm} norm", fontsize=10)
        axes.set(xlabel="pixels of image", ylabel="loss of image")
    figure.colorbar(shown, ax=list(panels), shrink=0.8, label="share of the largest")
    return figure


def draw_batch_sizes(accuracies: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """The last test accuracy of each norm by the batch size of training: {norm: {batch size: a
    value for each seed}}, the mean and the range.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({size for by_size in accuracies.values() for size in by_size})
    look_of = looks(accuracies)
    for norm, by_size in accuracies.items():
        look = look_of[norm]
        places = [i for i, size in enumerate(sizes) if size in by_size]
        values = [by_size[sizes[i]] for i in places]
        means, low, high = ([f(of_size) for of_size in values] for f in (np.mean, min, max))
        axes.plot(places, means, **look.keywords)
        axes.fill_between(places, low, high, color=look.colour, alpha=0.2, linewidth=0)
    axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
    axes.set(xlabel="images in a batch", ylabel="test accuracy after the last epoch")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def convolved(
    images: np.ndarray,  # f32[N, 32, 32, 3], from 0 to 255
    dataset: Dataset,
) -> jax.Array:  # f32[N, H, W, C]
    """Standardizes images and returns what the first convolution of an untrained net gives."""
    net, size = CNN("none", "matched", fast=False), (1, 32, 32, 3)
    params = jax.jit(net.init)(derive_key(1, "init"), jnp.zeros(size))["params"]
    mean, factor = standard_of(dataset.mean, dataset.deviation).reshape(2, 1, 1, 1, 3)
    convolution = net.conv(net.table[0], (3, 3), jnp.dtype(jnp.float32))
    return convolution.apply({"params": params["C1"]}, (images - mean) * factor)


def normalized(module: nn.Module, batches: Sequence[jax.Array]) -> np.ndarray:  # f32[N, H, W, C]
    """Applies a norm to batches in turn, as training does, and returns what the last becomes."""
    variables = jax.jit(module.init)(jax.random.key(0), batches[0])
    apply = jax.jit(lambda *inputs: module.apply(*inputs, mutable=["batch_stats"]))
    for batch in batches:
        outputs, state = apply(variables, batch)
        variables = {**variables, **state}
    return np.asarray(outputs)


def draw_moments(
    before: np.ndarray,  # f32[N, H, W, C]
    after: Mapping[str, np.ndarray],  # f32[N, H, W, C] of each norm
    by: Literal["image", "channel"],
) -> Figure:
    """Mean and deviation of each image or each channel, before each norm and after it."""
    figure, panels, rest = _panels(after, sharey=True)
    axis = (1, 2, 3) if by == "image" else (0, 1, 2)
    for axes, values in zip(panels, after.values(), strict=True):
        for moments, line, colour in ((before, "--", "#555555"), (values, "-", "#0072B2")):
            mean, deviation = np.mean(moments, axis), np.std(moments, axis)
            low, high, places = mean - deviation, mean + deviation, range(len(mean))
            axes.plot(places, mean, line, color=colour, linewidth=1.5)
            if line == "-":
                axes.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
            else:
                axes.plot(places, np.transpose([low, high]), line, color=colour, linewidth=0.7)
        axes.grid(alpha=0.3)
    handles = [panels[0].lines[0], panels[0].lines[1], panels[0].lines[3]]
    handles.append(panels[0].collections[0])
    words = ("mean before", "and a deviation", "mean after", "and a deviation")
    rest[-1].legend(handles, words, loc="center", fontsize=8)
    panels[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.supxlabel(by, fontsize=10)
    return figure


def draw_values(
    before: np.ndarray,  # f32[N, H, W, C]
    after: Mapping[str, np.ndarray],  # f32[N, H, W, C] of each norm
    images: Sequence[int],  # three at most
    channel: int,
) -> Figure:
    """Each pixel of a channel, after each norm over before it, in a few images."""
    figure, panels, rest = _panels(after, sharey=False)
    looks_of = (("#000000", "."), ("#D55E00", "x"), ("#56B4E9", "+"))
    for axes, values in zip(panels, after.values(), strict=True):
        for image, (colour, marker) in zip(images, looks_of, strict=False):
            points = (np.ravel(maps[image, :, :, channel]) for maps in (before, values))
            look = {"color": colour, "markersize": 3, "zorder": 3 - image / 1000}
            axes.plot(*points, marker, label=f"image {image}", **look)
        axes.grid(alpha=0.3)
    handles, words = panels[0].get_legend_handles_labels()
    rest[-1].legend(handles, words, loc="center", fontsize=9, markerscale=2)
    figure.supxlabel(f"channel {channel} before the norm", fontsize=10)
    figure.supylabel("after it", fontsize=10)
    return figure


def _panels(names: Iterable[str], sharey: bool) -> tuple[Figure, list[Axes], list[Axes]]:
    """Returns a figure, a panel for each name, and the places that are left, one at least."""
    titles = list(names)
    rows = len(titles) // 5 + 1
    figure = Figure(figsize=(11, 2.1 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, 5, sharex=True, sharey=sharey, squeeze=False).flat)
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize=10)
    for place in range(len(titles), len(panels)):
        panels[place].set_axis_off()
        panels[place - 5].tick_params(labelbottom=True)  # nothing stands below it
    return figure, panels[: len(titles)], panels[len(titles) :]
