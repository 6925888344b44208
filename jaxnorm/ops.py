"""Convolution, max pooling and dropout in the form that XLA runs fast on a CPU.

Every function here has the same values and gradients, within float32 rounding, as the plain form
that Flax or XLA would give (`tests/test_ops.py` compares each one). What differs is the work done:

* `convolution` writes both of its gradients as plain convolutions, or matrix products for 1x1
  kernels. XLA's own
  gradient falls to a naive loop inside `lax.scan` (jax-ml/jax#12868).
* `max_pool` sends the gradient back by comparison instead of `select_and_scatter`.
* `keep_mask` hashes element indices instead of drawing threefry bits, which took half of a training
  step.
* `dropout_relu` needs nothing for its gradient but its own output.

Arrays are NHWC and kernels HWIO, float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")
Padding = tuple[tuple[int, int], tuple[int, int]]


def convolution(
    images: jax.Array,  # f32[N, H, W, I]
    kernel: jax.Array,  # f32[h, w, I, O]
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:  # f32[N, H', W', O]
    """Cross-correlates NHWC images with an HWIO kernel, stride 1: what `nn.Conv` asks of
    `lax.conv_general_dilated`.

    Pass it as `nn.Conv(conv_general_dilated=convolution)`. A stride, a dilation or feature groups
    raise `ValueError`, because the gradients written here would be wrong for them.
    """
    chex.assert_rank([images, kernel], 4)
    plain = all(stride == 1 for stride in window_strides)
    plain &= all(d == 1 for key in ("lhs_dilation", "rhs_dilation") for d in options.get(key) or ())
    plain &= options.get("feature_group_count", 1) == 1
    if not plain:
        raise ValueError(
            "convolution: only stride 1, without dilation or feature groups, is supported; use "
            "nn.Conv as it is"
        )
    low_high = tuple((int(low), int(high)) for low, high in padding)
    assert len(low_high) == 2
    return _convolution(images, kernel, low_high)


def _correlate(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=_NHWC)


def _pad(images: jax.Array, padding: Padding) -> jax.Array:
    """Pads height and width with zeros; a negative width crops."""
    if padding == ((0, 0), (0, 0)):
        return images
    edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    return lax.pad(images, jnp.zeros((), images.dtype), edges)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    if kernel.shape[:2] == (1, 1):
        return jnp.einsum("nhwi,io->nhwo", _pad(images, padding), kernel[0, 0])
    return _correlate(images, kernel, padding)


def _convolution_forward(images: jax.Array, kernel: jax.Array, padding: Padding):
    return _convolution(images, kernel, padding), (images, kernel)


def _convolution_backward(
    padding: Padding, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
):
    images, kernel = saved
    height, width = kernel.shape[:2]
    if (height, width) == (1, 1):
        to_padded = jnp.einsum("nhwo,io->nhwi", gradient, kernel[0, 0])
        (top, bottom), (left, right) = padding
        to_images = _pad(to_padded, ((-top, -bottom), (-left, -right)))
        to_kernel = jnp.einsum("nhwi,nhwo->io", _pad(images, padding), gradient)
        return to_images, to_kernel[None, None]
    # An output's gradient goes back through the kernel turned by 180 degrees, channels swapped.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    (top, bottom), (left, right) = padding
    outer = ((height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right))
    to_images = _correlate(gradient, flipped, outer)
    # The kernel's gradient is a convolution too, with the batch in the role of the channels.
    to_kernel = lax.conv_general_dilated(
        images.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        padding,
        dimension_numbers=_NHWC,
    )
    return to_images, to_kernel.transpose(1, 2, 0, 3)


_convolution.defvjp(_convolution_forward, _convolution_backward)


@jax.custom_vjp
def max_pool(images: jax.Array) -> jax.Array:  # f32[N, H, W, C] -> f32[N, H // 2, W // 2, C]
    """Takes the maximum of each 2x2 window, stride 2; an odd last row or column is left out, as in
    PyTorch.

    In a tie the gradient goes to the first maximum in row order, as in PyTorch and in XLA.
    """
    chex.assert_rank(images, 4)
    return _windows(images).max(axis=(2, 4))


def _windows(images: jax.Array) -> jax.Array:
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2, channels)


def _max_pool_forward(images: jax.Array):
    pooled = max_pool(images)
    return pooled, (images, pooled)


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    images, pooled = saved
    windows = _windows(images)
    taken = jnp.zeros(pooled.shape, bool)
    corners = []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        hit = (windows[:, :, row, :, column] == pooled) & ~taken
        taken |= hit
        corners.append(jnp.where(hit, gradient, 0))
    top, bottom = jnp.stack(corners[:2], 3), jnp.stack(corners[2:], 3)
    n, height, width, channels = images.shape
    even = jnp.stack([top, bottom], 2).reshape(n, height // 2 * 2, width // 2 * 2, channels)
    return (jnp.pad(even, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _mix(bits: jax.Array) -> jax.Array:
    """The 32-bit finalizer `lowbias32`: every input bit flips every output bit with probability
    near one half.

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
) -> jax.Array:  # bool[shape]
    """Draws a dropout mask: each element is kept (True) with probability 1 - `rate`.

    The random bits are a hash of the element's index, the key's two words and the layer's number,
    so the mask depends on nothing else: not on the norm, not on `vmap`, not on what was drawn
    before. Costs a few multiplications an element and fuses into the loop that uses it.
    """
    first, second = (jax.random.key_data(key)[..., i].astype(jnp.uint32) for i in (0, -1))
    first, second = (
        _mix(first + jnp.uint32(0x9E3779B9 * (layer + 1) & 0xFFFFFFFF)),
        _mix(second ^ jnp.uint32(layer)),
    )
    size = 1
    for side in shape:
        size *= side
    index = lax.iota(jnp.uint32, size).reshape(shape)
    bits = _mix(_mix(index ^ first) + second)
    return bits >= jnp.uint32(round(rate * 2**32))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout_relu(inputs: jax.Array, mask: jax.Array, rate: float) -> jax.Array:
    """Dropout and then ReLU in one pass: `relu(where(mask, inputs / (1 - rate), 0))`, the same
    shape as `inputs`.

    An output is positive exactly where the element was kept and positive, so the gradient needs the
    output alone, which the next layer keeps anyway, and no mask is stored or drawn twice.
    """
    chex.assert_equal_shape([inputs, mask])
    return jnp.where(mask, jnp.maximum(inputs, 0) * (1 / (1 - rate)), 0)


def _dropout_relu_forward(inputs: jax.Array, mask: jax.Array, rate: float):
    outputs = dropout_relu(inputs, mask, rate)
    return outputs, outputs


def _dropout_relu_backward(rate: float, outputs: jax.Array, gradient: jax.Array):
    return jnp.where(outputs > 0, gradient * (1 / (1 - rate)), 0), None


dropout_relu.defvjp(_dropout_relu_forward, _dropout_relu_backward)
