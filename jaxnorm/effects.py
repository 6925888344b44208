"""What a norm does inside a net: the activations before and after it, the gradients that reach each
layer, what batch norm loses when it is evaluated otherwise than it was trained, and whose pixels
one image's result depends on.

Pure functions of nets and images, for the notebooks and for a run's own record (`measure`). All of
them look at the net as it is in training, with the statistics of the batch, but without dropout, so
that what differs between two norms is the norm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxnorm import experiment, train
from jaxnorm.config import Arch, Config, Norm
from jaxnorm.data import Dataset
from jaxnorm.devices import ONE
from jaxnorm.model import normalization
from jaxnorm.observers import Observer
from jaxnorm.records import RunDirectory

_ONCE: Any = {"compiler_options": {"xla_backend_optimization_level": 1}}
"""For functions that run once: compiled in half of the time, at half of the speed."""
SIZES = (4, 16, 64, 128)
"""The batch sizes at which batch norm is looked at."""
LOOKED_AT = 128
"""Training images whose activations and gradients are measured."""
TESTED = 2_000
"""The most test images that each batch size is evaluated on."""


@partial(jax.jit, static_argnums=0, **_ONCE)
def activations(
    recipe: train.Recipe,
    state: train.TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What each norm is given and what it makes of it: {layer: (before, after)}, each f32[N, H, W,
    C], by the name of the convolution before it.
    """
    _, captured = _apply(recipe, state, train.standardize(recipe, images), capture=True)
    outputs = captured["intermediates"]
    names = [layer.name for layer in recipe.model.layers if layer.kind == "block"]
    return {
        name: (outputs[name]["__call__"][0], outputs[f"{name}_norm"]["__call__"][0])
        for name in names
    }


@partial(jax.jit, static_argnums=0, **_ONCE)
def gradient_norms(
    recipe: train.Recipe,
    state: train.TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
) -> dict[str, jax.Array]:
    """The Euclidean norm f32[] of the loss's gradient with respect to each convolution's kernel."""

    def objective(params: Any) -> jax.Array:
        """The mean cross-entropy of the batch."""
        logits, _ = _apply(recipe, state._replace(params=params), train.standardize(recipe, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradients = jax.grad(objective)(state.params)
    names = [layer.name for layer in recipe.model.layers if layer.name in gradients]
    return {name: jnp.linalg.norm(gradients[name]["kernel"].ravel()) for name in names}


@partial(jax.jit, static_argnums=(0, 4), **_ONCE)
def batch_accuracy(
    recipe: train.Recipe,
    state: train.TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batch_size: int,
) -> jax.Array:  # f32[]
    """The accuracy when batches of this size are normalized by their own statistics, as in
    training, over the whole batches that N images make.

    Against `train.evaluate`, which uses the running averages, it is batch norm's gap between
    training and evaluation. For the other norms there is none.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    count = images.shape[0] // batch_size

    def right(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """How many of a batch are classified rightly."""
        logits, _ = _apply(recipe, state, train.standardize(recipe, batch[0]))
        return (logits.argmax(-1) == batch[1]).sum()

    shaped = [
        each[: count * batch_size].reshape(count, batch_size, *each.shape[1:])
        for each in (images, labels)
    ]
    return lax.map(right, tuple(shaped)).sum() / (count * batch_size)


@partial(jax.jit, static_argnums=0, **_ONCE)
def example_gradients(
    recipe: train.Recipe,
    state: train.TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
) -> jax.Array:  # f32[N, N]
    """How much each image's loss depends on each image's pixels: entry (i, j) is the Euclidean norm
    of the gradient of image i's loss with respect to image j.

    Off the diagonal it is zero for every norm but batch norm, which mixes the images of a batch.
    """

    def losses(inputs: jax.Array) -> jax.Array:
        """The cross-entropy of each image, f32[N]."""
        logits, _ = _apply(recipe, state, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    jacobian = jax.jacrev(losses)(train.standardize(recipe, images))
    return jnp.sqrt((jacobian**2).sum((2, 3, 4)))


def averaged_over(
    norm: Norm,
    shape: tuple[int, int, int, int] = (3, 4, 4, 8),
    at: tuple[int, int, int, int] = (0, 1, 1, 2),
    groups: int = 4,
    arch: Arch = "matched",
) -> np.ndarray:  # bool[N, H, W, C]
    """The inputs that one output of a norm depends on: those whose statistics it is given.

    Found by differentiating the module itself.
    """
    module = normalization(norm, arch, groups, True, None, plain=True)
    inputs = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(module.init, **_ONCE)(jax.random.key(1), inputs)

    def output(x: jax.Array) -> jax.Array:
        """The one output."""
        return module.apply(variables, x, mutable=["batch_stats"])[0][at]

    return np.asarray(jax.jit(jax.grad(output), **_ONCE)(inputs) != 0)


def batch_size_effect(
    config: Config,
    dataset: Dataset,
    sizes: Sequence[int] = SIZES,
    observer: Observer | None = None,
) -> dict[tuple[Norm, int, int], experiment.Fit]:
    """Trains every net of `config` at each batch size: {(norm, seed, batch size): fit}.

    Nothing else changes, the learning rate included, so a smaller batch also means more steps. What
    tells is how the norms differ at one size. Raises `UserError` and `NonFiniteLoss`.
    """
    return {
        (*net, size): fit
        for size in sizes
        for net, fit in experiment.fit(
            dataclasses.replace(config, batch_size=size), dataset, observer
        ).items()
    }


def measure(
    recipe: train.Recipe,
    state: train.TrainState,
    dataset: Dataset,
    logits: np.ndarray,  # f32[M, classes], of the test images, with running averages
) -> dict[str, np.ndarray]:
    """What a run records of one trained net, by name:

    - layers: names of the L normalized convolutions; before, after: f32[L, 2], mean and deviation
      of all activations before and after the norm.
    - kernels: names of the K convolutions; gradients: f32[K], norms of their gradients.
    - sizes: i32[S], batch sizes; batch_accuracy: f32[S], as the function; running_accuracy: f32[],
      with running averages, on the same test images, of which there are tested: i32[].

    The first `LOOKED_AT` training images and `TESTED` test images are looked at.
    """
    recipe = dataclasses.replace(recipe, layout=ONE)
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    images = jnp.asarray(dataset.train_images[:LOOKED_AT])
    labels = jnp.asarray(dataset.train_labels[:LOOKED_AT])
    seen = jax.device_get(activations(recipe, state, images))
    gradients = jax.device_get(gradient_norms(recipe, state, images, labels))
    test_images = jnp.asarray(dataset.test_images[:TESTED])
    test_labels = jnp.asarray(dataset.test_labels[:TESTED])
    running = (logits[:TESTED].argmax(1) == dataset.test_labels[:TESTED]).mean()
    sizes = [size for size in SIZES if size <= len(test_labels)]
    if recipe.model.norm == "batch":
        accuracies = [
            batch_accuracy(recipe, state, test_images, test_labels, size) for size in sizes
        ]
    else:
        accuracies = [running] * len(sizes)  # no statistics of a batch: nothing changes
    # What comes out of a compiled function is sorted by name.
    order = [layer.name for layer in recipe.model.layers]
    layers, kernels = (sorted(each, key=order.index) for each in (seen, gradients))
    moments: np.ndarray = np.array(
        [[(each.mean(), each.std()) for each in seen[name]] for name in layers], np.float32
    )
    return {
        "layers": np.array(layers),
        "before": moments[:, 0],
        "after": moments[:, 1],
        "kernels": np.array(kernels),
        "gradients": np.array([gradients[name] for name in kernels], np.float32),
        "sizes": np.array(sizes, np.int32),
        "batch_accuracy": np.array(accuracies, np.float32),
        "running_accuracy": np.array(running, np.float32),
        "tested": np.array(len(test_labels), np.int32),
    }


def record(
    directory: RunDirectory,
    dataset: Dataset,
    sources: Mapping[tuple[Norm, int], RunDirectory] | None = None,
) -> None:
    """Measures the nets of a run's first seed into its directory, from their checkpoints, which
    `sources` may say lie in other runs.

    Raises `UserError` where one has none, unless the runs that it was put together from had and
    were measured then.
    """
    config = directory.info().config
    for norm in config.norms:
        home = (sources or {}).get((norm, config.seed), directory)
        if home is directory and directory.was_merged(norm, config.seed):
            continue
        recipe, state = experiment.load_state(home.path, norm, config.seed)
        logits, _ = directory.predictions(norm, config.seed)
        directory.write_effects(norm, config.seed, measure(recipe, state, dataset, logits))


def _apply(
    recipe: train.Recipe, state: train.TrainState, inputs: jax.Array, capture: bool = False
) -> tuple[jax.Array, Any]:
    """Logits of standardized images as in training, without dropout; and what was captured."""
    return recipe.model.clone(dropout=0.0).apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        inputs,
        train=True,
        capture_intermediates=capture,
        mutable=["batch_stats", "intermediates"],
    )
