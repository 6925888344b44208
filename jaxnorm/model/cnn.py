"""The CNN: layer tables, and the norm chosen by a field.

`original` is the study's three nets, one for each norm; `matched` is one net, the group net's, in
which only the norm differs; `residual` another one, with residual blocks; `attention` is that one
with channel attention, learned slopes and learned pooling. The names of the layers do not depend on
the norm, so one seed gives the same initial kernels and dropout masks under every norm.

A new norm is one more row of the table of norms (`config.NORMS`); a new net is one more entry in
`ARCHS`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm import norms
from jaxnorm.config import NORMS, Precision, Setting, UserError
from jaxnorm.model import layers
from jaxnorm.model.layers import IMAGE

EPSILON = 1e-5


class Layer(NamedTuple):
    """A row of a layer table.

    kind: "block" is a 3x3 convolution, norm, dropout and ReLU, and no ReLU after a norm that
    activates; "residual" a block that adds, before dropout, what the block before it was given;
    "squeeze" a 1x1 convolution and ReLU; "pool" 2x2 max pooling, stride 2; "mixed-pool" a learned
    mixture of it and of the average; "mean" the average of the top-left `window` x `window` pixels;
    "mean-max" the average of all pixels and their maximum; "head" a 1x1 convolution to the classes.
    No convolution has a bias. A block that `attends` has channel attention after its norm, then the
    shortcut if it is residual, and PReLU in place of ReLU.
    """

    name: str
    kind: Literal["block", "residual", "squeeze", "pool", "mixed-pool", "mean", "mean-max", "head"]
    channels: int = 0
    padding: int = 0
    window: int = 0
    attends: bool = False


BATCH = (
    Layer("C1", "block", 16, padding=1),
    Layer("C2", "block", 32, padding=1),
    Layer("c3", "squeeze", 8, padding=1),  # the study pads this 1x1 convolution too
    Layer("P1", "pool"),
    Layer("C4", "block", 16),
    Layer("C5", "block", 32),
    Layer("C6", "block", 64),
    Layer("c7", "squeeze", 8),
    Layer("P2", "pool"),
    Layer("C8", "block", 16, padding=1),
    Layer("C9", "block", 32, padding=1),
    Layer("C10", "block", 32, padding=1),
    Layer("GAP", "mean", window=4),  # of 5x5 pixels, as in the study
    Layer("c11", "head"),
)
GROUP = (
    Layer("C1", "block", 16),
    Layer("C2", "block", 32),
    Layer("c3", "squeeze", 8),
    Layer("P1", "pool"),
    Layer("C4", "block", 16, padding=1),
    Layer("C5", "block", 32, padding=1),
    Layer("C6", "block", 64, padding=1),
    Layer("c7", "squeeze", 8),
    Layer("P2", "pool"),
    Layer("C8", "block", 16, padding=1),
    Layer("C9", "block", 32, padding=1),
    Layer("C10", "block", 32),
    Layer("GAP", "mean", window=5),
    Layer("c11", "head"),
)
LAYER = (
    Layer("C1", "block", 4),
    Layer("C2", "block", 4),
    Layer("c3", "squeeze", 4),
    Layer("P1", "pool"),
    Layer("C4", "block", 8, padding=1),
    Layer("C5", "block", 16, padding=1),
    Layer("C6", "block", 16, padding=1),
    Layer("c7", "squeeze", 8),
    Layer("P2", "pool"),
    Layer("C8", "block", 16, padding=1),
    Layer("C9", "block", 16, padding=1),
    Layer("C10", "block", 32),
    Layer("GAP", "mean", window=5),
    Layer("c11", "head"),
)
RESIDUAL = (
    Layer("C1", "block", 16, padding=1),
    Layer("C2", "block", 16, padding=1),
    Layer("C3", "residual", 16, padding=1),
    Layer("P1", "pool"),
    Layer("C4", "block", 32, padding=1),
    Layer("C5", "block", 32, padding=1),
    Layer("C6", "residual", 32, padding=1),
    Layer("P2", "pool"),
    Layer("C7", "block", 64, padding=1),
    Layer("GP", "mean-max"),
    Layer("c8", "head"),
)
ATTENTION = tuple(
    layer._replace(kind="mixed-pool")
    if layer.kind == "pool"
    else layer._replace(attends=layer.kind in ("block", "residual"))
    for layer in RESIDUAL
)
ARCHS: dict[str, Callable[[str], tuple[Layer, ...] | None]] = {
    "original": {"batch": BATCH, "group": GROUP, "layer": LAYER}.get,
    "matched": lambda norm: GROUP,
    "residual": lambda norm: RESIDUAL,
    "attention": lambda norm: ATTENTION,
}
"""The layer table of each net, by the norm; None if it has no net for that norm."""


class CNN(nn.Module):
    """The study's small CNN: images f32[N, 32, 32, 3], standardized, to logits f32[N, num_classes].

    In training it needs `rngs={"dropout": key}`, unless `dropout` is 0, and
    `mutable=["batch_stats"]` for batch norm. `fast` layers have the same values as Flax's own.
    `axis_name` is the mesh axis along which devices share a batch, if they do. The settings of
    norms are those of `Config`, and `relaxed` that of batch renormalization, in steps.
    """

    norm: str = "batch"
    arch: str = "original"
    num_classes: int = 10
    groups: int = 4
    dropout: float = 0.1
    precision: Precision = "float32"
    weight_standardization: bool = False
    fast: bool = True
    axis_name: str | None = None
    ghost_size: int = 16
    alpha: float = 0.5
    norm_momentum: float = 0.9
    relaxed: tuple[int, int, int] = norms.BatchRenorm.relaxed

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        first_image: int | jax.Array = 0,
        mask: jax.Array | None = None,  # bool[N]
    ) -> jax.Array:
        """Returns logits f32[N, num_classes] of f32[N, 32, 32, 3].

        `first_image` is the number in its batch of the first image here, which decides its dropout
        mask. Images that the `mask` leaves out take no part in the statistics of a batch; raises
        `ValueError` for one if the norm takes none.
        """
        chex.assert_shape(images, (None, 32, 32, 3))
        chex.assert_type(images, jnp.float32)
        if mask is not None and not layers.takes_masks(self.norm):
            raise ValueError(f"{self.norm} norm takes no mask: give it whole batches")
        L = layers if self.fast else layers.plain
        key = self.make_rng("dropout") if train and self.dropout else None
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32
        activates = self.norm in NORMS and NORMS[self.norm].activates
        x, inputs = images.astype(dtype), []
        for number, layer in enumerate(self.table):
            inputs.append(x)
            match layer.kind:
                case "block" | "residual":
                    x = self.conv(layer, (3, 3), dtype)(x).astype(jnp.float32)
                    norm = self.normalization(train, f"{layer.name}_norm")
                    options = {}
                    if mask is not None and isinstance(norm, nn.BatchNorm):
                        options["mask"] = mask[:, None, None, None]
                    x = layers.same_type(norm(x, **options), x, self.norm)
                    if layer.attends:
                        x = layers.ChannelAttention(name=f"{layer.name}_attention")(x)
                    x = x + inputs[-2] if layer.kind == "residual" else x
                    finish = L.drop if activates or layer.attends else L.dropout_relu
                    x = finish(x.astype(dtype), self.dropout, key, number, first_image)
                    if layer.attends and not activates:
                        x = layers.PReLU(name=f"{layer.name}_prelu")(x)
                case "squeeze":
                    x = L.relu(self.conv(layer, (1, 1), dtype)(x))
                case "pool":
                    x = L.max_pool(x, (2, 2), strides=(2, 2))
                case "mixed-pool":
                    largest = L.max_pool(x, (2, 2), strides=(2, 2))
                    x = layers.Mixture(name=f"{layer.name}_mixture")(largest, layers.mean_pool(x))
                case "mean":
                    x = x[:, : layer.window, : layer.window].mean((1, 2), keepdims=True)
                case "mean-max":
                    pooled = [x.mean((1, 2), keepdims=True), L.global_max(x)]
                    x = jnp.concatenate(pooled, axis=-1)
                case "head":
                    x = self.conv(layer, (1, 1), dtype)(x)
        return x.reshape(x.shape[0], self.num_classes).astype(jnp.float32)

    @nn.nowrap
    def normalization(self, train: bool, name: str | None = None) -> nn.Module:
        """Returns the norm after a 3x3 convolution: from f32[N, H, W, C] to the same shape."""
        L = layers if self.fast else layers.plain
        match self.norm:
            case "batch":  # running averages keep 0.9 of the old value; PyTorch calls it 0.1
                return L.BatchNorm(
                    use_running_average=not train, momentum=self.norm_momentum, epsilon=EPSILON,
                    use_fast_variance=False, axis_name=self.axis_name, name=name,
                )  # fmt: skip
            case "group":
                return L.GroupNorm(self.groups, epsilon=EPSILON, use_fast_variance=False, name=name)
            case "layer":  # in the study's own net: a scale and a bias for each element
                return L.LayerNorm(
                    reduction_axes=IMAGE, feature_axes=IMAGE if self.arch == "original" else -1,
                    epsilon=EPSILON, use_fast_variance=False, name=name,
                )  # fmt: skip
            case "pixel":  # over the channels of each pixel: Flax's default, and ConvNeXt's
                return L.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name=name)
            case "instance":
                return L.InstanceNorm(epsilon=EPSILON, use_fast_variance=False, name=name)
            case "rms":
                return L.RMSNorm(reduction_axes=IMAGE, feature_axes=-1, epsilon=EPSILON, name=name)
        if self.norm not in NORMS:
            return layers.custom_norm(self.norm, train, name)
        path, settings = NORMS[self.norm].path, NORMS[self.norm].settings
        values = {field: getattr(self, own) for field, own in settings.items()}
        module, _, class_name = path.partition(":")
        if self.fast and module == norms.__name__ and hasattr(layers, class_name):
            path = f"{layers.__name__}:{class_name}"
        return layers.custom_norm(path, train, name, **values)

    @nn.nowrap
    def conv(self, layer: Layer, window: tuple[int, int], dtype: jnp.dtype) -> nn.Module:
        """Returns a convolution without a bias, drawn as in PyTorch: uniform, +-1/sqrt(fan_in)."""
        L = layers if self.fast else layers.plain
        kind = L.StandardizedConv if self.weight_standardization else L.Conv
        return kind(
            layer.channels or self.num_classes,
            window,
            padding=layer.padding,
            use_bias=False,
            dtype=dtype,
            # an accelerator's own default for float32 is less than float32
            precision="tensorfloat32" if self.precision == "tf32" else "highest",
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            name=layer.name,
        )

    @property
    def table(self) -> tuple[Layer, ...]:
        """The layer table of this net; raises `UserError` if there is none."""
        if self.arch not in ARCHS:
            raise UserError(Setting("arch", self.arch), f" is wrong: choose {', '.join(ARCHS)}")
        table = ARCHS[self.arch](self.norm)
        if table is None:
            if self.norm not in NORMS:
                layers.custom_class(self.norm)  # a name that is none is what is wrong
            raise UserError(
                Setting("norm", self.norm),
                " has no net in the study: choose batch, group or layer; or ",
                Setting("arch", "matched"),
                ", whose net takes other norms too",
            )
        return table
