"""An epoch of K nets as one compiled loop, and their evaluation.

The data stays on the device as uint8. Nets that differ in their seed and learning rate alone train
in one program, spread over the rows of the mesh; the bits of a net depend neither on its row nor on
the others. An epoch is a `lax.fori_loop` with bounds given at run time, so that a caller that
shows progress runs it in chunks without compiling twice, and gets the same bits. The ragged last
batch is trained on, as in the study.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxnorm.model.cnn import CNN
from jaxnorm.model.summary import activation_bytes, micro_batch
from jaxnorm.training.mesh import BATCH, SEED, MeshShape
from jaxnorm.training.step import (
    Program,
    TrainState,
    crop_and_flip,
    derive_key,
    standardize,
    train_step,
)

EVALUATION_BATCH = 128
"""Images evaluated at a time, on a CPU in micro-batches."""


class Steps(NamedTuple):
    """The result of a chunk of an epoch: the mean loss of each batch, and the number of correct
    predictions.
    """

    losses: jax.Array  # f32[K, S], 0 outside the chunk
    correct: jax.Array  # i32[K]


class Evaluation(NamedTuple):
    """The result of K nets on a whole set of N images."""

    logits: jax.Array  # f32[K, N, classes]
    loss: jax.Array  # f32[K], mean cross-entropy
    accuracy: jax.Array  # f32[K], a fraction


class Chunk(NamedTuple):
    """A part of an epoch, ready for `train_nets`: all batches share one array, the ragged last one
    filled up, so all chunks share one compilation.

    The ragged batch of a norm that takes no masks (`layers.takes_masks`) is an array and a
    compilation of its own.
    """

    batches: jax.Array  # i32[K, S, B]
    last: int | None
    """How many images of the last batch count; None: all, and the program knows it."""
    first_step: int
    """The step's number in the epoch at batches[:, 0]."""
    start: int
    stop: int


def epoch_order(
    seed: int | jax.Array, epoch: int | jax.Array, count: int
) -> jax.Array:  # i32[count]
    """Returns the order in which an epoch (from 1) takes the training images: a fresh shuffle."""
    return jax.random.permutation(derive_key(seed, "order", epoch), count).astype(jnp.int32)


def epoch_keys(seed: int | jax.Array, epoch: int | jax.Array) -> jax.Array:  # [2]
    """Returns the keys of an epoch's dropout and of its augmentation."""
    return jnp.stack([derive_key(seed, "dropout", epoch), derive_key(seed, "augment", epoch)])


@partial(jax.jit, static_argnums=(0, 1))
def _batches(
    mesh: MeshShape,
    cut: tuple[int, bool],
    seeds: jax.Array,
    epoch: int | jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # i32[K, S, B], i32[K, 0 or 1, R], [K, 2]
    """Returns the batches of an epoch, the ragged one filled with the epoch's first images or apart
    from them; and its keys.
    """
    batch_size, fill = cut

    def of_net(epoch, seed, rows):
        order = rows[epoch_order(seed, epoch, rows.shape[0])]
        if fill:
            order = jnp.pad(order, (0, -len(order) % batch_size), mode="wrap")
        whole = len(order) // batch_size * batch_size
        full, ragged = order[:whole].reshape(-1, batch_size), order[None, whole:]
        return full, ragged, epoch_keys(seed, epoch)

    return _for_each_net(mesh, of_net, (epoch,), (seeds, rows))


def epoch_chunks(
    mesh: MeshShape,
    seeds: jax.Array,  # u32[K]
    epoch: int | jax.Array,
    rows: jax.Array,  # i32[K, N], the images to train each net on
    batch_size: int,
    chunks: int = 1,
    fill: bool = True,
) -> tuple[list[Chunk], jax.Array]:
    """Cuts an epoch of K nets into about `chunks` chunks, and a ragged last batch into one of its
    own unless it is to `fill` up. Also returns the epoch's keys [K, 2], of dropout and
    augmentation.
    """
    full, ragged, keys = _batches(mesh, (batch_size, fill), seeds, epoch, rows)
    count, left = full.shape[1], rows.shape[1] % batch_size
    edges = sorted({round(count * i / chunks) for i in range(chunks + 1)})
    last = (left or batch_size) if fill else None
    cut = [Chunk(full, last, 0, start, stop) for start, stop in itertools.pairwise(edges)]
    return ([*cut, Chunk(ragged, None, count, 0, 1)] if left and not fill else cut), keys


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_nets(
    program: Program,
    mesh: MeshShape,
    states: TrainState,  # every array with a leading axis K, a multiple of the mesh's rows
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    batches: jax.Array,  # i32[K, S, B], rows of `images`
    keys: jax.Array,  # [K, 2], of the epoch's dropout and augmentation
    learning_rates: jax.Array,  # f32[K, S]
    weight_decays: jax.Array,  # f32[K]
    last: int | jax.Array | None,
    first_step: int | jax.Array,
    start: int | jax.Array,
    stop: int | jax.Array,
) -> tuple[TrainState, Steps]:
    """Trains K nets on their batches[:, start:stop] in one compiled loop; of the very last batch
    only the first `last` images count, all for None.

    `states` is consumed: its memory is used again.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)
    chex.assert_equal_shape_prefix([batches, learning_rates], 2)
    chex.assert_rank(batches, 3)
    chex.assert_type([labels, batches], jnp.int32)
    size = batches.shape[2]
    share, shared = size // mesh.batch, mesh.batch > 1 and size % mesh.batch == 0

    def train_net(common, state, batches, keys, rates, decay):
        images, labels, last, first_step, start, stop = common

        def train_batch(i, carry):
            state, losses, correct = carry
            rows, step = batches[i], first_step + i
            key, of_images = (jax.random.fold_in(purpose_key, step) for purpose_key in keys)
            places = crop_and_flip(of_images, len(rows)) if program.augments else ()
            if shared:
                start = lax.axis_index(BATCH) * share
                rows, *places = (lax.dynamic_slice_in_dim(a, start, share) for a in (rows, *places))
            batch = augmented(images, rows, *places)
            axis = BATCH if shared else None
            count = None if last is None else jnp.where(i == len(batches) - 1, last, size)
            state, loss, hits = train_step(
                program, state, batch, labels[rows], key, rates[i], decay, axis, count
            )
            return state, losses.at[i].set(loss), correct + hits

        nothing = (jnp.zeros(batches.shape[0], jnp.float32), jnp.zeros((), jnp.int32))
        return lax.fori_loop(start, stop, train_batch, (state, *nothing))

    state, losses, correct = _for_each_net(
        mesh,
        train_net,
        ((images, labels, last, first_step, start, stop),),
        (states, batches, keys, learning_rates, weight_decays),
    )
    return state, Steps(losses, correct)


def augmented(images: jax.Array, rows: jax.Array, *places: jax.Array) -> jax.Array:
    """Returns images by their rows i32[B], made of the pixels that `crop_and_flip` chose."""
    if not places:
        return images[rows]
    down, across = places
    return images[rows[:, None, None], down[:, :, None], across[:, None, :]]


def _for_each_net(mesh: MeshShape, function: Callable, common: tuple, per_net: tuple) -> Any:
    """Calls `function(*common, *per_net)` for each net, whose arrays lie along the leading axis of
    `per_net`; each row of the mesh takes as many nets. The results have that axis too.
    """

    def on_row(common, per_net):
        """Trains the nets of a row of devices: a single one without `vmap`, as if it were alone."""
        if jax.tree.leaves(per_net)[0].shape[0] > 1:
            axes = (*[None] * len(common), *[0] * len(per_net))
            return jax.vmap(function, axes)(*common, *per_net)
        result = function(*common, *jax.tree.map(lambda leaf: leaf[0], per_net))
        return jax.tree.map(lambda leaf: leaf[None], result)

    if mesh.devices > 1:
        specs = {"in_specs": (P(), P(SEED)), "out_specs": P(SEED)}
        on_row = jax.shard_map(on_row, mesh=mesh.mesh, **specs, check_vma=False)
    return on_row(common, per_net)


def nets_at_once(program: Program, batch_size: int) -> int:
    """Returns how many nets a row of devices trains at the same time: one on a CPU, because one
    after the other is faster there, on an accelerator what half of its memory holds.
    """
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return max(1, memory // 2 // net_bytes(program.model, batch_size))


def net_bytes(net: CNN, batch_size: int) -> int:
    """Returns the memory that training or evaluating a net takes besides the data: six arrays of
    the size of each layer's output, by XLA's own account (`notebooks/tools/compile_for_cuda.py`).
    """
    return 6 * max(batch_size, EVALUATION_BATCH) * sum(activation_bytes(net))


def _logits(program: Program, mesh: MeshShape, images: jax.Array, state: TrainState) -> jax.Array:
    """Returns the logits of one net; each device of a row takes its share of the images."""

    def of_batch(batch):
        return program.model.apply(state.variables, standardize(state, batch))

    def of_part(images):
        """Returns their logits, a batch at a time; the first images again fill the last batch."""
        size = min(len(images), micro_batch(program.model, EVALUATION_BATCH))
        filled = jnp.pad(images, ((0, -len(images) % size), *[(0, 0)] * 3), mode="wrap")
        logits = lax.map(of_batch, filled.reshape(-1, size, *images.shape[1:]))
        return logits.reshape(len(filled), -1)[: len(images)]

    count, devices = images.shape[0], mesh.batch
    if count == 0:
        return jnp.zeros((0, program.model.num_classes))
    share, parts = count // devices, []
    if share and devices > 1:
        mine = lax.dynamic_slice_in_dim(images, lax.axis_index(BATCH) * share, share)
        parts.append(lax.all_gather(of_part(mine), BATCH, tiled=True))
        images = images[share * devices :]
    if images.shape[0]:
        parts.append(of_part(images))
    return jnp.concatenate(parts)


@partial(jax.jit, static_argnums=(0, 1))
def predict_logits(
    program: Program,
    mesh: MeshShape,
    states: TrainState,  # every array with a leading axis K
    images: jax.Array,  # u8[N, 32, 32, 3]
) -> jax.Array:  # f32[K, N, classes]
    """Returns logits of any number of images, with running averages and without dropout."""
    per_net = (states._replace(opt_state=()),)
    return _for_each_net(mesh, partial(_logits, program, mesh), (images,), per_net)


@partial(jax.jit, static_argnums=(0, 1))
def evaluate_nets(
    program: Program,
    mesh: MeshShape,
    states: TrainState,  # every array with a leading axis K
    images: jax.Array,  # u8[N, 32, 32, 3]
    labels: jax.Array,  # i32[N]
    rows: jax.Array | None = None,  # i32[K, M]
) -> Evaluation:
    """Returns loss and accuracy of K nets over exactly these N images, or of each over its own rows
    of them: summed over all, divided once.
    """
    chex.assert_equal_shape_prefix([images, labels], 1)

    def of_net(images, labels, state, *rows):
        if rows:
            images, labels = images[rows[0]], labels[rows[0]]
        logits, count = _logits(program, mesh, images, state), labels.shape[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return Evaluation(logits, losses.sum() / count, (logits.argmax(-1) == labels).sum() / count)

    per_net = (states._replace(opt_state=()), *([] if rows is None else [rows]))
    return _for_each_net(mesh, of_net, (images, labels), per_net)
