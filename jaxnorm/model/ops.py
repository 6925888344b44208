"""Convolution, ReLU and norms in the form that XLA runs fast on a CPU.

Every function here has the same values and gradients, within float32 rounding, as the plain form
that Flax or XLA would give (`tests/model/test_ops.py` compares each one). What differs is the work:

* `convolution` writes both of its gradients as plain convolutions, or matrix products for 1x1
  kernels. XLA's own gradient falls to a naive loop inside `lax.scan` (jax-ml/jax#12868). Narrow
  layers take neighbouring pixels as channels.
* `normalize` is every norm, its gradient written out: two sums over all elements each way.
* `stored` keeps XLA from computing an activation again for each of its uses.

Arrays are NHWC and kernels HWIO, float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")
Padding = tuple[tuple[int, int], tuple[int, int]]
MICRO_BATCH_BYTES = 550_000
"""The largest activation that a micro-batch may have, so that it stays in a core's cache."""


def micro_batch_of(count: int, image_bytes: int) -> int:
    """Returns how many of `count` images to take at a time, if the largest activation of one takes
    `image_bytes`: on a CPU a divisor near what `MICRO_BATCH_BYTES` holds, elsewhere all.
    """
    near = max(1, MICRO_BATCH_BYTES // image_bytes)
    if not _on_cpu() or count <= near:
        return count
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    below = max(size for size in divisors if size <= near)
    return below if below > near // 2 else min(size for size in divisors if size > near)


def _on_cpu() -> bool:
    """Returns whether to suit XLA's CPU compiler; other devices get the plain forms."""
    return jax.default_backend() == "cpu"


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
    if not _on_cpu() or images.dtype != jnp.float32:
        precision = options.get("precision")
        return lax.conv_general_dilated(
            images, kernel, (1, 1), padding, dimension_numbers=_NHWC, precision=precision
        )
    low_high = tuple((int(low), int(high)) for low, high in padding)
    assert len(low_high) == 2
    return _convolution(images, kernel, low_high)


def _pad(images: jax.Array, padding: Padding) -> jax.Array:
    """Pads height and width with zeros; a negative width crops."""
    if padding == ((0, 0), (0, 0)):
        return images
    edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    # XLA would move a pad with a known zero into the convolution behind it, and its fast kernels
    # take "valid" convolutions alone.
    return lax.pad(images, lax.optimization_barrier(jnp.zeros((), images.dtype)), edges)


def _correlate(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    images = _pad(images, padding)
    fold = _fold_of(kernel)
    if fold > 1:
        return _correlate_folded(images, kernel, fold)
    return lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=_NHWC)


def _fold_of(kernel: jax.Array) -> int:
    """Returns how many neighbouring pixels to take as one, so that channels fill vectors and are
    more than the 16 that XLA's fastest library does not take (as measured).
    """
    products = kernel.shape[2] * kernel.shape[3]
    return 6 if products < 48 else 2 if products <= 256 else 1


def _correlate_folded(images: jax.Array, kernel: jax.Array, fold: int) -> jax.Array:
    """A "valid" correlation of few channels, which takes `fold` neighbouring pixels as channels.

    f32[N, H, W, I] is read as f32[N, H, W / fold, fold I], and the kernel is spread with zeros so
    that one place of it makes `fold` pixels: more arithmetic, in vectors that are full.
    """
    n, height, width, inputs = images.shape
    tall, wide, _, outputs = kernel.shape
    pixels = width - wide + 1
    places, blocks = -(-pixels // fold), -(-(fold + wide - 1) // fold)
    images = _pad(images, ((0, 0), (0, (places + blocks - 1) * fold - width)))
    # joins[p, q, j]: the kernel's column j joins input pixel p of the blocks to output pixel q.
    joins = np.zeros((blocks * fold, fold, wide), np.float32)
    for q in range(fold):
        for j in range(wide):
            joins[q + j, q, j] = 1
    spread = jnp.einsum("pqj,hjio->hpiqo", joins, kernel)
    folded = lax.conv_general_dilated(
        images.reshape(n, height, -1, fold * inputs),
        spread.reshape(tall, blocks, fold * inputs, fold * outputs),
        (1, 1),
        "VALID",
        dimension_numbers=_NHWC,
    )
    return folded.reshape(n, height - tall + 1, places * fold, outputs)[:, :, :pixels]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    if kernel.shape[1] > 1 and _fold_of(kernel) > 1:
        # Else the norm in front would be computed in the loop that folds, which fills no vectors.
        # In training, which is the forward pass below, these images are stored already.
        images = stored(images)
    return _convolution_forward(images, kernel, padding)[0]


def _convolution_forward(images: jax.Array, kernel: jax.Array, padding: Padding):
    if kernel.shape[:2] == (1, 1):
        # Padding adds zeros to a product without a bias: the few channels behind it are cheaper.
        outputs = _pad(jnp.einsum("nhwi,io->nhwo", images, kernel[0, 0]), padding)
    else:
        outputs = _correlate(images, kernel, padding)
    return outputs, (images, kernel)


def _convolution_backward(
    padding: Padding, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
):
    images, kernel = saved
    gradient = stored(gradient)  # both of its uses below would compute it again
    height, width = kernel.shape[:2]
    (top, bottom), (left, right) = padding
    if (height, width) == (1, 1):
        inner = _pad(gradient, ((-top, -bottom), (-left, -right)))
        to_images = jnp.einsum("nhwo,io->nhwi", inner, kernel[0, 0])
        # XLA transposes the first factor: let that be the smaller one, image by image.
        by_image = jnp.einsum("nhwo,nhwi->noi", inner, images)
        to_kernel = _over_images(by_image.reshape(images.shape[0], -1))
        return to_images, to_kernel.reshape(by_image.shape[1:]).T[None, None]
    # An output's gradient goes back through the kernel turned by 180 degrees, channels swapped.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    outer = ((height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right))
    to_images = _correlate(gradient, flipped, outer)
    return to_images, _kernel_gradient(images, gradient, padding)


def _kernel_gradient(images: jax.Array, gradient: jax.Array, padding: Padding) -> jax.Array:
    """The kernel's gradient is a convolution too, with the batch in the role of the channels.

    It needs both arrays transposed, which is cheap in micro-batches that a core's cache holds. A
    convolution goes to XLA's fastest library where more than 16 channels go in or come out: where
    the batch and the kernel have fewer, strips of rows become images of their own.
    """

    def of_part(images, gradient):
        images, (count, height, width, outputs) = _pad(images, padding), gradient.shape
        enough = (k for k in range(1, 9) if height % k == 0 and max(k * count, outputs) > 16)
        strips, overlap = next(enough, 1), images.shape[1] - height
        tall = height // strips
        parts = [images[:, k * tall : (k + 1) * tall + overlap] for k in range(strips)]
        parts_of_gradient = gradient.reshape(count, strips, tall, width, outputs)
        return lax.conv_general_dilated(
            jnp.concatenate(parts).transpose(3, 1, 2, 0),
            parts_of_gradient.transpose(2, 3, 1, 0, 4).reshape(tall, width, -1, outputs),
            (1, 1),
            "VALID",
            dimension_numbers=_NHWC,
        ).transpose(1, 2, 0, 3)

    count = images.shape[0]
    size = micro_batch_of(count, 4 * max(images[0].size, gradient[0].size))
    if size == count:
        return of_part(images, gradient)

    def body(i, total):
        cut = (lax.dynamic_slice_in_dim(a, i * size, size) for a in (images, gradient))
        return total + of_part(*cut)

    zeros = jax.eval_shape(of_part, images[:1], gradient[:1])
    return lax.fori_loop(0, count // size, body, jnp.zeros(zeros.shape, zeros.dtype))


_convolution.defvjp(_convolution_forward, _convolution_backward)


@jax.custom_vjp
def stored(x: jax.Array) -> jax.Array:
    """The same array, which XLA stores instead of computing it again for each of its uses.

    XLA's CPU compiler fuses an elementwise chain into every operator that reads its end, the
    backward pass included, and drops `optimization_barrier` before it does so. What a loop carries
    it has to store, in place. The loop never turns but for a NaN, and then it changes nothing. (A
    conditional would copy the array.)
    """
    if not _on_cpu():
        return x

    def unchanged(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, first = carry
        return x + jnp.where(x == x, 0, x), jnp.zeros_like(first)

    return lax.while_loop(lambda carry: carry[1] != carry[1], unchanged, (x, x.ravel()[0]))[0]


# No loop like this has a gradient, which second derivatives ask for.
stored.defvjp(lambda x: (stored(x), None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0); the backward pass reads the stored output, as in PyTorch."""
    return jnp.maximum(x, 0)


def _relu_forward(x: jax.Array):
    outputs = stored(jnp.maximum(x, 0))
    return outputs, outputs


relu.defvjp(_relu_forward, lambda outputs, gradient: (jnp.where(outputs > 0, gradient, 0),))


@dataclass(frozen=True)
class Over:
    """The elements that share a statistic: all positions of `channels / groups` neighbouring
    channels, of each image or of the whole batch; `centered` is False for RMS norm.

    `axis` names the mesh axis along which devices share a batch, if they do.
    """

    batch: bool
    groups: int
    centered: bool = True
    epsilon: float = 1e-5
    axis: str | None = None


class Statistics(NamedTuple):
    """The statistics that `normalize` subtracted and divided by; no gradient of them is asked."""

    mean: jax.Array  # f32[1 or N, groups]
    variance: jax.Array  # f32[1 or N, groups], over all elements (divided by n)


def normalize(
    inputs: jax.Array,  # f32[N, H, W, C]
    scale: jax.Array,  # f32[C]
    bias: jax.Array,  # f32[C]
    over: Over,
) -> tuple[jax.Array, Statistics]:  # f32[N, H, W, C]
    """Subtracts the mean, divides by sqrt(variance + epsilon), scales and shifts: batch, group,
    layer, instance and RMS norm, by what they average `over`.

    The variance is that of the centered values. Sums go over the height first, which leaves whole
    rows as vectors; XLA's own reduction to few channels takes several times as long.
    """
    chex.assert_rank(inputs, 4)
    chex.assert_shape([scale, bias], inputs.shape[-1:])
    return _normalize(inputs, scale, bias, over)


def _by_channel(over: Over, *values: jax.Array) -> list[jax.Array]:
    """Sums arrays f32[N, H, W, C] over height and width: f32[N, C] each.

    Rows are added up first, and then their pixels by a product with zeros and ones. Two reductions
    in a row can come out wrong on a CPU: jaxlib 0.10.1 fuses them, and where the second does not
    divide into its windows (28 x 32 values, say) leaves some out.
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
    """Returns whether a core's cache holds the arrays: those of micro-batches, which batch norm has
    not.
    """
    return _on_cpu() and not over.batch


def _quartered(values: jax.Array) -> jax.Array:
    """Adds the quarters of the height, or halves or thirds where it has no quarters."""
    count = max(count for count in range(1, 5) if values.shape[1] % count == 0)
    return reduce(jnp.add, jnp.split(values, count, axis=1))


def _pool(sums: jax.Array, over: Over) -> jax.Array:
    """Sums f32[N, C] over what shares a statistic: f32[1 or N, groups]."""
    if over.batch:
        sums = _over_images(sums)[None]
        if over.axis is not None:
            sums = lax.psum(sums, over.axis)
    if over.groups == sums.shape[1]:
        return sums
    return sums.reshape(sums.shape[0], over.groups, -1).sum(2)


def _over_images(sums: jax.Array) -> jax.Array:
    """Sums f32[N, C] over the images: f32[C].

    By no product with ones: XLA takes a product in front of it into the same loop, and rounds there
    once or twice by whether it knows that the ones are ones, which it does in programs for one
    device. The bits of a net would depend on how many devices train other nets.
    """
    return sums.sum(0)


def _spread(statistic: jax.Array, inputs: jax.Array) -> jax.Array:
    """A statistic f32[1 or N, groups] at each element it is for: f32[1 or N, 1, 1, C]."""
    return jnp.repeat(statistic, inputs.shape[-1] // statistic.shape[1], 1)[:, None, None, :]


def _count(inputs: jax.Array, over: Over) -> int:
    """Returns how many elements share a statistic."""
    n, height, width, channels = inputs.shape
    images = n * (lax.axis_size(over.axis) if over.axis else 1) if over.batch else 1
    return images * height * width * channels // over.groups


def _statistics(inputs: jax.Array, over: Over) -> Statistics:
    count = _count(inputs, over)
    if over.centered:
        mean = _pool(_by_channel(over, inputs)[0], over) / count
    else:
        mean = jnp.zeros((1 if over.batch else inputs.shape[0], over.groups), inputs.dtype)
    centered = inputs - _spread(mean, inputs)
    squares = jnp.square(centered)
    if not (over.centered and _in_cache(over)):
        return Statistics(mean, _pool(_by_channel(over, squares)[0], over) / count)
    # What rounding left of the mean comes at no cost, and corrects the variance; and the mean too
    # where values would be off by more than a thousandth of a deviation.
    rest, variance = (_pool(sums, over) / count for sums in _by_channel(over, centered, squares))
    mean = jnp.where(jnp.square(rest) > 1e-6 * variance, mean + rest, mean)
    return Statistics(mean, jnp.maximum(variance - jnp.square(rest), 0))


def _normalize_plainly(
    inputs: jax.Array, scale: jax.Array, bias: jax.Array, over: Over
) -> tuple[jax.Array, Statistics]:
    statistics = _statistics(inputs, over)
    factor = lax.rsqrt(statistics.variance + over.epsilon)
    # Else they would be spread over the channels of their group again for each element.
    mean = stored(_spread(statistics.mean, inputs))
    factor = stored(_spread(factor, inputs) * scale[None, None, None])
    return (inputs - mean) * factor + bias[None, None, None], statistics


_normalize = jax.custom_vjp(_normalize_plainly, nondiff_argnums=(3,))


def _normalize_forward(inputs: jax.Array, scale: jax.Array, bias: jax.Array, over: Over):
    outputs, statistics = _normalize(inputs, scale, bias, over)
    return (outputs, statistics), (inputs, scale, statistics)


def _normalize_backward(over: Over, saved, gradients):
    inputs, scale, statistics = saved
    gradient, _ = gradients
    # With x the centered input, r = 1 / sqrt(variance + epsilon) and g = gradient * scale:
    # to_inputs = r * (g - mean(g) - x * r^2 * mean(g x)). Two sums over all elements serve
    # everything.
    count = _count(inputs, over)
    factor = lax.rsqrt(statistics.variance + over.epsilon)
    centered = inputs - _spread(statistics.mean, inputs)
    to_bias, to_scale = _by_channel(over, gradient, gradient * centered)
    mean_gradient = _pool(to_bias * scale[None], over) / count * factor
    if not over.centered:
        mean_gradient = jnp.zeros_like(mean_gradient)
    mean_product = _pool(to_scale * scale[None], over) / count * factor**3
    to_inputs = (
        gradient * (_spread(factor, inputs) * scale[None, None, None])
        - centered * _spread(mean_product, inputs)
        - _spread(mean_gradient, inputs)
    )
    to_scale = to_scale * _spread(factor, inputs)[:, 0, 0, :]
    return to_inputs, _over_images(to_scale), _over_images(to_bias)


_normalize.defvjp(_normalize_forward, _normalize_backward)
