"""Training and evaluation: keys, order, the ragged batch, exact evaluation, and that it learns."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from close import assert_gradients_close

from jaxnorm import devices, train
from jaxnorm.devices import Layout
from jaxnorm.model import CNN, summarize

BATCH = 16


def recipe_of(norm, dataset, learning_rate=0.01, dropout=0.1):
    net = CNN(norm, "matched", len(dataset.class_names), dropout=dropout)
    return train.Recipe(net, learning_rate, 0.9, dataset.mean, dataset.deviation)


@pytest.fixture(scope="module")
def arrays(tiny):
    return jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)


def test_keys_differ_by_seed_purpose_epoch_and_step_and_by_nothing_else():
    keys = [
        train.derive_key(seed, purpose, *numbers)
        for seed in (0, 1)
        for purpose in ("init", "order", "dropout")
        for numbers in ((), (1,), (2,), (1, 0), (1, 1), (2, 1))
    ]
    data = np.stack([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == len(keys)
    again = train.derive_key(1, "dropout", 2, 1)
    chex.assert_trees_all_equal(jax.random.key_data(again), data[-1])
    traced = jax.jit(lambda seed: jax.random.key_data(train.derive_key(seed, "dropout", 2, 1)))(1)
    chex.assert_trees_all_equal(traced, data[-1])


def test_each_epoch_is_a_fresh_shuffle_of_all_images():
    orders = [train.epoch_order(seed, epoch, 70) for seed in (1, 2) for epoch in (1, 2)]
    for order in orders:
        chex.assert_shape(order, (70,))
        chex.assert_type(order, jnp.int32)
        np.testing.assert_array_equal(np.sort(order), np.arange(70))
    assert len({tuple(np.asarray(order)) for order in orders}) == 4


def test_pieces_cover_the_epoch_once_and_share_one_array():
    for count, batch, pieces in [(70, 16, 3), (64, 16, 20), (70, 70, 2), (10, 3, 1)]:
        kept = jnp.arange(100, 100 + count)
        cut = train.epoch_pieces(3, 1, kept, batch, pieces)
        rows = np.concatenate([np.asarray(p.batches[p.start : p.stop]).ravel() for p in cut])
        np.testing.assert_array_equal(rows, kept[train.epoch_order(3, 1, count)])
        assert len({p.batches.shape for p in cut}) == 1 + (count % batch > 0)
        assert [p.first + p.start for p in cut] == sorted({p.first + p.start for p in cut})


def test_standardize_is_the_studys(tiny):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    recipe = train.Recipe(CNN("group"), 0.01, 0.9, mean, deviation)
    outputs = train.standardize(recipe, jnp.asarray(images))
    chex.assert_shape(outputs, images.shape)
    chex.assert_type(outputs, jnp.float32)
    np.testing.assert_allclose(outputs, (images / 255 - mean) / deviation, atol=1e-6)
    with pytest.raises(AssertionError):
        train.standardize(recipe, outputs)


def step_by_step(recipe, arrays, seed, epoch, count, state):
    """An epoch written out: one jitted step for each batch, the ragged one too."""
    images, labels = arrays
    step = jax.jit(train.train_step, static_argnums=0)
    order = np.asarray(train.epoch_order(seed, epoch, count))
    losses, correct = [], 0
    for i in range(-(-count // BATCH)):
        rows = order[i * BATCH : (i + 1) * BATCH]
        key = train.derive_key(seed, "dropout", epoch, i)
        state, loss, hits = step(recipe, state, images[rows], labels[rows], key)
        losses.append(loss)
        correct += int(hits)
    return state, np.array(losses), correct


def test_an_epoch_equals_its_steps_one_by_one_and_holds_the_ragged_batch(tiny, arrays):
    recipe = recipe_of("batch", tiny)
    wanted_state, losses, correct = step_by_step(
        recipe, arrays, 3, 2, 70, train.init_state(recipe, 3)
    )
    state, steps = train.train_epoch(recipe, train.init_state(recipe, 3), *arrays, 3, 2, BATCH)
    chex.assert_shape(steps.losses, (5,))
    np.testing.assert_allclose(steps.losses, losses, rtol=1e-2)
    assert abs(int(steps.correct) - correct) <= 1
    assert_gradients_close(state.params, wanted_state.params, typical=1e-3)
    assert_gradients_close(state.batch_stats, wanted_state.batch_stats, typical=1e-3)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), state.params, train.init_state(recipe, 3).params
    )
    assert min(jax.tree.leaves(moved)) > 0


def test_images_that_devices_cannot_share_evenly_are_all_predicted(tiny):
    images = jnp.asarray(tiny.test_images[:7])
    alone = recipe_of("layer", tiny)
    shared = dataclasses.replace(alone, layout=Layout(batch=2))
    state = train.init_state(alone, 3)
    logits = [
        train.predict_logits(each, *train.replicate(each, state[:2]), train.replicate(each, images))
        for each in (alone, shared)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-6)
    assert abs(logits[0][0] - logits[0][6]).max() > 1e-3


def test_devices_share_what_they_divide_into_enough_each():
    assert [devices.choose(1, size).batch for size in (31, 32, 33, 34, 128)] == [1, 2, 1, 2, 2]


def test_half_of_an_accelerators_memory_is_for_seeds(tiny, monkeypatch):
    recipe = recipe_of("batch", tiny)
    assert train.nets_at_once(recipe, 128) == 1  # on a CPU
    one = 6 * 128 * sum(4 * math.prod(row.shape) for row in summarize(recipe.model))
    monkeypatch.setattr(train.jax, "default_backend", lambda: "gpu")
    for memory, seeds in ((9 * one, 4), (one, 1), (0, 1)):
        device = SimpleNamespace(memory_stats=lambda limit=memory: {"bytes_limit": limit})
        monkeypatch.setattr(train.jax, "local_devices", lambda device=device: [device])
        assert train.nets_at_once(recipe, 128) == seeds


def test_a_step_counts_what_the_net_before_it_classified_rightly(tiny, arrays):
    """Layer norm without dropout does in training what it does in evaluation."""
    recipe = recipe_of("layer", tiny, dropout=0.0)
    before = train.init_state(recipe, 4)
    evaluation = train.evaluate(recipe, before, *arrays)
    _, steps = train.train_epoch(recipe, before, *arrays, 4, 1, 70)
    assert int(steps.correct) == round(float(evaluation.accuracy) * 70) != 35
    np.testing.assert_allclose(steps.losses[0], evaluation.loss, rtol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_step_in_pieces_or_shared_by_devices_is_the_plain_step(tiny, arrays, norm):
    """32 images: at once by Flax's operators; in pieces of 16; and 16 on each of two devices.

    The same loss, gradients, masks and batch statistics, within rounding. Among three million
    pre-activations some lie within rounding of zero, and a ReLU lets one program's gradient through
    and not the other's (see `close`): under batch norm, for every other seed. A wrong program
    differs under every seed, so one of six must agree to rounding.
    """
    images, labels = (array[:32] for array in arrays)
    rows = jnp.arange(32, dtype=jnp.int32)[None]
    pieces = recipe_of(norm, tiny)
    plain = dataclasses.replace(pieces, model=pieces.model.clone(plain=True))
    shared = dataclasses.replace(pieces, layout=Layout(batch=2))
    assert devices.choose(1, 32).batch == 2
    assert devices.choose(1, 31).batch == devices.choose(1, 16).batch == 1

    def step(recipe, seed):
        state = train.replicate(recipe, train.init_state(recipe, seed))
        key = train.derive_key(seed, "dropout", 1)
        state, steps = train.train_steps(recipe, state, images, labels, rows, key, 0, 0, 1)
        return jax.device_get((state, steps))

    agree = {pieces: 0, shared: 0}
    for seed in range(1, 7):
        wanted, wanted_steps = step(plain, seed)
        for recipe in agree:
            state, steps = step(recipe, seed)
            np.testing.assert_allclose(steps.losses, wanted_steps.losses, rtol=1e-5)
            assert steps.correct == wanted_steps.correct
            chex.assert_trees_all_close(state.batch_stats, wanted.batch_stats, rtol=1e-5, atol=1e-6)
            ours, theirs = state.opt_state[0].trace, wanted.opt_state[0].trace
            assert_gradients_close(ours, theirs, typical=3e-2)
            with contextlib.suppress(AssertionError):
                assert_gradients_close(ours, theirs)
                agree[recipe] += 1
        if min(agree.values()):
            break
    assert min(agree.values()) > 0
    whole = train.predict_logits(plain, wanted.params, wanted.batch_stats, arrays[0])
    chex.assert_shape(whole, (70, 4))
    for recipe in agree:
        params, averages = train.replicate(recipe, (wanted.params, wanted.batch_stats))
        logits = train.predict_logits(recipe, params, averages, arrays[0])
        np.testing.assert_allclose(logits, whole, atol=2e-5)


def test_a_batch_that_devices_cannot_share_evenly_is_trained_whole(tiny, arrays):
    rows, key = jnp.arange(15, dtype=jnp.int32)[None], train.derive_key(1, "dropout", 1)
    one = recipe_of("group", tiny)
    losses = []
    for recipe in (one, dataclasses.replace(one, layout=Layout(batch=2))):
        state = train.replicate(recipe, train.init_state(recipe, 1))
        _, steps = train.train_steps(recipe, state, *arrays, rows, key, 0, 0, 1)
        losses.append(float(steps.losses[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_epoch_in_pieces_is_the_same_bits_and_no_second_trace(tiny, arrays):
    recipe = recipe_of("batch", tiny)
    whole, steps = train.train_epoch(recipe, train.init_state(recipe, 3), *arrays, 3, 1, BATCH)
    traced = train.train_steps._cache_size()
    state, losses = train.init_state(recipe, 3), []
    for piece in train.epoch_pieces(3, 1, jnp.arange(70), BATCH, 3):
        key = train.derive_key(3, "dropout", 1)
        state, part = train.train_steps(recipe, state, *arrays, piece.batches, key, *piece[1:])
        losses.extend(np.asarray(part.losses)[piece.start : piece.stop])
    chex.assert_trees_all_equal(state, whole)
    np.testing.assert_array_equal(losses, steps.losses)
    train.train_epoch(recipe_of("batch", tiny), state, *arrays, 4, 2, BATCH)
    assert train.train_steps._cache_size() == traced


def test_train_step_is_sgd_with_momentum_on_the_mean_cross_entropy(tiny, arrays):
    recipe = recipe_of("group", tiny, dropout=0.0)
    state = train.init_state(recipe, 0)
    images, labels = arrays[0][:8], arrays[1][:8]

    def objective(params):
        logits = recipe.model.apply({"params": params}, train.standardize(recipe, images))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    step = jax.jit(train.train_step, static_argnums=0)
    gradient = jax.jit(jax.grad(objective))
    velocity = jax.tree.map(jnp.zeros_like, state.params)
    for i in range(2):
        after, _, _ = step(recipe, state, images, labels, jax.random.key(i))
        moved = after.opt_state[0].trace
        added = jax.tree.map(lambda new, old: new - 0.9 * old, moved, velocity)
        assert_gradients_close(added, gradient(state.params), typical=1e-4)
        wanted = jax.tree.map(lambda p, v: p - 0.01 * v, state.params, moved)
        chex.assert_trees_all_close(after.params, wanted, atol=1e-7)
        state, velocity = after, moved


@pytest.mark.parametrize("count", [1, 22, 499, 500, 501, 1003])
def test_evaluation_is_exact_for_any_number_of_images(tiny, count):
    """Each image once, each alone, divided once: against one image at a time in NumPy."""
    recipe = recipe_of("batch", tiny)
    state = train.init_state(recipe, 1)
    rows = np.arange(count) % 22
    images, labels = jnp.asarray(tiny.test_images[rows]), jnp.asarray(tiny.test_labels[rows])
    result = train.evaluate(recipe, state, images, labels)
    chex.assert_shape(result.logits, (count, 4))
    alone = np.concatenate(
        [
            train.predict_logits(recipe, state.params, state.batch_stats, jnp.asarray(image[None]))
            for image in tiny.test_images
        ]
    ).astype(np.float64)[rows]
    np.testing.assert_allclose(result.logits, alone, atol=1e-5)
    chosen = alone[np.arange(count), np.asarray(labels)]
    losses = np.log(np.exp(alone).sum(1)) - chosen
    np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, (alone.argmax(1) == labels).mean(), rtol=1e-6)


def test_no_images_give_no_logits(tiny):
    recipe = recipe_of("batch", tiny)
    state = train.init_state(recipe, 1)
    empty = jnp.zeros((0, 32, 32, 3), jnp.uint8)
    chex.assert_shape(train.predict_logits(recipe, state.params, state.batch_stats, empty), (0, 4))


def test_evaluation_has_no_dropout_and_moves_nothing(tiny):
    recipe = recipe_of("batch", tiny, dropout=0.9)
    state = train.init_state(recipe, 1)
    before = jax.tree.map(np.array, state)
    arrays = jnp.asarray(tiny.test_images), jnp.asarray(tiny.test_labels)
    first, second = (train.evaluate(recipe, state, *arrays) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_equal(state, before)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_a_tiny_set_is_learned(tiny, arrays, norm):
    """To 99 % with dropout on, and the test images, which it has not seen, to 95 %.

    At a learning rate at which every norm and seed tried learns by the 30th epoch; from 0.02 on
    layer norm's first epochs are chaotic, and rounding decides when it recovers.
    """
    recipe = recipe_of(norm, tiny, learning_rate=0.005)
    state, best = train.init_state(recipe, 0), 0.0
    test = jnp.asarray(tiny.test_images), jnp.asarray(tiny.test_labels)
    for epoch in range(1, 81):
        state, _ = train.train_epoch(recipe, state, *arrays, 0, epoch, 10)
        best = max(best, float(train.evaluate(recipe, state, *arrays).accuracy))
        if best >= 0.99:
            break
    assert best >= 0.99
    assert float(train.evaluate(recipe, state, *test).accuracy) >= 0.95


GOLDEN = {"loss": 1.475290, "gradient": 4.855595, "mean": 0.524395}


def test_one_golden_step(tiny):
    """One step with dropout, to the digit. If this breaks, a run of yesterday cannot be repeated.

    A change of the initial distribution, of a key's derivation, of the dropout hash, of a layer's
    name (Flax folds it into the key) or of a default moves these numbers. If that is what you
    meant, say so in the commit, and write in the numbers that the failure prints.
    """
    recipe = recipe_of("batch", tiny)
    state = train.init_state(recipe, 1)
    images, labels = jnp.asarray(tiny.train_images[:8]), jnp.asarray(tiny.train_labels[:8])
    key = train.derive_key(1, "dropout", 1, 0)
    step = jax.jit(train.train_step, static_argnums=0)
    after, loss, _ = step(recipe, state, images, labels, key)
    velocity = optax.tree.norm(after.opt_state[0].trace)
    mean = jnp.abs(after.batch_stats["C5_norm"]["mean"]).sum()
    found = {"loss": float(loss), "gradient": float(velocity), "mean": float(mean)}
    np.testing.assert_allclose(
        list(found.values()), list(GOLDEN.values()), rtol=1e-4, err_msg=f"found {found}"
    )
