"""What the tuned recipe adds to a step: augmentation, decay, smoothing, averages, a schedule."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SOON, difference, init, run, train_epoch

from jaxnorm.config import tuned
from jaxnorm.training import epoch as epochs
from jaxnorm.training import step as train
from jaxnorm.training.experiment import learning_rates, program_of
from jaxnorm.training.fit import Callback, fit
from jaxnorm.training.mesh import MeshShape

TUNED = tuned(
    norm="group",
    arch="three-layers",
    dataset="tiny",
    epochs=2,
    batch_size=14,
    label_smoothing=0.1,
)
"""70 images in batches of 14: none is ragged, and fewer programs are compiled."""


class Stopped(Exception):
    """Stands for a kill."""


class StopsAfterAnEpoch(Callback):
    def on_epoch(self, config, epoch):
        raise Stopped


def test_a_crop_is_a_crop_of_the_reflected_image_and_half_are_mirrored():
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    rows = jnp.arange(64)[::-1]
    made = epochs.augmented(jnp.asarray(images), rows, *train.crop_and_flip(jax.random.key(1), 64))
    seen = set()
    for image, row in zip(np.asarray(made), np.asarray(rows), strict=True):
        crops = {
            (down, across, mirrored): padded[row, down : down + 32, across : across + 32]
            for down in range(5)
            for across in range(5)
            for mirrored in (False, True)
        }
        (which,) = (
            (*place, mirrored)
            for (*place, mirrored), crop in crops.items()
            if np.array_equal(image, crop[:, ::-1] if mirrored else crop)
        )
        seen.add(which)
    assert len({down for down, _, _ in seen}) == len({across for _, across, _ in seen}) == 5
    assert 16 < sum(mirrored for *_, mirrored in seen) < 48


def test_a_compiled_epoch_trains_on_the_images_that_its_keys_choose(tiny):
    """Step by step: an update in place that is read after it is written (openxla/xla#49176) would
    differ.
    """
    program = program_of(TUNED, "group", 4)
    initial = init(program, tiny, 3)
    state, losses, _ = train_epoch(
        program, initial, tiny.train_images, tiny.train_labels, 3, 1, 14, rate=0.1
    )
    order = np.asarray(epochs.epoch_order(3, 1, 70))
    wanted, by_step = initial, []
    train_step = jax.jit(train.train_step, static_argnums=0, **SOON)
    crop_and_flip = jax.jit(train.crop_and_flip, static_argnums=1, **SOON)
    for step, start in enumerate(range(0, 70, 14)):
        rows = order[start : start + 14]
        down, across = crop_and_flip(train.derive_key(3, "augment", 1, step), len(rows))
        images = tiny.train_images[rows[:, None, None], down[:, :, None], across[:, None]]
        key = train.derive_key(3, "dropout", 1, step)
        labels = jnp.asarray(tiny.train_labels[rows])
        wanted, loss, _ = train_step(program, wanted, images, labels, key, 0.1)
        by_step.append(loss)
    np.testing.assert_allclose(losses, by_step, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_step_is_pytorchs_sgd_with_nesterov_and_decay_of_kernels_alone(tiny):
    """Three steps by hand: v = 0.9 v + g, p -= rate (g + 0.9 v)."""
    config = dataclasses.replace(TUNED, label_smoothing=0.0)
    program = program_of(config, "group", 4)
    images, labels = jnp.asarray(tiny.train_images[:8]), jnp.asarray(tiny.train_labels[:8])
    state, key = init(program, tiny, 1), train.derive_key(1, "dropout", 1, 0)

    def loss(params):
        logits = program.model.apply({"params": params}, train.standardize(state, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step, gradient = jax.jit(train.train_step, static_argnums=0), jax.jit(jax.grad(loss), **SOON)
    params = state.params
    velocity = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        gradients = gradient(params)
        for layer, leaves in gradients.items():
            if "kernel" in leaves:
                gradients[layer]["kernel"] += 0.01 * params[layer]["kernel"]
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradients)
        params = jax.tree.map(lambda p, g, v: p - 0.1 * (g + 0.9 * v), params, gradients, velocity)
        state, _, _ = step(program, state, images, labels, key, 0.1, 0.01)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_labels_are_smoothed(tiny):
    program = program_of(dataclasses.replace(TUNED, augment="none"), "group", 4)
    images, labels = jnp.asarray(tiny.train_images[:8]), jnp.asarray(tiny.train_labels[:8])
    before, key = init(program, tiny, 1), train.derive_key(1, "dropout", 1, 0)
    step = jax.jit(train.train_step, static_argnums=0)
    _, loss, _ = step(program, before, images, labels, key, 0.1)

    @jax.jit
    def smoothed():
        """The loss by Optax's own functions."""
        logits = program.model.apply({"params": before.params}, train.standardize(before, images))
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.1)
        return optax.softmax_cross_entropy(logits, smooth).mean()

    np.testing.assert_allclose(loss, smoothed(), rtol=1e-6)


def test_one_cycle_goes_up_and_down_in_straight_lines_and_constant_stays():
    config = dataclasses.replace(TUNED, epochs=4, warmup=0.25)
    rates = np.concatenate([learning_rates(config, epoch, 100) for epoch in range(1, 5)])
    assert rates.argmax() in (99, 100)
    np.testing.assert_allclose(
        rates[[0, 49, 99, 249, 399]], [0.005, 0.495, 0.995, 0.5017, 0.0017], atol=1e-3
    )
    assert (np.diff(rates[:100]) > 0).all()
    assert (np.diff(rates[100:]) < 0).all()
    constant = learning_rates(dataclasses.replace(config, schedule="constant"), 3, 10)
    assert (constant == 1).all()


@pytest.mark.parametrize("norm", ["batch", pytest.param("pixel", marks=pytest.mark.slow)])
def test_a_tuned_net_resumes_bit_for_bit(tiny, scratch, norm):
    config = dataclasses.replace(TUNED, norm=norm)
    whole = run(config, tiny, scratch / "whole")
    with pytest.raises(Stopped):
        run(config, tiny, scratch / "stopped", StopsAfterAnEpoch())
    assert difference(run(config, tiny, scratch / "stopped"), whole) == ""


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_seed_sees_the_same_images_on_any_devices(tiny, norm):
    one, two = (
        fit(dataclasses.replace(TUNED, norm=norm), tiny, mesh=mesh)[norm, 1]
        for mesh in (MeshShape(), MeshShape(batch=2))
    )
    np.testing.assert_allclose(one.step_losses, two.step_losses, rtol=1e-4)
    chex.assert_trees_all_close(one.state.variables, two.state.variables, atol=1e-4)
