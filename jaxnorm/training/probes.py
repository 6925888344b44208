"""Probes, measurements inside a net: the activations before and after each norm, the gradients that
reach each layer, and what batch norm loses when it is evaluated otherwise than it was trained.

Pure functions of nets and images. `measure` is what a run records of a net; a new probe is one more
entry in its result. All of them look at the net as it is in training, with the statistics of the
batch, but without dropout, so that what differs between two norms is the norm.
"""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxnorm.data.datasets import Dataset
from jaxnorm.training.mesh import ONE
from jaxnorm.training.step import Program, TrainState, standardize

_ONCE: Any = {"compiler_options": {"xla_backend_optimization_level": 1}}
"""For functions that run once: compiled in half of the time, at half of the speed."""
SIZES = (4, 16, 64, 128)
"""The batch sizes at which batch norm is looked at."""
LOOKED_AT = 128
"""Training images whose activations and gradients are measured."""
TESTED = 1_920
"""The most test images that each batch size is evaluated on: the same ones for every size."""


@partial(jax.jit, static_argnums=0, **_ONCE)
def activations(
    program: Program,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What each norm is given and what it makes of it: {layer: (before, after)}, each f32[N, H, W,
    C], by the name of the convolution before it.
    """
    _, captured = _apply(program, state, standardize(state, images), capture=True)
    outputs = captured["intermediates"]
    names = [layer.name for layer in program.model.table if f"{layer.name}_norm" in outputs]
    pairs = {name: (outputs[name], outputs[f"{name}_norm"]) for name in names}
    return {n: (pair[0]["__call__"][0], pair[1]["__call__"][0]) for n, pair in pairs.items()}


@partial(jax.jit, static_argnums=0, **_ONCE)
def gradient_norms(
    program: Program,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
) -> dict[str, jax.Array]:
    """The Euclidean norm f32[] of the loss's gradient with respect to each convolution's kernel."""

    def objective(params: Any) -> jax.Array:
        logits, _ = _apply(program, state._replace(params=params), standardize(state, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradients = jax.grad(objective)(state.params)
    names = [layer.name for layer in program.model.table if layer.name in gradients]
    return {name: jnp.linalg.norm(gradients[name]["kernel"].ravel()) for name in names}


@partial(jax.jit, static_argnums=(0, 4), **_ONCE)
def batch_accuracy(
    program: Program,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batch_size: int,  # divides N
) -> jax.Array:  # f32[]
    """The accuracy when batches of this size are normalized by their own statistics, as in
    training.

    Against `evaluate_nets`, which uses the running averages, it is batch norm's gap between
    training and evaluation. For the other norms there is none.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    chex.assert_is_divisible(images.shape[0], batch_size)

    def correct(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits, _ = _apply(program, state, standardize(state, batch[0]))
        return (logits.argmax(-1) == batch[1]).sum()

    batches = [a.reshape(-1, batch_size, *a.shape[1:]) for a in (images, labels)]
    return lax.map(correct, tuple(batches)).sum() / images.shape[0]


def measure(
    program: Program,
    state: TrainState,
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
    program = dataclasses.replace(program, mesh=ONE)
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    images = jnp.asarray(dataset.train_images[:LOOKED_AT])
    seen = jax.device_get(activations(program, state, images))
    labels = jnp.asarray(dataset.train_labels[:LOOKED_AT])
    gradients = jax.device_get(gradient_norms(program, state, images, labels))
    sizes = [size for size in SIZES if size <= len(dataset.test_labels)]
    largest = max(sizes, default=1)
    tested = min(TESTED, len(dataset.test_labels)) // largest * largest
    test_labels = dataset.test_labels[:tested]
    running = (logits[:tested].argmax(1) == test_labels).mean()
    accuracies = [running] * len(sizes)
    if jax.tree.leaves(state.norm_state):  # else there are no statistics of a batch
        test = (jnp.asarray(dataset.test_images[:tested]), jnp.asarray(test_labels))
        accuracies = [batch_accuracy(program, state, *test, size) for size in sizes]
    # What comes out of a compiled function is sorted by name.
    order = [layer.name for layer in program.model.table]
    layers, kernels = (sorted(each, key=order.index) for each in (seen, gradients))
    before, after = (
        [(each.mean(), each.std()) for each in side]
        for side in zip(*(seen[name] for name in layers), strict=True)
    )
    return {
        "layers": np.array(layers),
        "before": np.array(before, np.float32),
        "after": np.array(after, np.float32),
        "kernels": np.array(kernels),
        "gradients": np.array([gradients[name] for name in kernels], np.float32),
        "sizes": np.array(sizes, np.int32),
        "batch_accuracy": np.array(accuracies, np.float32),
        "running_accuracy": np.array(running, np.float32),
        "tested": np.array(tested, np.int32),
    }


def _apply(
    program: Program, state: TrainState, inputs: jax.Array, capture: bool = False
) -> tuple[jax.Array, Any]:
    """Logits of standardized images as in training, without dropout; and what was captured."""
    mutable = [*state.norm_state, "intermediates"]
    options = {"train": True, "capture_intermediates": capture, "mutable": mutable}
    return program.model.clone(dropout=0.0).apply(state.variables, inputs, **options)
