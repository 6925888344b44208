"""Pooling whose gradients XLA runs fast on a CPU, and right at every optimization level.

`max_pool` sends the gradient back by comparison instead of `select_and_scatter`; `global_max`
remembers where the maximum was. Values and gradients are those of Flax and JAX.
"""

import chex
import jax
import jax.numpy as jnp

from jaxnorm.model.fast import xla


@jax.custom_vjp
def max_pool(images: jax.Array) -> jax.Array:  # f32[N, H, W, C] -> f32[N, H // 2, W // 2, C]
    """Takes the maximum of each 2x2 window, stride 2; an odd last row or column is left out, as in
    PyTorch.

    In a tie the gradient goes to the first maximum in row order, as in PyTorch and in XLA.
    """
    return _windows(images)[0]


def _windows(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the maximum of each window, and which of its corners is the first that has it."""
    chex.assert_rank(images, 4)
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    windows = even.reshape(n, height // 2, 2, width // 2, 2, channels)
    a, b, c, d = (windows[:, :, row, :, column] for row in (0, 1) for column in (0, 1))
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    first = jnp.where(bottom > top, jnp.where(d > c, 3, 2), jnp.where(b > a, 1, 0))
    return jnp.maximum(top, bottom), first.astype(jnp.uint8)


def _max_pool_forward(images: jax.Array):
    maximum, first = _windows(images)
    return xla.stored(maximum), (first, images)


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    first, images = saved
    corners = [jnp.where(first == k, gradient, jnp.zeros((), gradient.dtype)) for k in range(4)]
    windows = jnp.stack([jnp.stack(corners[:2], 3), jnp.stack(corners[2:], 3)], 2)
    n, height, width, channels = images.shape
    even = windows.reshape(n, height // 2 * 2, width // 2 * 2, channels)
    return (jnp.pad(even, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def global_max(images: jax.Array) -> jax.Array:  # f32[N, H, W, C] -> f32[N, 1, 1, C]
    """Takes the maximum of all pixels of each channel; in a tie the gradient goes to the first.

    JAX sends the gradient where an input equals the maximum. XLA computes that input again in
    the backward pass and may round it otherwise, so that none equals it: a batch of 29 lost a third
    of the gradient, or got NaN. Where the maximum lies is kept from the forward pass instead.
    """
    chex.assert_rank(images, 4)
    return images.max((1, 2), keepdims=True)


def _global_max_forward(images: jax.Array):
    n, height, width, channels = images.shape
    where = images.reshape(n, height * width, channels).argmax(1)
    return global_max(images), (where, jnp.zeros((height, width, 0), images.dtype))


def _global_max_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    where, like = saved
    (n, channels), (height, width, _) = where.shape, like.shape
    here = jnp.arange(height * width)[None, :, None] == where[:, None, :]
    spread = jnp.where(here, gradient[:, :, 0], jnp.zeros((), gradient.dtype))
    return (spread.reshape(n, height, width, channels),)


global_max.defvjp(_global_max_forward, _global_max_backward)
