"""One training step as a pure function: arrays in, arrays out.

Random keys are derived and never carried: the seed, then the purpose, the epoch and the step. So
epoch 7 of a resumed run sees the images in the same order, under the same dropout masks, as epoch 7
of an unbroken one; and none of it depends on the norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxnorm.config import Optimizer
from jaxnorm.model.cnn import CNN
from jaxnorm.model.summary import micro_batch

_PURPOSES = {"init": 0, "order": 1, "dropout": 2, "augment": 3}
MUON_MOMENTUM = 0.6
"""The share of its old value that Muon's moment of a kernel's gradients keeps at a step."""
_KERNEL = jax.tree_util.DictKey("kernel")
Purpose = Literal["init", "order", "dropout", "augment"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """The model and the optimizer's settings: what a compiled step depends on besides its arrays.

    It can be hashed, so that JAX traces a step once for each program.
    """

    model: CNN
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    augments: bool = False
    label_smoothing: float = 0.0

    def transformation(
        self, learning_rate: float | jax.Array, weight_decay: float | jax.Array = 0.0
    ) -> optax.GradientTransformation:
        """Returns the optimizer as Optax's; see `Config` for what its settings mean."""
        decay = optax.add_decayed_weights(jnp.asarray(weight_decay), mask=_is_kernel)
        match self.optimizer:
            case "sgd":
                return optax.chain(decay, optax.sgd(learning_rate, self.momentum, self.nesterov))
            case "adamw":
                step = optax.scale_by_learning_rate(learning_rate)
                return optax.chain(optax.scale_by_adam(), decay, step)
        orthogonal = optax.contrib.scale_by_muon(
            beta=MUON_MOMENTUM,
            weight_dimension_numbers=partial(jax.tree.map, lambda _: _MATRIX),
        )
        as_long = optax.stateless(_as_long_as_the_kernel)
        step = optax.scale_by_learning_rate(learning_rate)
        return optax.partition(
            {
                True: optax.chain(orthogonal, as_long, decay, step),
                False: optax.sgd(2 * learning_rate, self.momentum, self.nesterov),
            },
            _is_kernel,
        )


_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
"""Muon takes a kernel f32[h, w, in, out] as a matrix f32[h * w * in, out]."""


def _as_long_as_the_kernel(updates: Any, kernels: Any) -> Any:
    """Scales orthogonal updates, each as long as the root of its rank, to the kernels' lengths."""
    return jax.tree.map(
        lambda update, kernel: (
            update * jnp.linalg.norm(kernel.ravel()) / math.sqrt(kernel.shape[-1])
        ),
        updates,
        kernels,
    )


def _is_kernel(params: Any) -> Any:
    """Marks the kernels of the net's own layers; a norm's parameters may be any kind of tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _KERNEL in path and not path[0].key.endswith("_norm"), params
    )


class TrainState(NamedTuple):
    """The arrays that training carries from step to step."""

    params: Any
    norm_state: Any
    """The collections of variables that norms keep, such as `batch_stats`; empty without any."""
    opt_state: Any
    standard: Any
    """f32[2, 3]: what images are standardized with (see `standard_of`)."""

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `CNN.apply` takes to evaluate the net."""
        return {"params": self.params, **self.norm_state}


def derive_key(seed: int | jax.Array, purpose: Purpose, *numbers: int | jax.Array) -> jax.Array:
    """Returns the random key of a purpose. `numbers` is empty for "init", the epoch (from 1) for
    "order", and the epoch and the step (from 0) for "dropout" and "augment".
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _PURPOSES[purpose])
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def standard_of(mean: Sequence[float], deviation: Sequence[float]) -> np.ndarray:  # f32[2, 3]
    """Returns what `standardize` takes, from the statistics of images scaled to [0, 1]."""
    return np.stack([255 * np.array(mean), 1 / (255 * np.array(deviation))]).astype(np.float32)


def standardize(
    state: TrainState, images: jax.Array
) -> jax.Array:  # u8[N, 32, 32, 3] -> f32[N, 32, 32, 3]
    """Subtracts the mean of each channel and divides by its deviation.

    Written as a difference and then a product, which round alike in every program: a product and
    then a difference are rounded once or twice, as XLA joins them or not.
    """
    chex.assert_shape(images, (None, 32, 32, 3))
    chex.assert_type(images, jnp.uint8)
    mean, factor = jnp.reshape(state.standard, (2, 1, 1, 1, 3))
    return (images.astype(jnp.float32) - mean) * factor


# Runs once, and XLA's optimizer takes four seconds over the random bits, for the same values.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def init_state(
    program: Program,
    seed: int | jax.Array,
    standard: jax.Array | np.ndarray,  # f32[2, 3], see `standard_of`
) -> TrainState:
    """Returns the state before the first step.

    Kernels depend on the seed and the layer's name alone, not on the norm.
    """
    variables = dict(program.model.init(derive_key(seed, "init"), jnp.zeros((1, 32, 32, 3))))
    params = variables.pop("params")
    return TrainState(
        params, variables, program.transformation(0.0).init(params), jnp.asarray(standard)
    )


def crop_and_flip(
    key: jax.Array, count: int, most: int = 2
) -> tuple[jax.Array, jax.Array]:  # i32[count, 32], i32[count, 32]
    """Returns the rows and columns of which to make each of `count` images: moved by up to `most`
    pixels each way, reflected at the edges, and half of the images mirrored.
    """
    for_rows, for_columns, for_mirrors = jax.random.split(key, 3)
    pixels = jnp.arange(32, dtype=jnp.int32)[None]

    def moved(key: jax.Array) -> jax.Array:
        """Returns moved rows or columns; those over an edge are reflected at it."""
        places = jnp.abs(pixels + jax.random.randint(key, (count, 1), -most, most + 1))
        return 31 - jnp.abs(31 - places)

    mirrored, columns = jax.random.bernoulli(for_mirrors, 0.5, (count, 1)), moved(for_columns)
    return moved(for_rows), jnp.where(mirrored, columns[:, ::-1], columns)


def train_step(
    program: Program,
    state: TrainState,
    images: jax.Array,  # u8[B, 32, 32, 3]
    labels: jax.Array,  # i32[B]
    key: jax.Array,  # decides the dropout masks
    learning_rate: float | jax.Array,
    weight_decay: float | jax.Array = 0.0,
    axis: str | None = None,
    count: int | jax.Array | None = None,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Makes one step of the optimizer on the mean cross-entropy of a batch.

    Returns the new state, the loss f32[] before it, and the number of correct predictions i32[].
    With `axis`, the images are this device's part of a batch that all devices along that mesh axis
    share. With `count`, only the first `count` images of the batch are trained on, so that a ragged
    batch, filled up, takes the program of a full one; see `layers.takes_masks` for which norms.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    net, here = program.model.clone(axis_name=axis), labels.shape[0]
    batch_size, first_image = here, jnp.zeros((), jnp.int32)
    if axis is not None:
        batch_size, first_image = here * lax.axis_size(axis), here * lax.axis_index(axis)
    batch_size = batch_size if count is None else count

    def loss_of(params, images, labels, first_image):
        """Returns the images' share of the batch's mean loss; correct predictions, new state."""
        numbers = first_image + jnp.arange(labels.shape[0])
        mask = None if count is None else numbers < count
        logits, norm_state = net.apply(
            {"params": params, **state.norm_state},
            standardize(state, images),
            train=True,
            first_image=first_image,
            mask=mask,
            rngs={"dropout": key},
            mutable=list(state.norm_state),
        )
        if mask is not None:  # else an infinite derivative times zero would be no number
            logits = jnp.where(mask[:, None], logits, 0)
        losses = cross_entropy(logits, labels, program.label_smoothing)
        correct = logits.argmax(-1) == labels
        if mask is not None:
            losses, correct = jnp.where(mask, losses, 0), correct & mask
        return losses.sum() / batch_size, (correct.sum(dtype=jnp.int32), norm_state)

    size = micro_batch(net, here, updated=state.norm_state)
    differentiate = partial(jax.value_and_grad(loss_of, has_aux=True), state.params)
    if size == here:
        (loss, (correct, norm_state)), gradients = differentiate(images, labels, first_image)
        total = loss, correct, gradients
    else:  # of norms that keep no state: images know nothing of each other
        norm_state = state.norm_state

        def add_micro_batch(i, total):
            start = i * size
            part = (lax.dynamic_slice_in_dim(a, start, size) for a in (images, labels))
            (loss, (correct, _)), gradients = differentiate(*part, first_image + start)
            return jax.tree.map(jnp.add, total, (loss, correct, gradients))

        zeros = jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, state.params)
        trained_on = here if count is None else jnp.clip(count - first_image, 0, here)
        total = lax.fori_loop(0, -(-trained_on // size), add_micro_batch, zeros)

    loss, correct, gradients = total if axis is None else lax.psum(total, axis)
    optimizer = program.transformation(learning_rate, weight_decay)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, norm_state, opt_state, state.standard), loss, correct


def cross_entropy(
    logits: jax.Array,  # f32[N, classes]
    labels: jax.Array,  # i32[N]
    smoothing: float,
) -> jax.Array:  # f32[N]
    """Returns the cross-entropy of each image; `smoothing` of its label is spread over all
    classes (Szegedy et al., "Rethinking the Inception Architecture", 2016).
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, smooth)
