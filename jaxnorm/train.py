"""Training and evaluation as pure functions: arrays in, arrays out.

Random keys are derived and never carried: `key(seed)`, then the purpose, the epoch and the step. So
epoch 7 of a resumed run sees the images in the same order, under the same dropout masks, as epoch 7
of an unbroken one; and none of it depends on the norm.

Nets that differ in their seed and learning rate alone train in one program, spread over the rows
of the mesh that the recipe names; the bits of a net depend neither on its row nor on the others.
Devices that share a batch each train on their part, and where images know nothing of each other
(all norms but batch norm) on a CPU on a few of these at a time, which a core's cache holds.
Gradients and batch norm's statistics are those of the whole batch, so the result is that of one
device within rounding.

The data stays on the device as uint8. An epoch is one compiled loop (`lax.fori_loop`, the loop that
`lax.scan` becomes) with bounds given at run time, so that a caller who shows progress runs it in
pieces without compiling twice, and gets the same bits. The ragged last batch is trained on, as in
the study.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxnorm import devices, ops
from jaxnorm.devices import BATCH, ONE, SEED, Layout
from jaxnorm.model import CNN, activation_bytes

EVALUATION_BATCH = 100
_PURPOSES = {"init": 0, "order": 1, "dropout": 2}


@dataclass(frozen=True)
class Recipe:
    """What a compiled step depends on besides the shapes of its arrays; hashable, so that one
    recipe is traced once.

    `mean` and `deviation` standardize each of the three channels of an image scaled to [0, 1].
    `layout` is the mesh of devices to train on.
    """

    model: CNN
    learning_rate: float
    momentum: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    layout: Layout = ONE

    def optimizer(self, learning_rate: float | jax.Array) -> optax.GradientTransformation:
        """SGD with momentum; its state is one array for each parameter."""
        return optax.sgd(learning_rate, self.momentum)


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


def replicate(recipe: Recipe, arrays: Any) -> Any:
    """Copies arrays to every device of a recipe, once and for all."""
    return devices.place(recipe.layout, arrays)


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
    """Scales images to [0, 1], subtracts the mean and divides by the deviation of each channel.

    Written as a difference and then a product, which round alike in every program: a product and
    then a difference are rounded once or twice, as XLA joins them or not.
    """
    chex.assert_shape(images, (None, 32, 32, 3))
    chex.assert_type(images, jnp.uint8)
    mean, deviation = (
        255 * np.reshape(each, (1, 1, 1, 3)) for each in (recipe.mean, recipe.deviation)
    )
    return (images.astype(jnp.float32) - jnp.float32(mean)) * jnp.float32(1 / deviation)


# Runs once, and XLA's optimizer takes four seconds over the random bits, for the same values.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def init_state(recipe: Recipe, seed: int | jax.Array) -> TrainState:
    """The state before the first step.

    Kernels depend on the seed and the layer's name alone, not on the norm.
    """
    variables = recipe.model.init(derive_key(seed, "init"), jnp.zeros((1, 32, 32, 3)))
    params = variables["params"]
    opt_state = recipe.optimizer(recipe.learning_rate).init(params)
    return TrainState(params, variables.get("batch_stats", {}), opt_state)


def train_step(
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,  # u8[B, 32, 32, 3]
    labels: jax.Array,  # i32[B]
    key: jax.Array,  # decides the dropout masks
    axis: str | None = None,
    learning_rate: float | jax.Array | None = None,  # in place of the recipe's
) -> tuple[TrainState, jax.Array, jax.Array]:
    """One step of SGD on the mean cross-entropy of a batch.

    Returns the new state, the loss f32[] before it, and the number classified rightly i32[]. With
    `axis`, the images are this device's part of a batch that all devices along that mesh axis
    share.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    count = labels.shape[0]
    net, size, first = recipe.model, count, jnp.zeros((), jnp.int32)
    if axis is not None:
        net = net.clone(axis_name=axis)
        size, first = count * lax.axis_size(axis), count * lax.axis_index(axis)

    def objective(params, images, labels, first):
        """The part of the mean cross-entropy that these images give, and what else comes of it."""
        logits, updates = net.apply(
            {"params": params, "batch_stats": state.batch_stats},
            standardize(recipe, images),
            train=True,
            first=first,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (logits.argmax(-1) == labels).sum(dtype=jnp.int32)
        return losses.sum() / size, (hits, updates.get("batch_stats", {}))

    differentiate = jax.value_and_grad(objective, has_aux=True)
    piece = (
        ops.piece_of(count, activation_bytes(net))
        if net.norm != "batch" and not net.plain
        else count
    )

    def add_piece(i, total):
        """Adds what the images of one piece give; they know nothing of the others."""
        begin = i * piece
        cut = (lax.dynamic_slice_in_dim(array, begin, piece) for array in (images, labels))
        (loss, (hits, _)), gradients = differentiate(state.params, *cut, first + begin)
        return jax.tree.map(jnp.add, total, (loss, hits, gradients))

    batch_stats = state.batch_stats
    if piece == count:
        (loss, (hits, batch_stats)), gradients = differentiate(state.params, images, labels, first)
        total = loss, hits, gradients
    else:
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        nothing = (jnp.zeros(()), jnp.zeros((), jnp.int32), zeros)
        total = lax.fori_loop(0, count // piece, add_piece, nothing)
    loss, hits, gradients = total if axis is None else lax.psum(total, axis)
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    updates, opt_state = recipe.optimizer(rate).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, batch_stats, opt_state), loss, hits


def epoch_order(
    seed: int | jax.Array, epoch: int | jax.Array, count: int
) -> jax.Array:  # i32[count]
    """The order in which an epoch (from 1) takes the training images: a fresh shuffle for each."""
    return jax.random.permutation(derive_key(seed, "order", epoch), count).astype(jnp.int32)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_nets(
    recipe: Recipe,
    states: TrainState,  # every array with a leading axis K, a multiple of the mesh's rows
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batches: jax.Array,  # i32[K, S, B], rows of `images`
    dropout_keys: jax.Array,  # [K], of the epoch
    learning_rates: jax.Array,  # f32[K]
    first: int | jax.Array,  # the step's number in the epoch at batches[:, 0]
    start: int | jax.Array,
    stop: int | jax.Array,
) -> tuple[TrainState, Steps]:
    """Trains K nets on their batches[:, start:stop] in one compiled loop.

    `states` is consumed: its memory is used again. What is returned has the leading axis too.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    chex.assert_equal_shape_prefix([batches, dropout_keys, learning_rates], 1)
    chex.assert_rank(batches, 3)
    chex.assert_type([labels, batches], jnp.int32)
    share = batches.shape[2] // recipe.layout.batch
    shared = recipe.layout.batch > 1 and batches.shape[2] % recipe.layout.batch == 0

    def train_on(images, labels, first, start, stop, state, batches, dropout_key, learning_rate):
        """What each device does for one net."""

        def body(i, carry):
            """One batch."""
            state, losses, correct = carry
            rows = batches[i]
            if shared:
                rows = lax.dynamic_slice_in_dim(rows, lax.axis_index(BATCH) * share, share)
            key = jax.random.fold_in(dropout_key, first + i)
            state, loss, hits = train_step(
                recipe,
                state,
                images[rows],
                labels[rows],
                key,
                BATCH if shared else None,
                learning_rate,
            )
            return state, losses.at[i].set(loss), correct + hits

        nothing = (jnp.zeros(batches.shape[0], jnp.float32), jnp.zeros((), jnp.int32))
        return lax.fori_loop(start, stop, body, (state, *nothing))

    state, losses, correct = _each_net(
        recipe.layout,
        train_on,
        (images, labels, first, start, stop),
        (states, batches, dropout_keys, learning_rates),
    )
    return state, Steps(losses, correct)


def _each_net(layout: Layout, function: Callable, common: tuple, own: tuple) -> Any:
    """Calls `function(*common, *own)` for each net, whose parts lie along the leading axis of
    `own`; each row of the mesh takes as many nets. The results have that axis too.
    """

    def on_row(common, own):
        """What one row of devices does: a net alone as if it were alone in the world."""
        if jax.tree.leaves(own)[0].shape[0] > 1:
            return jax.vmap(function, (*[None] * len(common), *[0] * len(own)))(*common, *own)
        result = function(*common, *jax.tree.map(lambda leaf: leaf[0], own))
        return jax.tree.map(lambda leaf: leaf[None], result)

    if layout.devices > 1:
        on_row = jax.shard_map(
            on_row,
            mesh=layout.mesh,
            in_specs=(P(), P(SEED)),
            out_specs=P(SEED),
            check_vma=False,
        )
    return on_row(common, own)


def _alone(tree: Any) -> Any:
    """One net's arrays with a leading axis of one."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _only(tree: Any) -> Any:
    """Undoes `_alone`."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


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
    """Trains one net on batches[start:stop]: `train_nets` of one.

    `state` is consumed: its memory is used again.
    """
    chex.assert_rank(batches, 2)
    own = _alone((batches, dropout_key, jnp.float32(recipe.learning_rate)))
    trained = train_nets(recipe, _alone(state), images, labels, *own, first, start, stop)
    return _only(trained)


def nets_at_once(recipe: Recipe, batch_size: int) -> int:
    """How many nets a row of devices trains at the same time: one on a CPU, where one after the
    other is faster, elsewhere what half of a device's memory holds.
    """
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    # Forward and backward keep some six arrays of the size of each layer's output.
    return max(1, memory // 2 // (6 * batch_size * activation_bytes(recipe.model, all_layers=True)))


class Piece(NamedTuple):
    """A piece of an epoch, ready for `train_steps` or `train_nets`: all full batches share one
    array, so all their pieces share one compilation.
    """

    batches: jax.Array  # i32[S, B], or i32[K, S, B] of K nets
    first: int
    start: int
    stop: int


def _cut(full: jax.Array, ragged: jax.Array, pieces: int) -> list[Piece]:
    """Cuts full batches [..., S, B] into about so many pieces; the ragged batch is one more, if it
    holds anything.
    """
    count = full.shape[-2]
    edges = sorted({round(count * i / pieces) for i in range(pieces + 1)})
    cut = [Piece(full, 0, start, stop) for start, stop in itertools.pairwise(edges)]
    return [*cut, Piece(ragged, count, 0, 1)] if ragged.shape[-1] else cut


def _batches(
    seed: int | jax.Array, epoch: int | jax.Array, rows: jax.Array, batch_size: int
) -> tuple[jax.Array, jax.Array]:  # i32[S, B] and i32[1, what is left]
    order = rows[epoch_order(seed, epoch, rows.shape[0])]
    full = rows.shape[0] // batch_size * batch_size
    return order[:full].reshape(-1, batch_size), order[full:][None]


def epoch_pieces(
    seed: int | jax.Array,
    epoch: int | jax.Array,
    rows: jax.Array,  # i32[N], the images to train on
    batch_size: int,
    pieces: int = 1,
) -> list[Piece]:
    """Cuts a net's epoch over these images into about `pieces` pieces of full batches, and one of
    the ragged last batch if there is one.
    """
    return _cut(*_batches(seed, epoch, rows, batch_size), pieces)


@partial(jax.jit, static_argnums=(0, 4))
def _batches_of_nets(
    recipe: Recipe, seeds: jax.Array, epoch: int | jax.Array, rows: jax.Array, batch_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def of_net(epoch, seed, rows):
        """One net's batches and dropout key."""
        batches = _batches(seed, epoch, rows, batch_size)
        return *batches, derive_key(seed, "dropout", epoch)

    return _each_net(recipe.layout, of_net, (epoch,), (seeds, rows))


def epoch_of_nets(
    recipe: Recipe,
    seeds: jax.Array,  # u32[K]
    epoch: int | jax.Array,
    rows: jax.Array,  # i32[K, N], the images to train each net on
    batch_size: int,
    pieces: int = 1,
) -> tuple[list[Piece], jax.Array]:
    """The same of K nets, for `train_nets`: the pieces, and the dropout keys [K] of the epoch."""
    full, ragged, keys = _batches_of_nets(recipe, seeds, epoch, rows, batch_size)
    return _cut(full, ragged, pieces), keys


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
    for piece in epoch_pieces(seed, epoch, jnp.arange(labels.shape[0]), batch_size):
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
    of_net = partial(_logits, recipe)
    return _only(_each_net(recipe.layout, of_net, (images,), _alone((params, batch_stats))))


def _logits(recipe: Recipe, images: jax.Array, params: Any, batch_stats: Any) -> jax.Array:
    """What each device does for one net: its share of the images, and all logits of the row."""

    def of_batch(batch):
        """One batch, standardized, through the net."""
        variables = {"params": params, "batch_stats": batch_stats}
        return recipe.model.apply(variables, standardize(recipe, batch))

    def of_part(images):
        """Any number of images, a batch at a time."""
        count = images.shape[0]
        size = -(-count // -(-count // EVALUATION_BATCH))
        full = count // size * size
        parts = []
        if full:
            batches = images[:full].reshape(-1, size, *images.shape[1:])
            parts.append(lax.map(of_batch, batches).reshape(full, -1))
        if full < count:
            parts.append(of_batch(images[full:]))
        return jnp.concatenate(parts)

    count, sharers = images.shape[0], recipe.layout.batch
    if count == 0:
        return jnp.zeros((0, recipe.model.num_classes))
    share, parts = count // sharers, []
    if share and sharers > 1:
        mine = lax.dynamic_slice_in_dim(images, lax.axis_index(BATCH) * share, share)
        parts.append(lax.all_gather(of_part(mine), BATCH, tiled=True))
        images = images[share * sharers :]
    if images.shape[0]:
        parts.append(of_part(images))
    return jnp.concatenate(parts)


@partial(jax.jit, static_argnums=0)
def evaluate_nets(
    recipe: Recipe,
    states: TrainState,  # every array with a leading axis K
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    rows: jax.Array | None = None,  # i32[K, M]
) -> Evaluation:
    """Loss and accuracy of K nets over exactly these N images, or each over its own rows of them:
    summed over all, divided once. What is returned has the leading axis too.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)

    def of_net(images, labels, params, batch_stats, *rows):
        """One net."""
        if rows:
            images, labels = images[rows[0]], labels[rows[0]]
        logits, count = _logits(recipe, images, params, batch_stats), labels.shape[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return Evaluation(logits, losses.sum() / count, (logits.argmax(-1) == labels).sum() / count)

    own = (states.params, states.batch_stats, *([] if rows is None else [rows]))
    return _each_net(recipe.layout, of_net, (images, labels), own)


@partial(jax.jit, static_argnums=0)
def evaluate(
    recipe: Recipe,
    state: TrainState,
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
) -> Evaluation:
    """Loss and accuracy of one net over exactly these N images: `evaluate_nets` of one."""
    return _only(evaluate_nets(recipe, _alone(state), images, labels))
