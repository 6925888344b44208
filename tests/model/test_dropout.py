"""Masks and their statistics; dropout with ReLU against the plain form."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.model.fast import dropout

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    """A test draws the same numbers whichever tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_dropout_relu_and_its_gradient_equal_the_plain_form():
    inputs, mask, rate = normal(4, 5, 5, 3), jnp.asarray(RNG.random((4, 5, 5, 3)) > 0.3), 0.3
    wanted, back = jax.vjp(lambda x: nn.relu(jnp.where(mask, x / (1 - rate), 0)), inputs)
    outputs, our_back = jax.vjp(lambda x: dropout.dropout_relu(x, mask, rate), inputs)
    chex.assert_trees_all_close(outputs, wanted, rtol=1e-6)
    cotangent = normal(*wanted.shape)
    chex.assert_trees_all_close(our_back(cotangent), back(cotangent), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_masks_keep_the_right_share_of_every_part(rate):
    """Five standard errors, over the whole mask, each image, each pixel and each channel."""
    mask = np.asarray(dropout.keep_mask(jax.random.key(3), 0, (64, 16, 16, 32), rate), np.float64)
    for axes in [(0, 1, 2, 3), (1, 2, 3), (0, 3), (0, 1, 2)]:
        counts = mask.size / np.prod([mask.shape[axis] for axis in range(4) if axis not in axes])
        error = np.sqrt(rate * (1 - rate) / counts)
        assert np.abs(mask.mean(axes) - (1 - rate)).max() < 5 * error


def test_masks_of_neighbours_layers_steps_and_seeds_are_uncorrelated():
    """Between any two masks, and between a mask and itself shifted: |correlation| < 5 / sqrt(n)."""
    shape, rate = (32, 16, 16, 8), 0.1
    step = [jax.random.fold_in(jax.random.key(1), i) for i in range(3)]
    masks = [dropout.keep_mask(key, layer, shape, rate) for key in step for layer in range(4)]
    masks.append(dropout.keep_mask(jax.random.key(2), 0, shape, rate))
    flat = np.stack([np.asarray(mask, np.float64).ravel() for mask in masks])
    correlation = np.corrcoef(flat) - np.eye(len(masks))
    limit = 5 / np.sqrt(flat.shape[1])
    assert np.abs(correlation).max() < limit
    for shift in (1, 2, 8, 128, 2048):
        assert abs(np.corrcoef(flat[0][shift:], flat[0][:-shift])[0, 1]) < limit


def test_masks_under_vmap_equal_one_by_one():
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(partial(dropout.keep_mask, layer=2, shape=(3, 4, 4, 2), rate=0.4))
    together = jax.vmap(draw)(keys)
    chex.assert_trees_all_equal(together, jnp.stack([draw(key) for key in keys]))


def test_a_micro_batch_of_a_batch_gets_the_batchs_masks():
    draw = partial(dropout.keep_mask, jax.random.key(3), 2, rate=0.4)
    draw = jax.jit(draw, static_argnames="shape")
    whole = draw(shape=(6, 4, 4, 3))
    pieces = [draw(shape=(2, 4, 4, 3), first_image=jnp.int32(first)) for first in (0, 2, 4)]
    chex.assert_trees_all_equal(jnp.concatenate(pieces), whole)


def test_masks_do_not_change():
    """Stored runs can be repeated only while a key gives the same mask."""
    mask = dropout.keep_mask(jax.random.key(7, impl="threefry2x32"), 1, (32,), 0.5)
    assert "".join("01"[int(kept)] for kept in mask) == MASK


MASK = "01111110010111010101111110101011"
