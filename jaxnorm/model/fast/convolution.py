"""Convolution whose gradients XLA runs fast on a CPU.

XLA's own gradients fall to a naive loop inside `lax.scan` (jax-ml/jax#12868). Here both are plain
convolutions, or matrix products for 1x1 kernels, and narrow layers take neighbouring pixels as
channels. Values and gradients are XLA's own within float32 rounding.

Arrays are NHWC and kernels HWIO, float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.model.fast import xla

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    images: jax.Array,  # f32[N, H, W, I]
    kernel: jax.Array,  # f32[h, w, I, O]
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:  # f32[N, H', W', O]
    """Cross-correlates NHWC images with an HWIO kernel; takes what `nn.Conv` passes to
    `lax.conv_general_dilated`: `nn.Conv(conv_general_dilated=convolve)`.

    What the gradients written here do not cover is XLA's own convolution: strides, dilation,
    feature groups, other types than float32, other devices than a CPU (whose float32 has one
    precision).
    """
    options = {"dimension_numbers": _NHWC, **options}
    served = {
        "dimension_numbers": _NHWC,
        "feature_group_count": 1,
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "precision": options.get("precision"),
    }
    fits = all(served.get(name, ...) == value for name, value in options.items())
    fits &= tuple(window_strides) == (1, 1) and images.dtype == kernel.dtype == jnp.float32
    if not fits or not xla.on_cpu():
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    chex.assert_rank([images, kernel], 4)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], (1, 1), padding)
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
    """Correlates images of few channels, "valid", with `fold` neighbouring pixels as channels.

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
        images = xla.stored(images)
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
    gradient = xla.stored(gradient)  # both of its uses below would compute it again
    height, width = kernel.shape[:2]
    (top, bottom), (left, right) = padding
    if (height, width) == (1, 1):
        inner = _pad(gradient, ((-top, -bottom), (-left, -right)))
        to_images = jnp.einsum("nhwo,io->nhwi", inner, kernel[0, 0])
        # XLA transposes the first factor: let that be the smaller one, image by image.
        by_image = jnp.einsum("nhwo,nhwi->noi", inner, images)
        to_kernel = xla.over_images(by_image.reshape(images.shape[0], -1))
        return to_images, to_kernel.reshape(by_image.shape[1:]).T[None, None]
    # An output's gradient goes back through the kernel turned by 180 degrees, channels swapped.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    outer = ((height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right))
    to_images = _correlate(gradient, flipped, outer)
    return to_images, _kernel_gradient(images, gradient, padding)


def _kernel_gradient(images: jax.Array, gradient: jax.Array, padding: Padding) -> jax.Array:
    """Returns the kernel's gradient, a convolution with the batch in the role of the channels.

    It needs both arrays transposed, which is cheap in micro-batches that a core's cache holds. A
    convolution goes to XLA's fastest library if more than 16 channels go in or come out: if the
    batch and the kernel have fewer, strips of rows become images of their own.
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
    size = xla.micro_batch_of(count, 4 * max(images[0].size, gradient[0].size))
    if size == count:
        return of_part(images, gradient)

    def body(i, total):
        cut = (lax.dynamic_slice_in_dim(a, i * size, size) for a in (images, gradient))
        return total + of_part(*cut)

    zeros = jax.eval_shape(of_part, images[:1], gradient[:1])
    return lax.fori_loop(0, count // size, body, jnp.zeros(zeros.shape, zeros.dtype))


_convolution.defvjp(_convolution_forward, _convolution_backward)
