"""Dropout whose masks are a hash of the element's index, dropout with ReLU in one pass, and ReLU.

Threefry bits took half of a training step on a CPU. The fused gradient needs nothing but the
output, so no mask is stored or drawn twice.
"""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.model.fast import xla


def _mix(bits: jax.Array) -> jax.Array:
    """Applies the 32-bit finalizer `lowbias32`: every input bit flips every output bit with
    probability near one half.

    Source: C. Wellons, "Prospecting for hash functions" (2018), the constants with the least
    measured bias.
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def keep_mask(
    key: jax.Array,  # a typed JAX key
    layer: int,
    shape: tuple[int, ...],
    rate: float,
    first_image: int | jax.Array = 0,
) -> jax.Array:  # bool[shape]
    """Draws a dropout mask: each element is kept (True) with probability 1 - `rate`.

    The random bits are a hash of the element's index, the key's two words and the layer's number,
    so the mask depends on nothing else: not on the norm, not on `vmap`, not on what was drawn
    before. Costs a few multiplications an element and fuses into the loop that uses it.

    `first_image` is the number in the batch of the first image here: a batch cut into micro-batches
    gets the same masks as the whole.
    """
    one, two = (jax.random.key_data(key)[..., i].astype(jnp.uint32) for i in (0, -1))
    # Else XLA sees that no index depends on the step, and reads them all from memory in each.
    one, start = lax.optimization_barrier((one, jnp.asarray(first_image).astype(jnp.uint32)))
    one = _mix(one + jnp.uint32(0x9E3779B9 * (layer + 1) & 0xFFFFFFFF))
    two, size = _mix(two ^ jnp.uint32(layer)), math.prod(shape[1:])
    offsets = (lax.iota(jnp.uint32, shape[0]) + start) * jnp.uint32(size)
    index = lax.iota(jnp.uint32, size).reshape(1, *shape[1:])
    index = index + offsets.reshape(-1, *[1] * (len(shape) - 1))
    bits = _mix(_mix(index ^ one) + two)
    return bits >= jnp.uint32(round(rate * 2**32))


def drop(inputs: jax.Array, mask: jax.Array, rate: float) -> jax.Array:
    """Applies dropout without ReLU, after a norm that activates."""
    chex.assert_equal_shape([inputs, mask])
    return jnp.where(mask, inputs * (1 / (1 - rate)), 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout_relu(inputs: jax.Array, mask: jax.Array, rate: float) -> jax.Array:
    """Applies dropout and then ReLU in one pass: `relu(where(mask, inputs / (1 - rate), 0))`, the
    same shape as `inputs`.

    An output is positive if and only if the element was kept and positive, so the gradient needs
    the output alone, which the next layer keeps anyway, and no mask is stored or drawn twice.
    """
    chex.assert_equal_shape([inputs, mask])
    return jnp.where(mask, jnp.maximum(inputs, 0) * (1 / (1 - rate)), 0)


def _dropout_relu_forward(inputs: jax.Array, mask: jax.Array, rate: float):
    outputs = xla.stored(dropout_relu(inputs, mask, rate))
    return outputs, outputs


def _dropout_relu_backward(rate: float, outputs: jax.Array, gradient: jax.Array):
    return jnp.where(outputs > 0, gradient * (1 / (1 - rate)), 0), None


dropout_relu.defvjp(_dropout_relu_forward, _dropout_relu_backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """Returns max(x, 0); the backward pass reads the stored output, as in PyTorch."""
    return jnp.maximum(x, 0)


def _relu_forward(x: jax.Array):
    outputs = xla.stored(jnp.maximum(x, 0))
    return outputs, outputs


relu.defvjp(_relu_forward, lambda outputs, gradient: (jnp.where(outputs > 0, gradient, 0),))
