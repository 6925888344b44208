"""Training and evaluation as pure functions: arrays in, arrays out.

Random keys are derived and never carried: `key(seed)`, then the purpose, the epoch and the step. So
epoch 7 of a resumed run sees the images in the same order, under the same dropout masks, as epoch 7
of an unbroken one; and none of it depends on the norm.

On a CPU, devices that share a batch (`Recipe.devices`) each train on their part, and where images
know nothing of each other (all norms but batch norm) on a few of these at a time, which a core's
cache holds. Gradients and batch norm's statistics are those of the whole batch.

The data stays on the device as uint8. An epoch is one compiled loop (`lax.fori_loop`, the loop that
`lax.scan` becomes) with bounds given at run time, so that a caller who shows progress runs it in
pieces without compiling twice, and gets the same bits. The ragged last batch is trained on, as in
the study.
"""

import contextlib
import itertools
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import ops
from jaxnorm.model import CNN, activation_bytes

EVALUATION_BATCH = 100
SHARE = 16
"""The fewest images of a batch that are worth a device."""
AXIS = "batch"
"""The mesh axis along which devices share a batch."""
_PURPOSES = {"init": 0, "order": 1, "dropout": 2}


@dataclass(frozen=True)
class Recipe:
    """What a compiled step depends on besides the shapes of its arrays; hashable, so that one
    recipe is traced once.

    `mean` and `deviation` standardize each of the three channels of an image scaled to [0, 1]. Of
    the devices that there are, the first `devices` share each batch.
    """

    model: CNN
    learning_rate: float
    momentum: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    devices: int = 1

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


def use_all_cores() -> None:
    """Makes every core of the CPU a JAX device of its own, so that cores can share batches.

    Two cores that each take half of a batch are a quarter faster than two that share each operator.
    To be called before anything else of JAX: a JAX that has started keeps the devices it has, and
    so does one whose `XLA_FLAGS` say how many.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores)


def devices_for(batch_size: int) -> int:
    """How many devices share a batch: as many CPU cores as divide it into enough images each."""
    if jax.default_backend() != "cpu":
        return 1
    counts = range(jax.local_device_count(), 1, -1)
    fits = (n for n in counts if batch_size % n == 0 and batch_size // n >= SHARE)
    return next(fits, 1)


def mesh(devices: int) -> Mesh:
    """The first `devices` devices in a row."""
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def replicate(recipe: Recipe, arrays: Any) -> Any:
    """Copies arrays to every device of a recipe, once and for all."""
    if recipe.devices == 1:
        return jax.tree.map(jnp.asarray, arrays)
    return jax.device_put(arrays, NamedSharding(mesh(recipe.devices), P()))


def stack_seeds(trees: list[Any]) -> Any:
    """The arrays of several seeds, with a new leading axis; of one seed as they are."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *each: jnp.stack(each), *trees)


def unstack_seeds(tree: Any, count: int) -> list[Any]:
    """Undoes `stack_seeds`."""
    if count == 1:
        return [tree]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


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


# Runs once, and XLA's optimizer takes four seconds over the random bits, for the same values.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
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
    axis: str | None = None,
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
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, batch_stats, opt_state), loss, hits


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

    devices = recipe.devices
    shared = devices > 1 and batches.shape[1] % devices == 0
    share = batches.shape[1] // devices if shared else batches.shape[1]

    def train_on(state, images, labels, batches, dropout_key, first, start, stop):
        """What each device does."""

        def body(i, carry):
            """One batch."""
            state, losses, correct = carry
            mine = lax.axis_index(AXIS) * share if shared else 0
            rows = lax.dynamic_slice_in_dim(batches[i], mine, share)
            key = jax.random.fold_in(dropout_key, first + i)
            state, loss, hits = train_step(
                recipe, state, images[rows], labels[rows], key, AXIS if shared else None
            )
            return state, losses.at[i].set(loss), correct + hits

        nothing = (jnp.zeros(batches.shape[0], jnp.float32), jnp.zeros((), jnp.int32))
        return lax.fori_loop(start, stop, body, (state, *nothing))

    if devices > 1:
        train_on = jax.shard_map(
            train_on, mesh=mesh(devices), in_specs=P(), out_specs=P(), check_vma=False
        )
    state, losses, correct = train_on(
        state, images, labels, batches, dropout_key, first, start, stop
    )
    return state, Steps(losses, correct)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_seeds(
    recipe: Recipe,
    states: TrainState,  # every array with a leading axis K
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batches: jax.Array,  # i32[K, S, B]
    dropout_keys: jax.Array,  # [K]
    first: int | jax.Array,
    start: int | jax.Array,
    stop: int | jax.Array,
) -> tuple[TrainState, Steps]:
    """`train_steps` for K seeds in one program; what it returns has the leading axis too.

    For accelerators. On a CPU it takes longer than one seed after the other.
    """
    axes = (0, None, None, 0, 0, None, None, None)
    return jax.vmap(partial(train_steps, recipe), axes)(
        states, images, labels, batches, dropout_keys, first, start, stop
    )


def seeds_at_once(recipe: Recipe, batch_size: int) -> int:
    """How many seeds to train in one program: one on a CPU, elsewhere what half of the memory
    holds.
    """
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    # Forward and backward keep some six arrays of the size of each layer's output.
    return max(1, memory // 2 // (6 * batch_size * activation_bytes(recipe.model, all_layers=True)))


class Piece(NamedTuple):
    """A piece of an epoch, ready for `train_steps`: all full batches share one array, so all their
    pieces share one compilation.
    """

    batches: jax.Array  # i32[S, B]
    first: int
    start: int
    stop: int


def epoch_pieces(
    seed: int | jax.Array,
    epoch: int | jax.Array,
    rows: jax.Array,  # i32[N], the images to train on
    batch_size: int,
    pieces: int = 1,
) -> list[Piece]:
    """Cuts an epoch over these images into about `pieces` pieces of full batches, and one of the
    ragged last batch if there is one.
    """
    count = rows.shape[0]
    order = rows[epoch_order(seed, epoch, count)]
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

    def logits(params, batch_stats, images):
        """Images, standardized, through the net, a batch at a time."""

        def of_batch(batch):
            """One batch."""
            variables = {"params": params, "batch_stats": batch_stats}
            return recipe.model.apply(variables, standardize(recipe, batch))

        size = -(-images.shape[0] // -(-images.shape[0] // EVALUATION_BATCH))
        full = images.shape[0] // size * size
        parts = []
        if full:
            batches = images[:full].reshape(-1, size, *images.shape[1:])
            parts.append(lax.map(of_batch, batches).reshape(full, -1))
        if full < images.shape[0]:
            parts.append(of_batch(images[full:]))
        return jnp.concatenate(parts)

    count, devices = images.shape[0], recipe.devices
    if count == 0:
        return jnp.zeros((0, recipe.model.num_classes))
    shared = count // devices * devices if devices > 1 else 0
    parts = []
    if shared:
        split = jax.shard_map(
            logits,
            mesh=mesh(devices),
            in_specs=(P(), P(), P(AXIS)),
            out_specs=P(AXIS),
            check_vma=False,
        )
        parts.append(split(params, batch_stats, images[:shared]))
    if shared < count:
        parts.append(logits(params, batch_stats, images[shared:]))
    return jnp.concatenate(parts)


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


@partial(jax.jit, static_argnums=0)
def evaluate_seeds(
    recipe: Recipe, states: TrainState, images: jax.Array, labels: jax.Array
) -> Evaluation:
    """`evaluate` for K seeds in one program, on the same images, or on K sets of them where
    `images` and `labels` have the leading axis too.
    """
    own = 0 if labels.ndim == 2 else None
    return jax.vmap(partial(evaluate, recipe), (0, own, own))(states, images, labels)
