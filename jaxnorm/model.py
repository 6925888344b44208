"""The CNN, its two layer tables, and the norm chosen by a field.

`ORIGINAL` is the study's three nets; `MATCHED` is one net (the group net's geometry) in which only
the norm differs. The names of the layers do not depend on the norm, so one seed gives the same
initial kernels and dropout masks under every norm.

A new norm is one more name in `config.Norm` and one more `case` in `normalization`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm import ops
from jaxnorm.config import ALL, Arch, Norm, Precision, UserError

LARGEST = 50_000
"""The study's cap on parameters."""
EPSILON = 1e-5
STATISTICS_MOMENTUM = 0.9
"""The part of the old value that a running average keeps at each step (PyTorch calls 1 minus this
`momentum`).
"""


@dataclass(frozen=True)
class Layer:
    """One line of a layer table.

    kind: "block" is a 3x3 convolution, norm, dropout and ReLU; "squeeze" a 1x1 convolution and
    ReLU; "pool" 2x2 max pooling, stride 2; "mean" the average of the top-left `window` x `window`
    pixels; "head" a 1x1 convolution to the classes.
    """

    name: str
    kind: Literal["block", "squeeze", "pool", "mean", "head"]
    channels: int = 0
    padding: int = 0
    window: int = 0


def _table(widths: list[int], padding: list[int], window: int) -> tuple[Layer, ...]:
    """Lays `widths` and `padding` (C1 C2 c3 C4 C5 C6 c7 C8 C9 C10) out on the skeleton that every
    net shares.
    """
    layers = []
    for number, (channels, pad) in zip(
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), zip(widths, padding, strict=True), strict=True
    ):
        squeeze = number in (3, 7)
        layers.append(
            Layer(
                f"{'c' if squeeze else 'C'}{number}",
                "squeeze" if squeeze else "block",
                channels,
                pad,
            )
        )
        if squeeze:
            layers.append(Layer(f"P{1 if number == 3 else 2}", "pool"))
    return (*layers, Layer("GAP", "mean", window=window), Layer("c11", "head"))


_WIDE = [16, 32, 8, 16, 32, 64, 8, 16, 32, 32]
_NARROW = [4, 4, 4, 8, 16, 16, 8, 16, 16, 32]
_GROUP_PADDING = [0, 0, 0, 1, 1, 1, 0, 1, 1, 0]

ORIGINAL: dict[Norm, tuple[Layer, ...]] = {
    "batch": _table(_WIDE, [1, 1, 1, 0, 0, 0, 0, 1, 1, 1], window=4),
    "group": _table(_WIDE, _GROUP_PADDING, window=5),
    "layer": _table(_NARROW, _GROUP_PADDING, window=5),
}
MATCHED: tuple[Layer, ...] = ORIGINAL["group"]


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` whose running variance is the unbiased one (n / (n - 1)), as in PyTorch and in
    the study.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, f32[..., C], and in training moves the running averages."""
        moves = not self.use_running_average and not self.is_initializing()
        old = self.get_variable("batch_stats", "var") if moves else 0.0
        outputs = super().__call__(x)
        if moves:
            count = math.prod(x.shape[:-1])
            kept = self.momentum * old
            biased = self.get_variable("batch_stats", "var") - kept
            self.put_variable("batch_stats", "var", kept + biased * (count / max(count - 1, 1)))
        return outputs


class FastBatchNorm(BatchNorm):
    """`BatchNorm`, in training by `ops.normalize`; over the batch of all devices along the mesh
    axis `axis_name`.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, f32[N, H, W, C], and in training moves the running averages."""
        if self.use_running_average or self.is_initializing():
            return super().__call__(x)
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        variance = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", self.bias_init, channels)
        over = ops.Over(True, x.shape[-1], epsilon=self.epsilon, axis=self.axis_name)
        outputs, statistics = ops.normalize(x, scale, bias, over)
        devices = jax.lax.axis_size(self.axis_name) if self.axis_name else 1
        count = devices * math.prod(x.shape[:-1])
        unbiased = statistics.variance[0] * (count / max(count - 1, 1))
        kept = self.momentum
        mean.value = kept * mean.value + (1 - kept) * statistics.mean[0]
        variance.value = kept * variance.value + (1 - kept) * unbiased
        return outputs


class FastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by `ops.normalize`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, f32[N, H, W, C]."""
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        bias = self.param("bias", self.bias_init, x.shape[-1:])
        groups = x.shape[-1] if self.num_groups is None else self.num_groups
        return ops.normalize(x, scale, bias, ops.Over(False, groups, epsilon=self.epsilon))[0]


class FastInstanceNorm(nn.InstanceNorm):
    """`nn.InstanceNorm` by `ops.normalize`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, f32[N, H, W, C]."""
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        bias = self.param("bias", self.bias_init, x.shape[-1:])
        return ops.normalize(x, scale, bias, ops.Over(False, x.shape[-1], epsilon=self.epsilon))[0]


class FastLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over height, width and channels by `ops.normalize`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, f32[N, H, W, C]."""
        by_channel = self.feature_axes == -1
        shape = x.shape[-1:] if by_channel else x.shape[1:]
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", self.bias_init, shape)
        over = ops.Over(False, 1, epsilon=self.epsilon)
        if by_channel:
            return ops.normalize(x, scale, bias, over)[0]
        ones, zeros = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
        return ops.normalize(x, ones, zeros, over)[0] * scale[None] + bias[None]


class FastRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over height, width and channels by `ops.normalize`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x, f32[N, H, W, C]."""
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        over = ops.Over(False, 1, centered=False, epsilon=self.epsilon)
        return ops.normalize(x, scale, jnp.zeros_like(scale), over)[0]


class NoNorm(nn.Module):
    """Leaves its input as it is."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x."""
        return x


def normalization(
    norm: Norm,
    arch: Arch,
    groups: int,
    train: bool,
    name: str | None,
    plain: bool = False,
    axis_name: str | None = None,
) -> nn.Module:
    """The Flax module that normalizes f32[N, H, W, C] after a 3x3 convolution.

    In `original`, layer norm has a scale and a bias for each element, as in the study; elsewhere
    every norm has them for each channel (rms has no bias). `plain` and `axis_name` as in `CNN`.
    """
    options = {"epsilon": EPSILON, "name": name}
    image = (-3, -2, -1)
    match norm:
        case "batch":
            return (BatchNorm if plain else FastBatchNorm)(
                use_running_average=not train,
                momentum=STATISTICS_MOMENTUM,
                use_fast_variance=False,
                axis_name=axis_name,
                **options,
            )
        case "group":
            group_norm = nn.GroupNorm if plain else FastGroupNorm
            return group_norm(groups, use_fast_variance=False, **options)
        case "layer":
            features = image if arch == "original" else -1
            return (nn.LayerNorm if plain else FastLayerNorm)(
                reduction_axes=image, feature_axes=features, use_fast_variance=False, **options
            )
        case "instance":
            instance_norm = nn.InstanceNorm if plain else FastInstanceNorm
            return instance_norm(use_fast_variance=False, **options)
        case "rms":
            rms_norm = nn.RMSNorm if plain else FastRMSNorm
            return rms_norm(reduction_axes=image, feature_axes=-1, **options)
        case "none":
            return NoNorm(name=name)


class CNN(nn.Module):
    """The study's small CNN.

    `plain` builds the same net, parameters and masks from Flax's and XLA's own operators: slow, and
    the standard that the fast operators are held against.

    Called with images f32[N, 32, 32, 3], standardized, it returns logits f32[N, num_classes]. In
    training (`train=True`) it needs `rngs={"dropout": key}` unless `dropout` is 0, and
    `mutable=["batch_stats"]` for batch norm. Images that are a part of a batch say by `first` where
    in it they begin, so that they get its dropout masks; with devices that share a batch along a
    mesh axis, `axis_name` names it. `precision` is that of the convolutions: see `Config`.
    """

    norm: Norm = "batch"
    arch: Arch = "original"
    num_classes: int = 10
    groups: int = 4
    dropout: float = 0.1
    plain: bool = False
    axis_name: str | None = None
    precision: Precision = "float32"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layer table of this net.

        Raises `UserError` where the study has no net for the norm, or groups do not divide.
        """
        if self.arch == "original" and self.norm not in ALL:
            raise UserError(
                f"--norm {self.norm} has no net in the study: add --arch matched, or choose "
                "batch, group or layer"
            )
        layers = MATCHED if self.arch == "matched" else ORIGINAL[self.norm]
        for layer in layers:
            if self.norm == "group" and layer.kind == "block" and layer.channels % self.groups:
                raise UserError(
                    f"--groups {self.groups} does not divide the {layer.channels} channels of "
                    f"layer {layer.name}: choose 1, 2, 4, 8 or 16"
                )
        return layers

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, first: int | jax.Array = 0
    ) -> jax.Array:
        """Logits f32[N, num_classes] of standardized images f32[N, 32, 32, 3]."""
        chex.assert_shape(images, (None, 32, 32, 3))
        chex.assert_type(images, jnp.float32)
        dropout = self.dropout if train else 0.0
        key = self.make_rng("dropout") if dropout else None
        kept = jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32
        x = images.astype(kept)
        for number, layer in enumerate(self.layers):
            match layer.kind:
                case "block":
                    x = self._convolution(layer, 3)(x)
                    x = normalization(
                        self.norm,
                        self.arch,
                        self.groups,
                        train,
                        f"{layer.name}_norm",
                        self.plain,
                        self.axis_name,
                    )(x.astype(jnp.float32)).astype(kept)
                    x = self._dropout_relu(x, key, number, dropout, first)
                case "squeeze":
                    x = nn.relu(self._convolution(layer, 1)(x))
                case "pool":
                    x = nn.max_pool(x, (2, 2), (2, 2)) if self.plain else ops.max_pool(x)
                case "mean":
                    x = x[:, : layer.window, : layer.window].mean((1, 2), keepdims=True)
                case "head":
                    x = self._convolution(layer, 1)(x)
        return x.reshape(x.shape[0], self.num_classes).astype(jnp.float32)

    def _convolution(self, layer: Layer, side: int) -> nn.Conv:
        return nn.Conv(
            layer.channels or self.num_classes,
            (side, side),
            padding=layer.padding,
            use_bias=False,
            dtype=jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32,
            # an accelerator's own default for float32 is less than it
            precision="tensorfloat32" if self.precision == "tf32" else "highest",
            kernel_init=nn.initializers.variance_scaling(
                1 / 3, "fan_in", "uniform"
            ),  # +-1/sqrt(fan_in), PyTorch's
            conv_general_dilated=None if self.plain else ops.convolution,
            name=layer.name,
        )

    def _dropout_relu(
        self,
        x: jax.Array,
        key: jax.Array | None,
        number: int,
        rate: float,
        first: int | jax.Array,
    ) -> jax.Array:
        if key is None:
            return nn.relu(x)
        mask = ops.keep_mask(key, number, x.shape, rate, first)
        return (
            nn.relu(jnp.where(mask, x / (1 - rate), 0))
            if self.plain
            else ops.dropout_relu(x, mask, rate)
        )


def parameter_shapes(model: CNN) -> dict:
    """The shapes of a net's parameters by layer name, without computing any."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]


def count_parameters(model: CNN) -> int:
    """The number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model)))


@dataclass(frozen=True)
class Row:
    """One line of `summarize`: a layer, its output (height, width, channels), the side of the input
    square that one output pixel sees, and its parameters.
    """

    name: str
    shape: tuple[int, int, int]
    receptive_field: int
    kernel: int
    norm: int


def summarize(model: CNN) -> list[Row]:
    """The layer table of a net on 32x32x3 images."""
    params = parameter_shapes(model)
    side, channels, field, jump, rows = 32, 3, 1, 1, []
    for layer in model.layers:
        match layer.kind:
            case "block" | "squeeze" | "head":
                window = 3 if layer.kind == "block" else 1
                side += 2 * layer.padding - window + 1
                channels = layer.channels or model.num_classes
                field += (window - 1) * jump
            case "pool":
                side, field, jump = side // 2, field + jump, jump * 2
            case "mean":
                side, field = 1, field + (layer.window - 1) * jump
        kernel, norm = (
            sum(leaf.size for leaf in jax.tree.leaves(params.get(name, {})))
            for name in (layer.name, f"{layer.name}_norm")
        )
        rows.append(Row(layer.name, (side, side, channels), field, kernel, norm))
    return rows


def activation_bytes(model: CNN, all_layers: bool = False) -> int:
    """The size of one image's largest activation, or of the outputs of all layers together."""
    sizes = [4 * math.prod(row.shape) for row in summarize(model)]
    return sum(sizes) if all_layers else max(sizes)
