"""Probes, measurements inside a net: the activations before and after each norm, the gradients that
reach each layer, what batch norm loses if it is evaluated otherwise than it was trained, and the
accuracy on corrupted images.

Pure functions of nets and images. `measure` is what a run records of a net; a new probe is one more
entry in its result. All that it calls look at the net as it is in training, with the statistics of
the batch, but without dropout, so that what differs between two norms is the norm.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxnorm.config import NORMS
from jaxnorm.data.datasets import Dataset
from jaxnorm.training import mesh as meshes
from jaxnorm.training.epoch import evaluate_nets
from jaxnorm.training.mesh import ONE, MeshShape
from jaxnorm.training.step import Program, TrainState, init_state, standardize

_FEW: Any = {"compiler_options": {"xla_backend_optimization_level": 0}}
"""For functions of few images: compiled in two thirds of the time, at a third of the speed."""
SIZES = (4, 16, 64, 128)
"""The batch sizes at which batch norm is looked at."""
LOOKED_AT = 128
"""Training images whose activations and gradients are measured."""
TESTED = 1_920
"""The most test images that each batch size is evaluated on: the same ones for every size."""


@partial(jax.jit, static_argnums=0, **_FEW)
def look(
    program: Program,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
    """Returns, of one pass forward and back, the input and the output of each norm: {layer:
    (before, after)}, each f32[N, H, W, C], by the name of the convolution before it; and the
    Euclidean norm f32[] of the loss's gradient by each convolution's kernel.
    """

    def objective(params: Any) -> tuple[jax.Array, Any]:
        net = state._replace(params=params)
        logits, captured = _apply(program, net, standardize(state, images), capture=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), captured["intermediates"]

    gradients, outputs = jax.grad(objective, has_aux=True)(state.params)
    names = [layer.name for layer in program.model.table]
    pairs = {n: (outputs[n], outputs[f"{n}_norm"]) for n in names if f"{n}_norm" in outputs}
    activations = {n: (x["__call__"][0], y["__call__"][0]) for n, (x, y) in pairs.items()}
    kernels = {name: gradients[name]["kernel"] for name in names if name in gradients}
    return activations, {name: jnp.linalg.norm(k.ravel()) for name, k in kernels.items()}


@partial(jax.jit, static_argnums=(0, 4))
def batch_accuracy(
    program: Program,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batch_size: int,  # divides N
) -> jax.Array:  # f32[]
    """Returns the accuracy if batches of this size are normalized by their own statistics, as in
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


@partial(jax.jit, static_argnums=0)
def precise_statistics(
    program: Program,
    state: TrainState,
    batches: jax.Array,  # u8[S, B, 32, 32, 3]
    key: jax.Array | None = None,
) -> Any:
    """Returns batch norm's state with the statistics of all these images, as its layers see them
    in training, in place of running averages (Wu and Johnson, "Rethinking 'Batch'", 2021). With a
    key dropout is on, as it is when running averages are collected.
    """
    empty = state._replace(norm_state=jax.tree.map(jnp.zeros_like, state.norm_state))

    def of_batch(numbered: tuple[jax.Array, jax.Array]) -> Any:
        """Returns a batch's statistics: what an average that was zero moved by."""
        number, batch = numbered
        dropout = None if key is None else jax.random.fold_in(key, number)
        _, updates = _apply(program, empty, standardize(state, batch), dropout=dropout)
        moved = 1 - program.model.norm_momentum
        return jax.tree.map(lambda leaf: leaf / moved, updates["batch_stats"])

    layers = lax.map(of_batch, (jnp.arange(batches.shape[0]), batches)).items()
    return {
        "batch_stats": {
            name: {
                "mean": moments["mean"].mean(0),
                "var": moments["var"].mean(0) + moments["mean"].var(0),
            }
            for name, moments in layers
        }
    }


def corrupt(
    images: np.ndarray,  # u8[N, 32, 32, 3]
) -> dict[str, np.ndarray]:
    """Returns the images under five corruptions, after Hendrycks and Dietterich, "Benchmarking
    Neural Network Robustness to Common Corruptions" (2019): u8[N, 32, 32, 3] by name.
    """
    pixels, size = images.astype(np.float32), images.shape
    noise = np.random.default_rng(0).normal(0, 20, size).astype(np.float32)
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    shifts = [padded[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)]
    blocks = pixels.reshape(size[0], 16, 2, 16, 2, 3).mean((2, 4), keepdims=True)
    middle = pixels.mean((1, 2, 3), keepdims=True)
    corrupted = {
        "noise": pixels + noise,
        "blur": np.mean(shifts, axis=0),
        "low contrast": middle + 0.4 * (pixels - middle),
        "bright": pixels + 60,
        "coarse pixels": np.broadcast_to(blocks, (size[0], 16, 2, 16, 2, 3)).reshape(size),
    }
    return {name: x.round().clip(0, 255).astype(np.uint8) for name, x in corrupted.items()}


def similarity(
    activations: np.ndarray,  # f32[N, H, W, C]
    relu: bool = True,
) -> float:
    """Returns the mean cosine between what ReLU, if one follows, leaves of the activations of two
    different images, over those of which anything is left; 1 if there are no two such images, for
    then no two differ.
    """
    left = np.maximum(activations, 0) if relu else activations
    flat = left.reshape(len(activations), -1)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    alive = lengths[:, 0] > 0
    units, count = flat[alive] / lengths[alive], int(alive.sum())
    if count < 2:
        return 1.0
    return float((np.square(units.sum(0)).sum() - count) / (count * (count - 1)))


def measure(
    program: Program,
    net: Any,  # with a state and logits f32[M, classes] of the test images: `Fit`, `Saved`
    dataset: Dataset,
    seed: int,
    mesh: MeshShape = ONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Returns what a run records of one trained net, by name:

    - layers: names of the L normalized convolutions; before, after: f32[L, 2], mean and deviation
      of all activations before and after the norm.
    - kernels: names of the K convolutions; gradients: f32[K], norms of their gradients.
    - initial_gradients: f32[K], before training; similarities: f32[2, L], of `similarity` before
      training and after it; in a net with attention, of what comes out of its norms.
    - sizes: i32[S], batch sizes; batch_accuracy: f32[S], as the function; running_accuracy: f32[],
      with running averages, on the same test images, of which there are tested: i32[];
      precise_accuracy: f32[], of batch norm with `precise_statistics` of all training images, and
      of any other norm the same as running_accuracy.
    - corruptions: names of the five of `corrupt`; corrupted_accuracy: f32[5], on the same images.
    - mirrored_accuracy: f32[], of a net trained on mirrored images: by the mean of the logits of
      each test image and of its mirror image, on all test images.

    The first `LOOKED_AT` training images and `TESTED` test images are looked at. Evaluation is that
    of training, compiled already if `mesh` is the one that the net was trained on, alone.
    `progress` is called with how many of three parts are done.
    """
    progress(0, 3)
    state = jax.device_put(jax.device_get(net.state))  # `jnp.asarray` compiles for each shape
    evaluate = partial(_logits, program, mesh, len(dataset.test_labels))
    measured = _of_layers(program, init_state(program, seed, state.standard), state, dataset)
    progress(1, 3)
    measured |= _of_batches(program, state, dataset, net.logits, evaluate)
    progress(2, 3)
    tested = int(measured["tested"])
    corrupted = corrupt(dataset.test_images[:tested])
    predicted = evaluate(state, np.concatenate([*corrupted.values()])).argmax(1)
    accuracies = (predicted.reshape(-1, tested) == dataset.test_labels[:tested]).mean(1)
    measured["corruptions"] = np.array(list(corrupted))
    measured["corrupted_accuracy"] = np.array(accuracies, np.float32)
    if program.augments:
        both = net.logits + evaluate(state, dataset.test_images[:, :, ::-1])
        mirrored = (both.argmax(1) == dataset.test_labels).mean()
        measured["mirrored_accuracy"] = np.array(mirrored, np.float32)
    progress(3, 3)
    return measured


def _logits(
    program: Program, mesh: MeshShape, count: int, state: TrainState, images: np.ndarray
) -> np.ndarray:  # f32[N, classes]
    """Returns the logits of images, of `count` at a time: a test set's, for which the evaluation is
    compiled.
    """
    states = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * mesh.seed), state)
    states, labels = meshes.place(mesh, states, True), meshes.place(mesh, np.zeros(count, np.int32))
    parts = []
    for first in range(0, len(images), count):
        part = meshes.place(mesh, np.resize(images[first : first + count], (count, 32, 32, 3)))
        parts.append(meshes.fetch(evaluate_nets(program, mesh, states, part, labels).logits)[0])
    return np.concatenate(parts)[: len(images)]


def _of_layers(
    program: Program, initial: TrainState, state: TrainState, dataset: Dataset
) -> dict[str, np.ndarray]:
    """Returns the activations before and after each norm, how similar images are there, and the
    norms of the gradients of the kernels; of the last two also before training.
    """
    looked_at = dataset.train_images[:LOOKED_AT], dataset.train_labels[:LOOKED_AT]
    images, labels = jax.device_put(looked_at)
    (seen_before, gradients_before), (seen, gradients) = jax.device_get(
        [look(program, each, images, labels) for each in (initial, state)]
    )
    layers, kernels = _in_order(program, seen), _in_order(program, gradients)
    before, after = (
        [(values.mean(), values.std()) for values in side]
        for side in zip(*(seen[name] for name in layers), strict=True)
    )
    name = program.model.norm
    attends = any(layer.attends for layer in program.model.table)
    relu = not attends and not (name in NORMS and NORMS[name].activates)
    similarities = [[similarity(of[n][1], relu) for n in layers] for of in (seen_before, seen)]
    return {
        "layers": np.array(layers),
        "before": np.array(before, np.float32),
        "after": np.array(after, np.float32),
        "similarities": np.array(similarities, np.float32),
        "kernels": np.array(kernels),
        "gradients": np.array([gradients[name] for name in kernels], np.float32),
        "initial_gradients": np.array([gradients_before[n] for n in kernels], np.float32),
    }


def _in_order(program: Program, names: Iterable[str]) -> list[str]:
    """Returns layers as the net has them; what a compiled function returns is sorted by name."""
    order = [layer.name for layer in program.model.table]
    return sorted(names, key=order.index)


def _of_batches(
    program: Program,
    state: TrainState,
    dataset: Dataset,
    logits: np.ndarray,
    evaluate: Callable[[TrainState, np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Returns the accuracies by the statistics of batches, of all images, and of training."""
    sizes = [size for size in SIZES if size <= len(dataset.test_labels)]
    largest = max(sizes, default=1)
    tested = min(TESTED, len(dataset.test_labels)) // largest * largest
    images, labels = dataset.test_images[:tested], dataset.test_labels[:tested]
    running = precise = (logits[:tested].argmax(1) == labels).mean()
    accuracies = [running] * len(sizes)
    if jax.tree.leaves(state.norm_state):  # else there are no statistics of a batch
        test = jax.device_put((images, labels))
        accuracies = [batch_accuracy(program, state, *test, size) for size in sizes]
    if program.model.norm == "batch":  # what a norm of the user's own averages is not known
        count = min(largest, len(dataset.train_labels))
        whole = dataset.train_images[: len(dataset.train_labels) // count * count]
        statistics = precise_statistics(program, state, whole.reshape(-1, count, 32, 32, 3))
        precise_logits = evaluate(state._replace(norm_state=statistics), images)
        precise = (precise_logits.argmax(1) == labels).mean()
    return {
        "sizes": np.array(sizes, np.int32),
        "batch_accuracy": np.array(accuracies, np.float32),
        "running_accuracy": np.array(running, np.float32),
        "precise_accuracy": np.array(precise, np.float32),
        "tested": np.array(tested, np.int32),
    }


def _apply(
    program: Program,
    state: TrainState,
    inputs: jax.Array,
    capture: bool = False,
    dropout: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Returns logits of standardized images as in training, with dropout if there is a key for it,
    and what was captured. What a norm of the user's own draws in training is drawn by one key.
    """
    mutable = [*state.norm_state, "intermediates"]
    options = {"train": True, "capture_intermediates": capture, "mutable": mutable}
    model, key = program.model, dropout
    if key is None:
        model, key = model.clone(dropout=0.0), jax.random.key(0)
    return model.apply(state.variables, inputs, rngs={"dropout": key}, **options)
