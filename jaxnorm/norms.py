"""The norms, as Flax modules for any model: `from jaxnorm.norms import BatchRenorm`.

Batch, group and layer norm are Flax's own; pixel, instance and RMS norm are one of Flax's with the
axes that the name stands for; the others are written here. All map f32[N, H, W, C] to the same
shape, those written here f32[N, ..., C]. Fields are named as Flax names its own: statistics are of
float32 at least, and `dtype` is that of the result (default: of the input and the parameters).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

ones, zeros = nn.initializers.ones, nn.initializers.zeros

BatchNorm = nn.BatchNorm
"""(x - mean) / sqrt(var + epsilon) * scale + bias over N, H and W (Ioffe and Szegedy, "Batch
Normalization", 2015, arXiv 1502.03167). Running averages of mean and variance, the biased one, lie
in `batch_stats`.
"""
GroupNorm = nn.GroupNorm
"""The same over H, W and the channels of a group of each image (Wu and He, "Group Normalization",
2018, arXiv 1803.08494).
"""
InstanceNorm = nn.InstanceNorm
"""The same over H and W of each channel of each image (Ulyanov, Vedaldi and Lempitsky, "Instance
Normalization", 2016, arXiv 1607.08022).
"""


class LayerNorm(nn.LayerNorm):
    """The same over H, W and C of each image, scale and bias for each channel (Ba, Kiros and
    Hinton, "Layer Normalization", 2016, arXiv 1607.06450).

    The last three axes: inputs of fewer, such as tokens f32[N, T, C], need other `reduction_axes`,
    or they are averaged over N too.
    """

    reduction_axes: int | Sequence[int] = (-3, -2, -1)


class PixelNorm(nn.LayerNorm):
    """The same over the channels of each pixel: Flax's default of `nn.LayerNorm`, and ConvNeXt's
    (Liu et al., "A ConvNet for the 2020s", 2022, arXiv 2201.03545).
    """


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * scale over H, W and C of each image (Zhang and Sennrich,
    "Root Mean Square Layer Normalization", 2019, arXiv 1910.07467). Its axes are `LayerNorm`'s.
    """

    reduction_axes: int | Sequence[int] = (-3, -2, -1)


class Identity(nn.Module):
    """No norm: returns its input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class GhostBatchNorm(nn.Module):
    """Batch norm of each ghost: `size` neighbouring images of the batch, fewer in the last one.

    (x - mean) / sqrt(var + epsilon) * scale + bias, mean and (biased) var f32[C] being those of the
    ghost; in evaluation the running averages, `mean` and `var` f32[C] in `batch_stats`.

    Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017, arXiv 1705.08741. The paper
    updates running averages of mean and deviation ghost by ghost. Here one update a step takes what
    Flax's batch norm averages, mean and variance: their mean over the batch's images, each image
    having its ghost's. Devices that share a batch along `axis_name` have ghosts of their own, and
    the same averages.
    """

    size: int = 32
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    scale_init: Callable = ones
    bias_init: Callable = zeros
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalizes, and in training updates the running averages."""
        evaluates = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        running = [_running(self, name, init, x) for name, init in (("mean", zeros), ("var", ones))]
        x = _exact(x)
        if evaluates:
            mean, var = (_spread(average.value, x) for average in running)
            return _scaled(self, (x - mean) * lax.rsqrt(var + self.epsilon))
        outputs, *of_batch = self.by_ghosts(x)
        for average, value in zip(running, of_batch, strict=True):
            _update(self, average, value)
        return outputs

    @nn.nowrap
    def by_ghosts(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns x f32[N, ..., C] normalized, scaled and shifted, and the mean over these images
        of `mean` and of `var`, f32[C].
        """
        full, parts, sums = len(x) // self.size * self.size, [], []
        for ghosts in (x[:full].reshape(-1, self.size, *x.shape[1:]), x[None, full:]):
            if ghosts.size:
                mean, var = _moments(ghosts, tuple(range(1, x.ndim)))
                parts.append((ghosts - mean) * lax.rsqrt(var + self.epsilon))
                ghost_axes = tuple(range(x.ndim))
                sums.append([ghosts.shape[1] * m.sum(ghost_axes) for m in (mean, var)])
        mean, var = (jnp.stack(of_parts).sum(0) / len(x) for of_parts in zip(*sums, strict=True))
        outputs = jnp.concatenate([part.reshape(-1, *x.shape[1:]) for part in parts])
        return _scaled(self, outputs), mean, var


class BatchRenorm(nn.Module):
    """Batch norm, corrected to what evaluation computes: ((x - m) / s * r + d) * scale + bias.

    m and s = sqrt(var + epsilon) f32[C] are of the batch, with the biased variance; r = s / sigma
    within 1 / r_limit and r_limit, and d = (m - mu) / sigma within -d_limit and d_limit, are
    constants to the gradient. mu and sigma are the running averages of m and s before this batch,
    `mean` and `deviation` f32[C] in `batch_stats`; evaluation is (x - mu) / sigma * scale + bias.
    After `relaxed[0]` steps, which `step` i32[] in `batch_stats` counts, the limits relax from
    batch norm's 1 and 0 in straight lines: to `d_max` at step `relaxed[1]`, to `r_max` at
    `relaxed[2]`.

    Ioffe, "Batch Renormalization", 2017, arXiv 1702.03275. The paper's own limits and steps are the
    defaults; its epsilon it does not say. Devices that share a batch along `axis_name` take its
    statistics together.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    relaxed: tuple[int, int, int] = (5_000, 25_000, 40_000)
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    scale_init: Callable = ones
    bias_init: Callable = zeros
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalizes, and in training updates the running averages and counts the step."""
        evaluates = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        mean, deviation = _running(self, "mean", zeros, x), _running(self, "deviation", ones, x)
        step = self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.int32))
        x = _exact(x)
        mu, sigma = _spread(mean.value, x), _spread(deviation.value, x)
        if evaluates:
            return _scaled(self, (x - mu) / sigma)
        start, *ends = self.relaxed
        of_d, of_r = (jnp.clip((step.value - start) / max(end - start, 1), 0, 1) for end in ends)
        r_limit, d_limit = 1 + (self.r_max - 1) * of_r, self.d_max * of_d

        def correction(m: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
            r = jnp.clip(s / sigma, 1 / r_limit, r_limit)
            d = jnp.clip((m - mu) / sigma, -d_limit, d_limit)
            return lax.stop_gradient(r), lax.stop_gradient(d)

        outputs, m, s = self.by_batch(x, correction)
        for average, value in ((mean, m), (deviation, s)):
            _update(self, average, value.reshape(-1))
        if not self.is_initializing():
            step.value += 1
        return outputs

    @nn.nowrap
    def by_batch(self, x: jax.Array, correction: Callable) -> tuple[jax.Array, ...]:
        """Returns x f32[N, ..., C] normalized, corrected, scaled and shifted, and m and s, f32[1,
        ..., C]. `correction(m, s)` returns r and d of their shape.
        """
        axis = None if self.is_initializing() else self.axis_name
        m, var = _moments(x, tuple(range(x.ndim - 1)), axis)
        s = jnp.sqrt(var + self.epsilon)
        r, d = correction(m, s)
        return _scaled(self, (x - m) / s * r + d), m, s


class FilterResponseNorm(nn.Module):
    """Filter response norm with its activation, the thresholded linear unit (TLU):
    max(x / sqrt(mean(x^2) + epsilon) * scale + bias, threshold), the mean over H and W of each
    channel of each image, the threshold f32[C] a parameter. No state.

    Singh and Krishnan, "Filter Response Normalization Layer", 2020, arXiv 1911.09737. The epsilon
    is the paper's for maps of several pixels, for which it is not learned.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    scale_init: Callable = ones
    bias_init: Callable = zeros
    threshold_init: Callable = zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes and activates."""
        y = self.by_channel(_exact(x))
        return jnp.maximum(y, _param(self, "threshold", self.threshold_init, x).astype(y.dtype))

    @nn.nowrap
    def by_channel(self, x: jax.Array) -> jax.Array:
        """Returns x f32[N, ..., C] normalized, scaled and shifted."""
        squares = jnp.square(x).mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        return _scaled(self, x * lax.rsqrt(squares + self.epsilon))


class EvoNormS0(nn.Module):
    """EvoNorm-S0, a norm and activation in one: x * sigmoid(v x) / sqrt(var + epsilon) * scale +
    bias, the (biased) variance over H, W and the channels of a group of each image; v f32[C] is a
    parameter, 1 at first. No state.

    Liu et al., "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967. A group is of
    neighbouring channels, and epsilon 1e-5, as in the paper's code.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = None
    scale_init: Callable = ones
    bias_init: Callable = zeros
    v_init: Callable = ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes and activates; raises `ValueError` for groups that do not divide the
        channels.
        """
        if x.shape[-1] % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the {x.shape[-1]} channels of {self.name}"
            )
        x = _exact(x)
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        _, var = _moments(grouped, (*range(1, x.ndim - 1), x.ndim))
        inverse = jnp.broadcast_to(lax.rsqrt(var + self.epsilon), grouped.shape).reshape(x.shape)
        return _scaled(self, x * nn.sigmoid(x * _param(self, "v", self.v_init, x)) * inverse)


class DynamicTanh(nn.Module):
    """Dynamic tanh (DyT), which takes no statistics: tanh(alpha x) * scale + bias, alpha f32[] a
    parameter with the initial value of the field. No state.

    Zhu et al., "Transformers without Normalization", 2025, arXiv 2503.10622; alpha is 0.5 at first,
    as in the paper outside of language models.
    """

    alpha: float = 0.5
    dtype: Any = None
    scale_init: Callable = ones
    bias_init: Callable = zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Squashes each element."""
        return _scaled(self, jnp.tanh(_scalar(self, "alpha", self.alpha) * _exact(x)))


class DynamicErf(nn.Module):
    """Dynamic erf (Derf), which takes no statistics: erf(alpha x + shift) * scale + bias, alpha and
    shift f32[] parameters with the initial values of the fields. No state.

    Chen et al., "Stronger Normalization-Free Transformers", 2025, arXiv 2512.10938; 0.5 and 0 at
    first, as in the authors' code.
    """

    alpha: float = 0.5
    shift: float = 0.0
    dtype: Any = None
    scale_init: Callable = ones
    bias_init: Callable = zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Squashes each element."""
        alpha, shift = _scalar(self, "alpha", self.alpha), _scalar(self, "shift", self.shift)
        return _scaled(self, lax.erf(alpha * _exact(x) + shift))


def _exact(x: jax.Array) -> jax.Array:
    """Returns x in float32, or in what is more exact."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns values f32[C] in as many dimensions as x f32[..., C]."""
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def _param(module: nn.Module, name: str, init: Callable, x: jax.Array) -> jax.Array:
    """Returns a parameter f32[C], in as many dimensions as x f32[..., C]."""
    return _spread(module.param(name, init, x.shape[-1:], jnp.float32), x)


def _scalar(module: nn.Module, name: str, value: float) -> jax.Array:
    """Returns a parameter f32[] with this initial value."""
    return module.param(name, nn.initializers.constant(value), (), jnp.float32)


def _scaled(module: Any, x: jax.Array) -> jax.Array:
    """Returns x * scale + bias in the module's dtype."""
    scale = _param(module, "scale", module.scale_init, x)
    bias = _param(module, "bias", module.bias_init, x)
    return (x * scale + bias).astype(module.dtype or x.dtype)


def _moments(
    x: jax.Array, axes: tuple[int, ...], axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean over these axes, and over devices, and the mean square of what is left."""

    def mean(values: jax.Array) -> jax.Array:
        values = values.mean(axes, keepdims=True)
        return values if axis_name is None else lax.pmean(values, axis_name)

    center = mean(x)
    return center, mean(jnp.square(x - center))


def _running(module: nn.Module, name: str, init: Callable, x: jax.Array) -> nn.Variable:
    """Returns a running average f32[C]."""
    shape = x.shape[-1:]
    return module.variable("batch_stats", name, lambda: init(None, shape, jnp.float32))


def _update(module: Any, average: nn.Variable, value: jax.Array) -> None:
    """Moves a running average to the value, the mean of those of the devices that share a batch."""
    if module.is_initializing():
        return
    if module.axis_name is not None:
        value = lax.pmean(value, module.axis_name)
    average.value = module.momentum * average.value + (1 - module.momentum) * value
