"""Parameters, output shapes and memory of a net, without computing any of it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.config import NORMS, Config, Setting, UserError
from jaxnorm.model import arithmetic, layers
from jaxnorm.model.cnn import CNN
from jaxnorm.model.fast import xla
from jaxnorm.records import Layer

CAP = 50_000
"""The study's cap on parameters."""
RELAXED = (0.03, 0.15, 0.25)
"""The shares of a run's steps at which batch renormalization begins to relax its limits, and ends
to relax that of d, and that of r: 5,000, 25,000 and 40,000 steps in the paper, whose runs are of
about 160,000.
"""
_kept: Any = functools.cache  # whose type does not know that Flax's modules can be hashed


def net_of(config: Config, norm: str, num_classes: int, steps: int | None = None) -> CNN:
    """Returns the net of one norm under a configuration; of `steps` training steps in all, if a
    norm is to take its shares of them.
    """
    net = CNN(
        norm,
        config.arch,
        num_classes,
        config.groups,
        config.dropout,
        precision=config.precision,
        weight_standardization=config.weight_standardization,
        ghost_size=config.ghost_size,
        alpha=config.alpha,
        norm_momentum=config.norm_momentum,
    )
    if steps is None or norm not in NORMS or "relaxed" not in NORMS[norm].settings.values():
        return net
    start, of_d, of_r = (round(share * steps) for share in RELAXED)
    return net.clone(relaxed=(start, of_d, of_r))


@_kept  # tracing a net takes a sixth of a second, and a run asks many times
@arithmetic.standard()
def parameter_shapes(net: CNN) -> dict[str, Any]:
    """Returns the shapes of a net's parameters by layer name.

    Raises `UserError` if there is no such net, or if a norm of the user's own is not what training
    takes it for.
    """
    try:
        variables = jax.eval_shape(net.init, jax.random.key(0), _images(1))
        if layers.is_custom(net.norm):
            _check_custom(net, variables)
        return variables.get("params", {})
    except UserError:
        raise
    except Exception as error:
        if not layers.is_custom(net.norm):
            if isinstance(error, ValueError):  # a setting that the norm cannot take
                raise UserError(Setting("norm", net.norm), f": {error}") from None
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            Setting("norm", net.norm),
            " cannot be applied and differentiated: it must map f32[N, "
            "H, W, C] to the same shape, for any N ("
            f"{type(error).__name__}: {reason})",
        ) from None


def _images(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.float32)


def _check_custom(net: CNN, variables: Any) -> None:
    """Applies a net as in training and in evaluation, to two images and to three, and
    differentiates it, all without computing anything. Raises `UserError` for a parameter that is
    not float32, and for state that is a random key or changes its shape or dtype.
    """
    state = dict(variables)
    params, key = state.pop("params"), jax.random.key(0)
    for name, kind in _types(params).items():
        if not kind.startswith("float32["):
            raise UserError(
                Setting("norm", net.norm), f" has a parameter {name} {kind}: it must be float32"
            )
    before = _types(state)
    for name, kind in before.items():
        if kind.startswith("key<"):
            raise UserError(
                Setting("norm", net.norm),
                f" keeps a random key, {name}: what it draws in training "
                "must come from its make_rng('dropout')",
            )

    def objective(params: Any, state: Any, images: jax.Array, key: jax.Array) -> tuple:
        logits, after = net.apply(
            {"params": params, **state},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=list(state),
        )
        return logits.sum(), after

    for count in (2, 3):
        arguments = params, state, _images(count), key
        after = _types(jax.eval_shape(jax.grad(objective, has_aux=True), *arguments)[1])
        if changed := sorted(dict(before.items() ^ after.items())):
            name, nothing = changed[0], "nothing"
            raise UserError(
                Setting("norm", net.norm),
                f" changes its state {name} from {before.get(name, nothing)} to "
                f"{after.get(name, nothing)}: a variable must keep its shape and "
                "dtype, however many images there are, and no value may be "
                "sown",
            )
        jax.eval_shape(net.apply, variables, _images(count))


def _types(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of each array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): layers.type_text(leaf)
        for path, leaf in leaves
    }


def count_parameters(net: CNN) -> int:
    """Returns the number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(net)))


def check_nets(config: Config, num_classes: int) -> dict[str, int]:
    """Returns the number of parameters of each norm's net.

    Raises `UserError` for a net that cannot be built, and for more than 50,000 parameters.
    """
    counts = {}
    for norm in config.norms:
        counts[norm] = count_parameters(net_of(config, norm, num_classes))
        if counts[norm] > CAP and not config.allow_large:
            raise UserError(
                f"the {norm} net has {counts[norm]:,} parameters, more than {CAP:,}: ",
                Setting("allow_large", True),
                " trains it all the same",
            )
    return counts


def summarize(net: CNN) -> list[Layer]:
    """Returns the layers of a net on 32x32x3 images."""
    params = parameter_shapes(net)
    side, channels, field, jump, rows = 32, 3, 1, 1, []
    for layer in net.table:
        match layer.kind:
            case "block" | "residual" | "squeeze" | "head":
                window = 3 if layer.kind in ("block", "residual") else 1
                side += 2 * layer.padding - window + 1
                channels = layer.channels or net.num_classes
                field += (window - 1) * jump
            case "pool" | "mixed-pool":
                side, field, jump = side // 2, field + jump, jump * 2
            case "mean-max":
                field, side, channels = field + (side - 1) * jump, 1, 2 * channels
            case "mean":
                side, field = 1, field + (layer.window - 1) * jump
        kernel, attention, prelu, mixture, norm = (
            sum(leaf.size for leaf in jax.tree.leaves(params.get(f"{layer.name}{part}", {})))
            for part in ("", "_attention", "_prelu", "_mixture", "_norm")
        )
        kernel += attention + prelu + mixture
        rows.append(Layer(layer.name, (side, side, channels), field, kernel, norm))
    return rows


def activation_bytes(net: CNN) -> list[int]:
    """Returns the bytes of one image's output of each layer, in float32."""
    return [4 * math.prod(row.shape) for row in summarize(net)]


def micro_batch(net: CNN, count: int, updated: Any = ()) -> int:
    """Returns how many of `count` images a net takes at a time, so that its largest activation
    stays in a core's cache.

    All of them if the net is plain, and if its images may know of each other: because the norm is
    the user's own, or because state is `updated` by them, as batch norm's is in training.
    """
    if jax.tree.leaves(updated) or layers.is_custom(net.norm) or not net.fast:
        return count
    return xla.micro_batch_of(count, max(activation_bytes(net)))
