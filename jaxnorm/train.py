"""Training and evaluation as pure functions: arrays in, arrays out.

Random keys are derived and never carried: `key(seed)`, then the purpose, the epoch and the step. So
epoch 7 of a resumed run sees the images in the same order, under the same dropout masks, as epoch 7
of an unbroken one; and none of it depends on the norm.

The data stays on the device as uint8. An epoch is one compiled loop (`lax.fori_loop`, the loop that
`lax.scan` becomes) with bounds given at run time, so that a caller who shows progress runs it in
pieces without compiling twice, and gets the same bits. The ragged last batch is trained on, as in
the study.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnorm.model import CNN

EVALUATION_BATCH = 500
_PURPOSES = {"init": 0, "order": 1, "dropout": 2}


@dataclass(frozen=True)
class Recipe:
    """What a compiled step depends on besides the shapes of its arrays; hashable, so that one
    recipe is traced once.

    `mean` and `deviation` standardize each of the three channels of an image scaled to [0, 1].
    """

    model: CNN
    learning_rate: float
    momentum: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """SGD with momentum; its state is one array for each parameter."""
        return optax.sgd(self.learning_rate, self.momentum)


class TrainState(NamedTuple):
    """All that training carries from step to step: arrays alone."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Steps(NamedTuple):
    """What a piece of an epoch did: the mean loss of each batch, and how many images were
    classified rightly.
    """

    losses: jax.Array  # f32[S], 0 outside the piece
    correct: jax.Array  # i32[]


class Evaluation(NamedTuple):
    """A net on a whole set of images."""

    logits: jax.Array  # f32[N, classes]
    loss: jax.Array  # f32[], mean cross-entropy
    accuracy: jax.Array  # f32[], a fraction


def derive_key(
    seed: int | jax.Array, purpose: Literal["init", "order", "dropout"], *numbers: int | jax.Array
) -> jax.Array:
    """The random key of a purpose; for "order" and "dropout" `numbers` is the epoch (from 1), for
    "dropout" then the step (from 0).
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _PURPOSES[purpose])
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def standardize(
    recipe: Recipe, images: jax.Array
) -> jax.Array:  # u8[N, 32, 32, 3] -> f32[N, 32, 32, 3]
    """Scales images to [0, 1], subtracts the mean and divides by the deviation of each channel."""
    chex.assert_shape(images, (None, 32, 32, 3))
    chex.assert_type(images, jnp.uint8)
    channels = (1, 1, 1, 3)
    mean = jnp.array(recipe.mean, jnp.float32).reshape(channels)
    deviation = jnp.array(recipe.deviation, jnp.float32).reshape(channels)
    return (images.astype(jnp.float32) / 255 - mean) / deviation


@partial(jax.jit, static_argnums=0)
def init_state(recipe: Recipe, seed: int | jax.Array) -> TrainState:
    """The state before the first step.

    Kernels depend on the seed and the layer's name alone, not on the norm.
    """
    variables = recipe.model.init(derive_key(seed, "init"), jnp.zeros((1, 32, 32, 3)))
    params = variables["params"]
    return TrainState(params, variables.get("batch_stats", {}), recipe.optimizer.init(params))


def train_step(
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,  # u8[B, 32, 32, 3]
    labels: jax.Array,  # i32[B]
    key: jax.Array,  # decides the dropout masks
) -> tuple[TrainState, jax.Array, jax.Array]:
    """One step of SGD on the mean cross-entropy of a batch.

    Returns the new state, the loss f32[] before it, and the number classified rightly i32[].
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    inputs = standardize(recipe, images)

    def objective(params):
        """The mean cross-entropy, and what else the step gives."""
        logits, updates = recipe.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            inputs,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, updates.get("batch_stats", {}))

    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(objective, has_aux=True)(
        state.params
    )
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    correct = (logits.argmax(-1) == labels).sum(dtype=jnp.int32)
    return (
        TrainState(optax.apply_updates(state.params, updates), batch_stats, opt_state),
        loss,
        correct,
    )


def epoch_order(
    seed: int | jax.Array, epoch: int | jax.Array, count: int
) -> jax.Array:  # i32[count]
    """The order in which an epoch (from 1) takes the training images: a fresh shuffle for each."""
    return jax.random.permutation(derive_key(seed, "order", epoch), count).astype(jnp.int32)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_steps(
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batches: jax.Array,  # i32[S, B], rows of `images`
    dropout_key: jax.Array,  # of the epoch
    first: int | jax.Array,  # the step's number in the epoch at batches[0]
    start: int | jax.Array,
    stop: int | jax.Array,
) -> tuple[TrainState, Steps]:
    """Trains on batches[start:stop] in one compiled loop.

    `state` is consumed: its memory is used again.
    """

    chex.assert_equal_shape_prefix([images, labels], 1)
    chex.assert_rank(batches, 2)
    chex.assert_type([labels, batches], jnp.int32)

    def body(i, carry):
        """One batch."""
        state, losses, correct = carry
        rows = batches[i]
        key = jax.random.fold_in(dropout_key, first + i)
        state, loss, hits = train_step(recipe, state, images[rows], labels[rows], key)
        return state, losses.at[i].set(loss), correct + hits

    nothing = (jnp.zeros(batches.shape[0], jnp.float32), jnp.zeros((), jnp.int32))
    state, losses, correct = lax.fori_loop(start, stop, body, (state, *nothing))
    return state, Steps(losses, correct)


class Piece(NamedTuple):
    """A piece of an epoch, ready for `train_steps`: all full batches share one array, so all their
    pieces share one compilation.
    """

    batches: jax.Array  # i32[S, B]
    first: int
    start: int
    stop: int


def epoch_pieces(
    seed: int | jax.Array, epoch: int | jax.Array, count: int, batch_size: int, pieces: int = 1
) -> list[Piece]:
    """Cuts an epoch over `count` images into about `pieces` pieces of full batches, and one of the
    ragged last batch if there is one.
    """
    order = epoch_order(seed, epoch, count)
    full = count // batch_size
    batches = order[: full * batch_size].reshape(full, batch_size)
    edges = sorted({round(full * i / pieces) for i in range(pieces + 1)})
    cut = [Piece(batches, 0, start, stop) for start, stop in itertools.pairwise(edges)]
    if count % batch_size:
        cut.append(Piece(order[full * batch_size :][None], full, 0, 1))
    return cut


def train_epoch(
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    seed: int | jax.Array,
    epoch: int | jax.Array,
    batch_size: int,
) -> tuple[TrainState, Steps]:
    """Trains on every image once, in the epoch's own order.

    `state` is consumed. Returns the loss of each of the ceil(N / batch_size) batches.
    """
    done = []
    for piece in epoch_pieces(seed, epoch, labels.shape[0], batch_size):
        state, steps = train_steps(
            recipe,
            state,
            images,
            labels,
            piece.batches,
            derive_key(seed, "dropout", epoch),
            *piece[1:],
        )
        done.append(steps)
    return state, Steps(
        jnp.concatenate([steps.losses for steps in done]),
        jnp.stack([steps.correct for steps in done]).sum(),
    )


@partial(jax.jit, static_argnums=0)
def predict_logits(
    recipe: Recipe, params: Any, batch_stats: Any, images: jax.Array
) -> jax.Array:  # f32[N, classes]
    """Logits of any number of u8[N, 32, 32, 3] images, with running averages, without dropout."""

    def logits(batch):
        """A batch, standardized, through the net."""
        return recipe.model.apply(
            {"params": params, "batch_stats": batch_stats}, standardize(recipe, batch)
        )

    full = images.shape[0] // EVALUATION_BATCH * EVALUATION_BATCH
    parts = []
    if full:
        batches = images[:full].reshape(-1, EVALUATION_BATCH, *images.shape[1:])
        parts.append(lax.map(logits, batches).reshape(full, -1))
    if full < images.shape[0]:
        parts.append(logits(images[full:]))
    return jnp.concatenate(parts) if parts else jnp.zeros((0, recipe.model.num_classes))


@partial(jax.jit, static_argnums=0)
def evaluate(
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
) -> Evaluation:
    """Loss and accuracy over exactly these N images: summed over all, divided once."""
    chex.assert_equal_shape_prefix([images, labels], 1)
    logits = predict_logits(recipe, state.params, state.batch_stats, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    count = labels.shape[0]
    return Evaluation(logits, losses.sum() / count, (logits.argmax(-1) == labels).sum() / count)
