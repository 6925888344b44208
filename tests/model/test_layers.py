"""Fast layers under the names of others: every field of theirs is honoured or refused."""

import dataclasses
import sys
from functools import partial
from types import ModuleType

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SOON
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxnorm import norms
from jaxnorm.config import NORMS, Norm, UserError
from jaxnorm.model import layers
from jaxnorm.model.cnn import ARCHS, CNN, Layer

IMAGES = jnp.asarray(np.random.default_rng(1).normal(1, 1, (2, 3, 5, 6, 4)), jnp.float32)
"""Of two devices."""


def drawn(key, shape, dtype):
    """Values that differ, without random bits, which take long to compile."""
    return jnp.cos(jnp.arange(np.prod(shape))).reshape(shape).astype(dtype)


NORM = {"use_fast_variance": False, "scale_init": drawn}
BIASED = NORM | {"bias_init": drawn}
OURS = {"scale_init": drawn, "bias_init": drawn}
TRAINED = {"use_running_average": False}
CONV = {"features": 4, "kernel_size": (3, 3), "kernel_init": drawn, "bias_init": drawn}
LAYERS = {  # ours by what each is served fast, and what it is to equal
    "BatchNorm": (BIASED | TRAINED, nn.BatchNorm),
    "GroupNorm": (BIASED | {"num_groups": 4}, nn.GroupNorm),
    "InstanceNorm": (BIASED, nn.InstanceNorm),
    "LayerNorm": (BIASED | {"reduction_axes": layers.IMAGE}, nn.LayerNorm),
    "RMSNorm": (NORM | {"reduction_axes": layers.IMAGE}, nn.RMSNorm),
    "GhostBatchNorm": (OURS | TRAINED | {"size": 1}, norms.GhostBatchNorm),
    "BatchRenorm": (OURS | TRAINED | {"d_max": 0.5, "relaxed": (-2, 0, 2)}, norms.BatchRenorm),
    "FilterResponseNorm": (OURS, norms.FilterResponseNorm),
    "EvoNormS0": (OURS | {"groups": 2, "v_init": drawn}, norms.EvoNormS0),
    "DynamicErf": (OURS, norms.DynamicErf),
    "Conv": (CONV, nn.Conv),
    "StandardizedConv": (CONV, layers.plain.StandardizedConv),
}
TWICE = {"axis_name": "devices", "axis_index_groups": ((0,), (1,))}
SLOW = ("pixel", "none", "dyt")
"""Norms that have no fast form."""
SETTINGS = {
    "use_running_average": [True],
    "axis": [(1, -1)],
    "momentum": [0.5],
    "epsilon": [0.1],
    **dict.fromkeys(("dtype", "param_dtype"), (jnp.bfloat16,)),
    **dict.fromkeys(("use_bias", "use_scale"), (False,)),
    **dict.fromkeys(("bias_init", "scale_init", "kernel_init"), (nn.initializers.ones,)),
    "size": [2, 3],
    "r_max": [1.1],
    "d_max": [0.1],
    "relaxed": [(-1, 1, 3)],
    "threshold_init": [nn.initializers.ones],
    "groups": [4],
    "v_init": [nn.initializers.ones],
    "alpha": [0.9],
    "shift": [-0.3],
    "axis_name": ["devices"],
    "axis_index_groups": [TWICE],
    "use_fast_variance": [True],
    "force_float32_reductions": [{"force_float32_reductions": False, "param_dtype": jnp.bfloat16}],
    "num_groups": [2],
    "group_size": [{"num_groups": None, "group_size": 1}],
    "reduction_axes": [-1, (-2, -1)],
    "feature_axes": [layers.IMAGE, (-2, -1)],
    "features": [6],
    "kernel_size": [(1, 2), (3,)],
    "strides": [2],
    "padding": ["VALID", "CIRCULAR", ((2, 0), (0, 1))],
    "input_dilation": [{"input_dilation": 2, "padding": 1}],
    "kernel_dilation": [(1, 2)],
    "feature_group_count": [2],
    "mask": [jnp.ones((3, 3, 4, 4)).at[0].set(0)],
    "precision": ["high"],
    "promote_dtype": [lambda *arrays, dtype: [None if a is None else 2 * a for a in arrays]],
    "conv_general_dilated": [lax.conv_general_dilated],
    "conv_general_dilated_cls": [lambda: lax.conv_general_dilated],
}
"""Other values than `LAYERS` has, for each field; with what else a value needs."""
REFUSED = {("StandardizedConv", "mask"), ("StandardizedConv", "conv_general_dilated_cls")}
CASES = [
    pytest.param(name, field.name, value, id=f"{name}-{field.name}-{number}")
    for name, (_, flax) in LAYERS.items()
    for field in dataclasses.fields(flax)
    if field.name not in ("name", "parent")
    for number, value in enumerate(SETTINGS[field.name])
]


def in_training(module, images):
    """The module's outputs for the images, and its variables afterwards."""
    variables = module.init(jax.random.key(3), images)
    return module.apply(variables, images, mutable=True)


def on_devices(module, images):
    """The same on two devices, of which each has its part of the images."""
    apply = partial(in_training, module)
    if not getattr(module, "axis_name", None):
        return apply(images[0])
    if not getattr(module, "axis_index_groups", None):
        return jax.vmap(apply, axis_name="devices")(images)
    of_each = jax.shard_map(
        lambda images: jax.tree.map(lambda leaf: leaf[None], apply(images[0])),
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:2]), "devices"),
        in_specs=P("devices"),
        out_specs=P("devices"),
        check_vma=False,
    )
    return jax.jit(of_each)(np.asarray(images))


@pytest.mark.parametrize(("name", "field", "value"), CASES)
def test_each_field_is_the_bases_or_refused(name, field, value):
    settings, flax = LAYERS[name]
    settings = settings | (value if isinstance(value, dict) else {field: value})
    ours = getattr(layers, name)(**settings)
    if (name, field) in REFUSED:
        with pytest.raises(ValueError, match=f"takes no {field}"):
            on_devices(ours, IMAGES)
        return
    # A mean at which rounding spoils the variance of Flax's `use_fast_variance`.
    images = IMAGES + 3_000 if field == "use_fast_variance" else IMAGES
    outputs, variables = on_devices(ours, images)
    wanted, wanted_variables = on_devices(flax(**settings), images)
    chex.assert_trees_all_equal_shapes_and_dtypes((outputs, variables), (wanted, wanted_variables))
    np.testing.assert_allclose(outputs, wanted, atol=2e-5)
    if name == "BatchNorm":  # its variance is that of the test below
        for tree in (variables, wanted_variables):
            tree["batch_stats"].pop("var")
    chex.assert_trees_all_close(variables, wanted_variables, rtol=1e-5)


@pytest.mark.parametrize("kind", [layers.BatchNorm, layers.UnbiasedBatchNorm])
@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 90), ({"axis": (1, -1)}, 18), ({"axis_name": "devices"}, 180), (TWICE, 90)],
)
def test_the_running_variance_is_the_unbiased_one(kind, settings, count):
    settings = LAYERS["BatchNorm"][0] | {"momentum": 0.5} | settings
    biased = on_devices(nn.BatchNorm(**settings), IMAGES)[1]["batch_stats"]["var"] - 0.5
    variance = on_devices(kind(**settings), IMAGES)[1]["batch_stats"]["var"]
    np.testing.assert_allclose(variance - 0.5, biased * count / (count - 1), rtol=1e-5)


@pytest.mark.parametrize(
    "module",
    [layers.BatchNorm(), layers.GroupNorm(2, 2)]
    + [layers.GroupNorm(groups) for groups in (None, -1, 3)],
)
def test_what_flax_refuses_is_refused(module):
    with pytest.raises((ValueError, UserError)):
        on_devices(module, IMAGES)


@pytest.mark.parametrize(
    ("norm", "arch"),
    [(norm, "residual") for norm in NORMS if norm not in SLOW] + [("layer", "original")],
)
def test_the_nets_own_layers_are_the_fast_ones(norm, arch):
    """A fast layer leaves other settings than theirs to Flax, and no value would show it."""
    net = CNN(norm, arch, ghost_size=len(IMAGES[0]))
    for module in (net.conv(net.table[0], (3, 3), jnp.float32), net.normalization(True)):
        program = jax.make_jaxpr(partial(in_training, module))(IMAGES[0])
        assert "custom_vjp" in str(program)
    plain = net.clone(fast=False)  # what the self-check compares them with
    for module in (plain.conv(net.table[0], (3, 3), jnp.float32), plain.normalization(True)):
        assert "custom_vjp" not in str(jax.make_jaxpr(partial(in_training, module))(IMAGES[0]))


def test_only_the_norms_of_jaxnorm_have_fast_forms(monkeypatch):
    elsewhere = ModuleType("elsewhere")
    elsewhere.BatchRenorm = norms.Identity
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    monkeypatch.setitem(NORMS, "renorm", Norm("of the same name", "elsewhere:BatchRenorm"))
    assert type(CNN("renorm").normalization(True)) is norms.Identity


def test_renormalization_sums_no_more_than_batch_norm():
    """Its statistics, taken once for r and d and once by `normalize`, are one in the program."""

    def sums(kind):
        module = kind(**TRAINED, **OURS)
        variables = module.init(jax.random.key(0), IMAGES[0])

        def loss(params, images):
            both = {**variables, "params": params}
            outputs, state = module.apply(both, images, mutable=["batch_stats"])
            return jnp.square(outputs).sum(), state

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        compiled = gradient.lower(variables["params"], IMAGES[0]).compile().as_text()
        return compiled.count(" dot(")

    fast = partial(layers.BatchNorm, use_fast_variance=False)
    assert sums(layers.BatchRenorm) == sums(fast) > 0


def test_channel_attention_slopes_and_mixtures_equal_the_closed_forms():
    x = np.random.default_rng(3).normal(size=(2, 4, 6, 5)).astype(np.float32)
    weights = np.array([0.5, -1.0, 2.0], np.float32)
    out = layers.ChannelAttention().apply({"params": {"weights": weights}}, x)
    means = x.astype(np.float64).mean((1, 2))
    beside = np.pad(means, ((0, 0), (1, 1)))
    sums = 0.5 * beside[:, :-2] - means + 2 * beside[:, 2:]
    np.testing.assert_allclose(out, x * (2 / (1 + np.exp(-sums)))[:, None, None], atol=1e-5)
    slopes = np.linspace(-0.5, 1, 5).astype(np.float32)
    out = layers.PReLU().apply({"params": {"slopes": slopes}}, x)
    np.testing.assert_allclose(out, np.where(x > 0, x, slopes * x), atol=1e-6)
    pooled = layers.mean_pool(x)
    assert pooled.shape == (2, 2, 3, 5)
    np.testing.assert_allclose(pooled[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)), atol=1e-6)
    largest = np.asarray(layers.max_pool(x, (2, 2), (2, 2)))
    gates = np.linspace(-2, 2, 5).astype(np.float32)
    out = layers.Mixture().apply({"params": {"gates": gates}}, largest, pooled)
    share = 1 / (1 + np.exp(-gates.astype(np.float64)))
    np.testing.assert_allclose(out, share * largest + (1 - share) * pooled, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_attention_net_is_the_residual_net_if_its_own_parameters_are_neutral(norm):
    residual, attention = (CNN(norm, a, dropout=0.0) for a in ("residual", "attention"))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    of = [
        jax.jit(n.init, **SOON)(jax.random.key(2), images)["params"] for n in (residual, attention)
    ]
    shared = {name: leaves for name, leaves in of[1].items() if name in of[0]}
    chex.assert_trees_all_equal(shared, of[0])
    neutral = {"attention": 0.0, "prelu": 0.0, "mixture": 60.0}  # sigmoid(60) is 1
    changed = {
        name: jax.tree.map(lambda leaf, n=name: jnp.full_like(leaf, neutral[n.split("_")[1]]), tree)
        for name, tree in of[1].items()
        if name not in of[0]
    }
    assert len(changed) == 7 + 7 + 2

    def logits(net, params):
        rngs = {"dropout": jax.random.key(0)}
        apply = partial(net.apply, train=True, rngs=rngs, mutable=["batch_stats"])
        state = jax.eval_shape(net.init, jax.random.key(0), images).get("batch_stats", {})
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), state)
        return jax.jit(apply, **SOON)({"params": params, "batch_stats": zeros}, images)[0]

    wanted = logits(residual, of[0])
    np.testing.assert_allclose(logits(attention, {**shared, **changed}), wanted, atol=1e-5)
    assert not np.allclose(logits(attention, of[1]), wanted, atol=1e-3)


def test_attention_comes_before_the_shortcut_and_slopes_after_it(monkeypatch):
    blocks = [Layer(n, k, 3, 1, attends=True) for n, k in (("C1", "block"), ("C2", "residual"))]
    net = (*blocks, Layer("GP", "mean-max"), Layer("c3", "head"))
    monkeypatch.setitem(ARCHS, "two-blocks", lambda norm: net)
    model = CNN("none", "two-blocks", dropout=0.0)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    params = model.init(jax.random.key(2), images)["params"]
    noise = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: leaf + noise.normal(size=leaf.shape) / 3, params)

    def part(kind, name, *x):
        return kind.apply({"params": params[name]}, *x)

    def convolved(name, x):
        conv = nn.Conv(params[name]["kernel"].shape[-1], (3, 3), padding=1, use_bias=False)
        return part(layers.ChannelAttention(), f"{name}_attention", part(conv, name, x))

    x = part(layers.PReLU(), "C1_prelu", convolved("C1", images))
    x = part(layers.PReLU(), "C2_prelu", convolved("C2", x) + images)
    pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)
    wanted = pooled @ params["c3"]["kernel"][0, 0]
    np.testing.assert_allclose(model.apply({"params": params}, images), wanted, atol=1e-4)
