"""Fast layers under the names of Flax's and of `jaxnorm.norms`, with their fields, parameters and
values.

Each class is theirs with another `__call__`, or another of the methods that it calls, which is fast
for what the nets use and leaves the rest to its base: no field is ignored. `plain` holds Flax's
layers by Flax's and XLA's own operators, the standard that the fast ones are compared with. Images
are f32[N, H, W, C].
"""

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm import norms
from jaxnorm.config import NORMS, Setting, UserError
from jaxnorm.model.fast import convolution, dropout, norm, pooling, squash

IMAGE = (-3, -2, -1)
"""Height, width and channels: what layer norm and RMS norm take their statistics over."""
_OTHER_MODES = {"train", "training", "is_training", "deterministic"}
"""Other libraries' names for whether a net is trained or evaluated."""


class UnbiasedBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` whose running variance is the unbiased one (n / (n - 1)), as in PyTorch and in
    the study.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes, and in training updates the running averages. `mask` is Flax's: what it
        leaves out takes no part in the statistics.
        """
        if self.use_running_average or self.is_initializing():
            return super().__call__(x, mask=mask)
        if mask is not None and self.axis_name is not None:
            raise ValueError("devices that share a batch would divide by their own counts: no mask")
        old = self.get_variable("batch_stats", "var")
        outputs = super().__call__(x, mask=mask)
        kept = self.momentum * old
        biased = self.get_variable("batch_stats", "var") - kept
        unbiased = biased * _unbiased(self, x, old.size, mask)
        self.put_variable("batch_stats", "var", kept + unbiased)
        return outputs


def _unbiased(module: nn.BatchNorm, x: jax.Array, features: int, mask: jax.Array | None) -> Any:
    """Returns n / (n - 1), n the elements of each feature on all devices that share a batch."""
    count = x.size // features
    if mask is not None:
        count = jnp.broadcast_to(mask, x.shape).sum() // features
    if module.axis_name:
        count = jax.lax.psum(count, module.axis_name, axis_index_groups=module.axis_index_groups)
    return count / jnp.maximum(count - 1, 1)


_READ = {"epsilon", "momentum", "scale_init", "bias_init", "num_groups", "name", "parent"}
"""The fields of norms that all fast ones take at any value."""


def _is_served(module: nn.Module, x: jax.Array, *read: str, **served: Any) -> bool:
    """Returns whether the fast form of a norm computes what the module's fields ask for; if not,
    the module is to call its base, so that no field is ignored.

    A fast form takes f32[N, H, W, C]; the fields of `_READ` and those that it has `read` at any
    value, and each other one at what is `served`, or else at its default. Its variance is always
    that of the centered values.
    """
    values = {field.name: field.default for field in dataclasses.fields(module)}
    if "use_fast_variance" in values:
        values["use_fast_variance"] = False
    values |= served
    fits = (getattr(module, name) == values[name] for name in values.keys() - _READ - {*read})
    return x.ndim == 4 and x.dtype == jnp.float32 and all(fits)


def _normalize(
    module: Any, x: jax.Array, over: norm.Over, mask: jax.Array | None = None
) -> tuple[jax.Array, norm.Statistics]:
    """Normalizes with the module's scale and bias for each channel."""
    return norm.normalize(x, *_scale_and_bias(module, x), over, mask)


def _scale_and_bias(module: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the module's parameters for each channel, f32[C]."""
    scale = module.param("scale", module.scale_init, x.shape[-1:], jnp.float32)
    bias = module.param("bias", module.bias_init, x.shape[-1:], jnp.float32)
    return scale, bias


class BatchNorm(UnbiasedBatchNorm):
    """Batch norm over the whole batch, also if devices share it."""

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes, and in training updates the running averages. `mask` is Flax's; the fast form
        takes one of whole images, bool[N, 1, 1, 1], and divides by their number on all devices.
        """
        served = _is_served(self, x, "axis_name", use_running_average=False)
        served = served and (mask is None or mask.shape == (x.shape[0], 1, 1, 1))
        if self.is_initializing() or not served:
            return super().__call__(x, mask=mask)
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        over = norm.Over(True, channels, epsilon=self.epsilon, axis=self.axis_name)
        of_images = None if mask is None else mask.ravel()
        outputs, statistics = _normalize(self, x, over, of_images)
        unbiased = statistics.variance[0] * _unbiased(self, x, channels, mask)
        kept = self.momentum
        mean.value = kept * mean.value + (1 - kept) * statistics.mean[0]
        variance.value = kept * variance.value + (1 - kept) * unbiased
        return outputs


class GroupNorm(nn.GroupNorm):
    """Group norm: statistics over each image's neighbouring channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes; raises `UserError` if the groups do not divide the channels."""
        channels, groups = x.shape[-1], self.num_groups or 0
        if groups and channels % groups:
            raise UserError(
                Setting("groups", groups),
                f" does not divide the {channels} channels of {self.name}: choose 1, 2, 4, 8 or 16",
            )
        if groups < 1 or not _is_served(self, x):
            return super().__call__(x)
        return _normalize(self, x, norm.Over(False, groups, epsilon=self.epsilon))[0]


class InstanceNorm(nn.InstanceNorm):
    """Instance norm: statistics over each channel of each image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not _is_served(self, x):
            return super().__call__(x)
        over = norm.Over(False, x.shape[-1], epsilon=self.epsilon)
        return _normalize(self, x, over)[0]


class LayerNorm(nn.LayerNorm):
    """Layer norm; fast over height, width and channels, with a scale and a bias for each channel or
    each element.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        over = norm.Over(False, 1, epsilon=self.epsilon)
        if _is_served(self, x, reduction_axes=IMAGE, feature_axes=-1):
            return _normalize(self, x, over)[0]
        if not _is_served(self, x, reduction_axes=IMAGE, feature_axes=IMAGE):
            return super().__call__(x)
        scale = self.param("scale", self.scale_init, x.shape[1:], jnp.float32)
        bias = self.param("bias", self.bias_init, x.shape[1:], jnp.float32)
        ones, zeros = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
        return norm.normalize(x, ones, zeros, over)[0] * scale[None] + bias[None]


class RMSNorm(nn.RMSNorm):
    """RMS norm, which subtracts no mean and has no bias; fast over height, width and channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # of what is not centered there is one variance
        if not _is_served(self, x, "use_fast_variance", reduction_axes=IMAGE):
            return super().__call__(x)
        scale = self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
        over = norm.Over(False, 1, centered=False, epsilon=self.epsilon)
        return norm.normalize(x, scale, jnp.zeros_like(scale), over)[0]


class GhostBatchNorm(norms.GhostBatchNorm):
    """Ghost batch norm, fast if `size` divides the batch."""

    @nn.nowrap
    def by_ghosts(self, x: jax.Array) -> tuple[jax.Array, ...]:
        size = min(self.size, len(x))
        served = _is_served(self, x, "size", "use_running_average", "axis_name")
        if len(x) % size or not served:
            return super().by_ghosts(x)
        # Each ghost becomes one image of size * H rows, normalized as by instance norm.
        tall = x.reshape(-1, size * x.shape[1], *x.shape[2:])
        over = norm.Over(False, x.shape[-1], epsilon=self.epsilon, whole=True)
        outputs, taken = _normalize(self, tall, over)
        return outputs.reshape(x.shape), taken.mean.mean(0), taken.variance.mean(0)


class BatchRenorm(norms.BatchRenorm):
    """Batch renormalization: batch norm with `scale * r` and `bias + scale * d`."""

    @nn.nowrap
    def by_batch(self, x: jax.Array, correction: Callable) -> tuple[jax.Array, ...]:
        limits = ("r_max", "d_max", "relaxed")
        served = _is_served(self, x, *limits, "use_running_average", "axis_name")
        if self.is_initializing() or not served:
            return super().by_batch(x, correction)
        over = norm.Over(True, x.shape[-1], epsilon=self.epsilon, axis=self.axis_name)
        taken = norm.statistics(jax.lax.stop_gradient(x), over)  # those of `normalize`, once in XLA
        m, s = taken.mean[:, None, None], jnp.sqrt(taken.variance + self.epsilon)[:, None, None]
        r, d = (values.ravel() for values in correction(m, s))
        scale, bias = _scale_and_bias(self, x)
        return norm.normalize(x, scale * r, bias + scale * d, over)[0], m, s


class FilterResponseNorm(norms.FilterResponseNorm):
    """Filter response norm, normalized as by instance norm without a mean."""

    @nn.nowrap
    def by_channel(self, x: jax.Array) -> jax.Array:
        if not _is_served(self, x, "threshold_init"):
            return super().by_channel(x)
        over = norm.Over(False, x.shape[-1], centered=False, epsilon=self.epsilon)
        return _normalize(self, x, over)[0]


class EvoNormS0(norms.EvoNormS0):
    """EvoNorm-S0 as one operator."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] % self.groups or not _is_served(self, x, "groups", "v_init"):
            return super().__call__(x)
        v = self.param("v", self.v_init, x.shape[-1:], jnp.float32)
        over = norm.Over(False, self.groups, epsilon=self.epsilon)
        return squash.evonorm_s0(x, v, *_scale_and_bias(self, x), over)


class DynamicErf(norms.DynamicErf):
    """Dynamic erf as one operator."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not _is_served(self, x, "alpha", "shift"):
            return super().__call__(x)
        alpha = self.param("alpha", nn.initializers.constant(self.alpha), (), jnp.float32)
        shift = self.param("shift", nn.initializers.constant(self.shift), (), jnp.float32)
        return squash.dynamic_erf(x, alpha, shift, *_scale_and_bias(self, x))


class Conv(nn.Conv):
    """`nn.Conv`, with gradients that XLA runs fast on a CPU if its stride is 1."""

    conv_general_dilated: Any = convolution.convolve


def _standardized(convolve: Any) -> Any:
    """Returns the convolution with its kernel shifted and scaled to mean 0 and variance 1 / fan-in
    for each output (Qiao et al., "Weight Standardization", 2019).
    """

    def standardized(images: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any):
        fan_in = math.prod(kernel.shape[:-1])
        centered = kernel - kernel.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(centered).mean((0, 1, 2), keepdims=True)
        kernel = centered * jax.lax.rsqrt(fan_in * variance + 1e-5)
        return convolve(images, kernel, *arguments, **options)

    return standardized


class StandardizedConv(nn.Conv):
    """`Conv` with standardized kernels."""

    conv_general_dilated: Any = _standardized(convolution.convolve)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves; raises `ValueError` for what would undo or replace the standardization."""
        for name in ("mask", "conv_general_dilated_cls"):
            if getattr(self, name) is not None:
                raise ValueError(f"StandardizedConv takes no {name}: use nn.Conv")
        return super().__call__(inputs)


class _PlainStandardizedConv(StandardizedConv):
    conv_general_dilated: Any = _standardized(jax.lax.conv_general_dilated)


class ChannelAttention(nn.Module):
    """Efficient channel attention: scales each channel of an image by twice the sigmoid of a
    weighted sum of the means of itself and of its two neighbours (Wang et al., "ECA-Net", 2020).
    The factor of two and weights that start at zero are ours: so it starts as the identity.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # f32[N, H, W, C] -> the same shape
        left, middle, right = self.param("weights", nn.initializers.zeros, (3,))
        means = jnp.pad(x.mean((1, 2)), ((0, 0), (1, 1)))
        sums = left * means[:, :-2] + middle * means[:, 1:-1] + right * means[:, 2:]
        return x * (2 * jax.nn.sigmoid(sums))[:, None, None]


class PReLU(nn.Module):
    """ReLU with a learned slope for the negative values of each channel (He et al., "Delving Deep
    into Rectifiers", 2015), which starts at 0.1, not at their 0.25. `nn.PReLU` has one slope for
    all channels.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # f32 or bf16[N, H, W, C] -> the same
        slopes = self.param("slopes", nn.initializers.constant(0.1), x.shape[-1:])
        return jnp.maximum(x, 0) + slopes.astype(x.dtype)[None, None, None] * jnp.minimum(x, 0)


class Mixture(nn.Module):
    """A mixture of two arrays with a learned share of `first` for each channel, initially
    sigmoid(1) = 0.73 (Lee et al., "Generalizing Pooling Functions in Convolutional Neural
    Networks", 2016).
    """

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Returns share * first + (1 - share) * second, all f32 or bf16[N, H, W, C]."""
        gates = self.param("gates", nn.initializers.ones, first.shape[-1:])
        share = jax.nn.sigmoid(gates).astype(first.dtype)[None, None, None]
        return share * first + (1 - share) * second


def mean_pool(x: jax.Array) -> jax.Array:  # [N, H, W, C] -> [N, H // 2, W // 2, C]
    """Averages 2x2 windows at stride 2; an odd last row or column is left out."""
    n, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    x = x[:, : 2 * rows, : 2 * columns]
    return x.reshape(n, rows, 2, columns, 2, channels).mean((2, 4))


def max_pool(x: jax.Array, window_shape: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Applies `nn.max_pool` of 2x2 windows and stride 2; raises `ValueError` for any other."""
    if tuple(window_shape) != (2, 2) or tuple(strides) != (2, 2):
        raise ValueError("max_pool: only 2x2 windows of stride 2 are supported; use nn.max_pool")
    return pooling.max_pool(x)


global_max, relu = pooling.global_max, dropout.relu


def dropout_relu(
    x: jax.Array, rate: float, key: jax.Array | None, layer: int, first_image: int | jax.Array = 0
) -> jax.Array:
    """Applies dropout and then ReLU; ReLU alone without a key. The mask depends on the key, the
    layer's number and the image's number in its batch alone (`dropout.keep_mask`).
    """
    if key is None:
        return relu(x)
    mask = dropout.keep_mask(key, layer, x.shape, rate, first_image)
    return dropout.dropout_relu(x, mask, rate)


def drop(
    x: jax.Array, rate: float, key: jax.Array | None, layer: int, first_image: int | jax.Array = 0
) -> jax.Array:
    """Applies dropout alone, by the mask of `dropout_relu`; returns `x` without a key."""
    if key is None:
        return x
    return dropout.drop(x, dropout.keep_mask(key, layer, x.shape, rate, first_image), rate)


def _plain_drop(
    x: jax.Array, rate: float, key: jax.Array | None, layer: int, first_image: int | jax.Array = 0
) -> jax.Array:
    if key is None:
        return x
    mask = dropout.keep_mask(key, layer, x.shape, rate, first_image)
    return jnp.where(mask, x / (1 - rate), 0)


def _plain_dropout_relu(
    x: jax.Array, rate: float, key: jax.Array | None, layer: int, first_image: int | jax.Array = 0
) -> jax.Array:
    return nn.relu(_plain_drop(x, rate, key, layer, first_image))


plain = SimpleNamespace(
    BatchNorm=UnbiasedBatchNorm,
    GroupNorm=nn.GroupNorm,
    InstanceNorm=nn.InstanceNorm,
    LayerNorm=nn.LayerNorm,
    RMSNorm=nn.RMSNorm,
    Conv=nn.Conv,
    StandardizedConv=_PlainStandardizedConv,
    max_pool=nn.max_pool,
    global_max=lambda x: nn.max_pool(x, x.shape[1:3]),  # not x.max, see `pooling.global_max`
    relu=nn.relu,
    drop=_plain_drop,
    dropout_relu=_plain_dropout_relu,
)


def same_type(outputs: Any, inputs: jax.Array, norm: str) -> jax.Array:
    """Returns the outputs of a norm; raises `UserError` unless they have the shape and the dtype of
    its inputs. The layers after it would take other numbers of channels and of images too.
    """
    got, wanted = type_text(outputs), type_text(inputs)
    if got != wanted:
        raise UserError(
            Setting("norm", norm),
            f" makes {got} of {wanted}: it must map f32[N, H, W, C] to the same shape",
        )
    return outputs


def type_text(array: Any) -> str:
    """Returns the dtype and shape of an array as text: float32[2, 32, 32, 3]."""
    is_array = hasattr(array, "dtype") and hasattr(array, "shape")
    return f"{array.dtype}{list(array.shape)}" if is_array else f"a {type(array).__name__}"


def custom_class(path: str) -> Any:
    """Returns the class of a norm of the user's own, "package.module:Class"; raises `UserError` if
    there is none.
    """
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise UserError(
            Setting("norm", path),
            f" is wrong: choose {', '.join(NORMS)}, or your own norm as package.module:Class",
        )
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the user's module can fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "; start Python in the folder of its module, or add that folder to PYTHONPATH"
        raise UserError(Setting("norm", path), f" cannot be imported ({reason}){hint}") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(Setting("norm", path), " is no flax.linen.Module")
    return kind


def custom_norm(path: str, train: bool, name: str | None, **settings: Any) -> nn.Module:
    """Returns a norm by the path of its class, with these values of its fields: a Flax module from
    f32[N, H, W, C] to the same shape. Its field `use_running_average`, also an inherited one, is
    False in training and True in evaluation.

    Raises `UserError` if there is no such module, and for a norm that asks in another way
    whether it is trained.
    """
    kind = custom_class(path)
    fields = {field.name for field in dataclasses.fields(kind)}
    if "use_running_average" in fields:
        return kind(use_running_average=not train, name=name, **settings)
    asked = fields | inspect.signature(kind.__call__).parameters.keys()
    if other := asked & {*_OTHER_MODES, "use_running_average"}:
        raise UserError(
            Setting("norm", path),
            f" takes {min(other)}, which is never set: give it a field "
            "use_running_average instead, which is False in training and "
            "True in evaluation",
        )
    return kind(name=name, **settings)


def is_custom(norm: str) -> bool:
    """Returns whether a norm is the user's own, of which nothing is known but its variables."""
    return ":" in norm


def takes_masks(norm: str) -> bool:
    """Returns whether a norm takes batches of which some images do not count: because it is batch
    norm, which takes Flax's mask, or because no image has an effect on another.
    """
    if norm not in NORMS:
        return False
    return norm == "batch" or "axis_name" not in NORMS[norm].settings
