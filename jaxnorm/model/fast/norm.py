"""Batch, group, layer, instance and RMS norm as one operator whose gradient is written out: two
sums over all elements each way.

Values and gradients are those of the plain form within float32 rounding. Arrays are NHWC, float32.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.model.fast import xla


@dataclass(frozen=True)
class Over:
    """The elements that share a statistic: all positions of `channels / groups` neighbouring
    channels, of each image or of the whole batch; `centered` is False for RMS norm and filter
    response norm.

    `axis` names the mesh axis along which devices share a batch, if they do. `whole` says that the
    arrays are those of a whole batch also without `batch`: more than a core's cache holds.
    """

    batch: bool
    groups: int
    centered: bool = True
    epsilon: float = 1e-5
    axis: str | None = None
    whole: bool = False


class Statistics(NamedTuple):
    """The statistics that `normalize` subtracted and divided by; no gradient of them is asked."""

    mean: jax.Array  # f32[1 or N, groups]
    variance: jax.Array  # f32[1 or N, groups], over all elements (divided by n)


def normalize(
    inputs: jax.Array,  # f32[N, H, W, C]
    scale: jax.Array,  # f32[C]
    bias: jax.Array,  # f32[C]
    over: Over,
    mask: jax.Array | None = None,  # bool[N], False for each image that does not count
) -> tuple[jax.Array, Statistics]:  # f32[N, H, W, C]
    """Subtracts the mean, divides by sqrt(variance + epsilon), scales and shifts: batch, group,
    layer, instance and RMS norm, by the elements that they average `over`.

    The variance is that of the centered values. Images that a `mask` leaves out take no part in the
    statistics of a batch, and no gradient reaches them. Sums go over the height first, which leaves
    whole rows as vectors; XLA's own reduction to few channels takes several times as long.
    """
    chex.assert_rank(inputs, 4)
    chex.assert_shape([scale, bias], inputs.shape[-1:])
    return _normalize(inputs, scale, bias, mask, over)


def channel_sums(over: Over, *values: jax.Array) -> list[jax.Array]:
    """Sums arrays f32[N, H, W, C] over height and width: f32[N, C] each.

    Rows are added up first, and then their pixels by a product with zeros and ones. Two reductions
    in a row can come out wrong on a CPU: jaxlib 0.10.1 fuses them, and leaves values out if the
    second does not divide into its windows (28 x 32 values, say).
    """
    n, height, width, channels = values[0].shape
    if not _in_cache(over):
        # XLA stores what it sums: here a quarter of an array instead of all of it.
        rows = [_quartered(v).reshape(n, -1, width * channels).sum(1) for v in values]
    else:
        # One reduction of all arrays is fused with what computes them. It takes up to 8 rows: more,
        # a power of two apart, evict each other from a cache, which a prime height is not.
        tall = max(tall for tall in range(1, 9) if height % tall == 0)
        tall = tall if tall > 1 else height
        parts = [v.reshape(n, height // tall, tall, width * channels) for v in values]
        zeros = [jnp.zeros((), v.dtype) for v in values]
        parts = lax.reduce(parts, zeros, lambda a, b: list(map(jnp.add, a, b)), (2,))
        parts = lax.optimization_barrier(parts)
        rows = [reduce(jnp.add, jnp.unstack(part, axis=1)) for part in parts]
    same_channel = np.tile(np.eye(channels, dtype=np.float32), (width, 1))
    return [
        jnp.matmul(row, same_channel, precision=lax.Precision.HIGHEST)
        for row in lax.optimization_barrier(rows)
    ]


def _in_cache(over: Over) -> bool:
    """Returns whether a core's cache holds the arrays: those of micro-batches, which batch
    and ghost batch norm do not take.
    """
    return xla.on_cpu() and not (over.batch or over.whole)


def _quartered(values: jax.Array) -> jax.Array:
    """Adds the quarters of the height, or halves or thirds if it has no quarters."""
    count = max(count for count in range(1, 5) if values.shape[1] % count == 0)
    return reduce(jnp.add, jnp.split(values, count, axis=1))


def _pool(sums: jax.Array, over: Over, mask: jax.Array | None = None) -> jax.Array:
    """Sums f32[N, C] over what shares a statistic: f32[1 or N, groups]."""
    if over.batch:
        # By a choice and no product, which XLA would round with the sum, once or twice.
        sums = sums if mask is None else jnp.where(mask[:, None], sums, 0)
        sums = xla.over_images(sums)[None]
        if over.axis is not None:
            sums = lax.psum(sums, over.axis)
    if over.groups == sums.shape[1]:
        return sums
    return sums.reshape(sums.shape[0], over.groups, -1).sum(2)


def spread(statistic: jax.Array, inputs: jax.Array) -> jax.Array:
    """Spreads a statistic f32[1 or N, groups] over its channels: f32[1 or N, 1, 1, C]."""
    return jnp.repeat(statistic, inputs.shape[-1] // statistic.shape[1], 1)[:, None, None, :]


def _count(inputs: jax.Array, over: Over, mask: jax.Array | None) -> int | jax.Array:
    """Returns how many elements share a statistic."""
    n, height, width, channels = inputs.shape
    images = 1
    if over.batch:
        images = n if mask is None else mask.sum()
        images = lax.psum(images, over.axis) if over.axis else images
    return images * (height * width * channels // over.groups)


def mean_of(sums: jax.Array, inputs: jax.Array, over: Over, mask: jax.Array | None) -> jax.Array:
    """Divides the sums f32[N, C] by how many elements share a statistic: f32[1 or N, groups]."""
    pooled, count = _pool(sums, over, mask), _count(inputs, over, mask)
    if mask is None:
        return pooled / count
    # XLA divides in some programs and multiplies by the reciprocal in others, where it then rounds
    # the product and the addition behind it once: so here it multiplies, and stores the product.
    return xla.stored(pooled * (1 / count))


def statistics(inputs: jax.Array, over: Over, mask: jax.Array | None = None) -> Statistics:
    """Returns the statistics of f32[N, H, W, C] that `normalize` takes."""
    if over.centered:
        mean = mean_of(channel_sums(over, inputs)[0], inputs, over, mask)
    else:
        mean = jnp.zeros((1 if over.batch else inputs.shape[0], over.groups), inputs.dtype)
    centered = inputs - spread(mean, inputs)
    squares = jnp.square(centered)
    if not (over.centered and _in_cache(over)):
        return Statistics(mean, mean_of(channel_sums(over, squares)[0], inputs, over, mask))
    # What rounding left of the mean comes at no cost, and corrects the variance; and the mean too
    # if values would be off by more than a thousandth of a deviation.
    sums = channel_sums(over, centered, squares)  # of micro-batches, which have no mask
    rest, variance = (mean_of(part, inputs, over, None) for part in sums)
    mean = jnp.where(jnp.square(rest) > 1e-6 * variance, mean + rest, mean)
    return Statistics(mean, jnp.maximum(variance - jnp.square(rest), 0))


def _normalize_plainly(
    inputs: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, over: Over
) -> tuple[jax.Array, Statistics]:
    taken = statistics(inputs, over, mask)
    factor = lax.rsqrt(taken.variance + over.epsilon)
    # Else they would be spread over the channels of their group again for each element.
    mean = xla.stored(spread(taken.mean, inputs))
    factor = xla.stored(spread(factor, inputs) * scale[None, None, None])
    return (inputs - mean) * factor + bias[None, None, None], taken


_normalize = jax.custom_vjp(_normalize_plainly, nondiff_argnums=(4,))


def _normalize_forward(inputs, scale, bias, mask, over: Over):
    outputs, taken = _normalize(inputs, scale, bias, mask, over)
    return (outputs, taken), (inputs, scale, mask, taken)


def _normalize_backward(over: Over, saved, gradients):
    inputs, scale, mask, taken = saved
    gradient, _ = gradients
    # With x the centered input, r = 1 / sqrt(variance + epsilon) and g = gradient * scale:
    # to_inputs = r * (g - mean(g) - x * r^2 * mean(g x)). Two sums over all elements serve
    # everything.
    factor = lax.rsqrt(taken.variance + over.epsilon)
    centered = inputs - spread(taken.mean, inputs)
    to_bias, to_scale = channel_sums(over, gradient, gradient * centered)
    mean_gradient = mean_of(to_bias * scale[None], inputs, over, mask) * factor
    if not over.centered:
        mean_gradient = jnp.zeros_like(mean_gradient)
    mean_product = mean_of(to_scale * scale[None], inputs, over, mask) * factor**3
    to_inputs = (
        gradient * (spread(factor, inputs) * scale[None, None, None])
        - centered * spread(mean_product, inputs)
        - spread(mean_gradient, inputs)
    )
    if mask is not None:  # the mean's terms reach masked images too
        to_inputs = jnp.where(mask[:, None, None, None], to_inputs, 0)
    to_scale = to_scale * spread(factor, inputs)[:, 0, 0, :]
    return to_inputs, xla.over_images(to_scale), xla.over_images(to_bias), None


_normalize.defvjp(_normalize_forward, _normalize_backward)
