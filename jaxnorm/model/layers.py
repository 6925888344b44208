"""Fast layers under Flax's names, with Flax's fields, parameters and values.

Each class is Flax's own with another `__call__`; `plain` holds the same layers by Flax's and XLA's
own operators, the standard that the fast ones are compared with. Images are f32[N, H, W, C].
"""

import dataclasses
import importlib
import inspect
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm.config import UserError
from jaxnorm.model import dropout, ops, pooling

BUILT_IN = ("batch", "group", "layer", "pixel", "instance", "rms", "none")
_OTHER_MODES = {"train", "training", "is_training", "deterministic"}
"""What other libraries call whether a net is trained or evaluated."""


class UnbiasedBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` whose running variance is the unbiased one (n / (n - 1)), as in PyTorch and in
    the study.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes f32[..., C], and in training updates the running averages."""
        updates = not self.use_running_average and not self.is_initializing()
        old = self.get_variable("batch_stats", "var") if updates else 0.0
        outputs = super().__call__(x)
        if updates:
            devices = jax.lax.axis_size(self.axis_name) if self.axis_name else 1
            count = devices * math.prod(x.shape[:-1])
            kept = self.momentum * old
            biased = self.get_variable("batch_stats", "var") - kept
            self.put_variable("batch_stats", "var", kept + biased * (count / max(count - 1, 1)))
        return outputs


class BatchNorm(UnbiasedBatchNorm):
    """Batch norm over the whole batch, also where devices share it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes, and in training updates the running averages."""
        if self.use_running_average or self.is_initializing():
            return super().__call__(x)
        channels, axis_name = x.shape[-1:], self.axis_name
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", self.bias_init, channels)
        over = ops.Over(True, x.shape[-1], epsilon=self.epsilon, axis=axis_name)
        outputs, statistics = ops.normalize(x, scale, bias, over)
        devices = jax.lax.axis_size(axis_name) if axis_name else 1
        count = devices * math.prod(x.shape[:-1])
        unbiased = statistics.variance[0] * (count / max(count - 1, 1))
        kept = self.momentum
        mean.value = kept * mean.value + (1 - kept) * statistics.mean[0]
        variance.value = kept * variance.value + (1 - kept) * unbiased
        return outputs


class GroupNorm(nn.GroupNorm):
    """Group norm: statistics over each image's neighbouring channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes; raises `UserError` where the groups do not divide the channels."""
        channels = x.shape[-1]
        groups = channels if self.num_groups is None else self.num_groups
        if channels % groups:
            raise UserError(
                f"groups={groups} does not divide the {channels} channels of {self.name}: choose "
                "1, 2, 4, 8 or 16"
            )
        return _normalize(self, x, ops.Over(False, groups, epsilon=self.epsilon))


class InstanceNorm(nn.InstanceNorm):
    """Instance norm: statistics over each channel of each image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalize(self, x, ops.Over(False, x.shape[-1], epsilon=self.epsilon))


class LayerNorm(nn.LayerNorm):
    """Layer norm over height, width and channels, with a scale for each channel or each element; or
    over the channels of each pixel.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.reduction_axes == -1:
            return super().__call__(x)
        over = ops.Over(False, 1, epsilon=self.epsilon)
        if self.feature_axes == -1:
            return _normalize(self, x, over)
        scale = self.param("scale", self.scale_init, x.shape[1:])
        bias = self.param("bias", self.bias_init, x.shape[1:])
        ones, zeros = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
        return ops.normalize(x, ones, zeros, over)[0] * scale[None] + bias[None]


class RMSNorm(nn.RMSNorm):
    """RMS norm over height, width and channels: no mean is subtracted, and there is no bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        over = ops.Over(False, 1, centered=False, epsilon=self.epsilon)
        return ops.normalize(x, scale, jnp.zeros_like(scale), over)[0]


class Identity(nn.Module):
    """No norm: returns its input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Conv(nn.Conv):
    """`nn.Conv` of stride 1, with gradients that XLA runs fast on a CPU."""

    conv_general_dilated: Any = ops.convolution


def _standardized(convolution: Any) -> Any:
    """The convolution with its kernel shifted and scaled to mean 0 and variance 1 / fan-in for each
    output (Qiao et al., "Weight Standardization", 2019).
    """

    def standardized(images: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any):
        fan_in = math.prod(kernel.shape[:-1])
        centered = kernel - kernel.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(centered).mean((0, 1, 2), keepdims=True)
        kernel = centered * jax.lax.rsqrt(fan_in * variance + 1e-5)
        return convolution(images, kernel, *arguments, **options)

    return standardized


class StandardizedConv(nn.Conv):
    """`Conv` with standardized kernels."""

    conv_general_dilated: Any = _standardized(ops.convolution)


class _PlainStandardizedConv(nn.Conv):
    conv_general_dilated: Any = _standardized(jax.lax.conv_general_dilated)


def max_pool(x: jax.Array, window_shape: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """`nn.max_pool` of 2x2 windows and stride 2; ValueError for any other."""
    if tuple(window_shape) != (2, 2) or tuple(strides) != (2, 2):
        raise ValueError("max_pool: only 2x2 windows of stride 2 are supported; use nn.max_pool")
    return pooling.max_pool(x)


global_max, relu = pooling.global_max, ops.relu


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


def _plain_dropout_relu(
    x: jax.Array, rate: float, key: jax.Array | None, layer: int, first_image: int | jax.Array = 0
) -> jax.Array:
    if key is not None:
        mask = dropout.keep_mask(key, layer, x.shape, rate, first_image)
        x = jnp.where(mask, x / (1 - rate), 0)
    return nn.relu(x)


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
    dropout_relu=_plain_dropout_relu,
)


def _normalize(module: Any, x: jax.Array, over: ops.Over) -> jax.Array:
    """Normalizes with the module's scale and bias for each channel."""
    scale = module.param("scale", module.scale_init, x.shape[-1:])
    bias = module.param("bias", module.bias_init, x.shape[-1:])
    return ops.normalize(x, scale, bias, over)[0]


def same_type(outputs: Any, inputs: jax.Array, norm: str) -> jax.Array:
    """Returns the outputs of a norm; raises `UserError` unless they have the shape and the dtype of
    its inputs. The layers after it would take other numbers of channels and of images too.
    """
    got, wanted = type_text(outputs), type_text(inputs)
    if got != wanted:
        raise UserError(
            f"norm={norm} makes {got} of {wanted}: it must map f32[N, H, W, C] to the same shape"
        )
    return outputs


def type_text(array: Any) -> str:
    """The dtype and shape of an array, for a person: float32[2, 32, 32, 3]."""
    is_array = hasattr(array, "dtype") and hasattr(array, "shape")
    return f"{array.dtype}{list(array.shape)}" if is_array else f"a {type(array).__name__}"


def custom_class(path: str) -> Any:
    """The class of a norm of the user's own, "package.module:Class"; raises `UserError` where
    there is none.
    """
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise UserError(
            f"norm={path} is wrong: choose {', '.join(BUILT_IN)}, or your own norm as "
            "package.module:Class"
        )
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the user's module can fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "; start Python in the folder of its module, or add that folder to PYTHONPATH"
        raise UserError(f"norm={path} cannot be imported ({reason}){hint}") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"norm={path} is no flax.linen.Module")
    return kind


def custom_norm(path: str, train: bool, name: str | None) -> nn.Module:
    """A norm of the user's own: a Flax module from f32[N, H, W, C] to the same shape. A field
    `use_running_average`, also an inherited one, is set to False in training and to True in
    evaluation.

    Raises `UserError` where there is no such module, and for a norm that asks in another way
    whether it is trained.
    """
    kind = custom_class(path)
    fields = {field.name for field in dataclasses.fields(kind)}
    if "use_running_average" in fields:
        return kind(use_running_average=not train, name=name)
    asked = fields | inspect.signature(kind.__call__).parameters.keys()
    if other := asked & {*_OTHER_MODES, "use_running_average"}:
        raise UserError(
            f"norm={path} takes {min(other)}, which is never set: give it a field "
            "use_running_average instead, which is False in training and True in evaluation"
        )
    return kind(name=name)


def is_custom(norm: str) -> bool:
    """Returns whether a norm is the user's own, of which nothing is known but its variables."""
    return ":" in norm
