"""The nets: sizes, layer tables, each norm against its closed form, and what a norm may look at."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SOON

from jaxnorm.config import NORMS, UserError
from jaxnorm.model import cnn, summary
from jaxnorm.model.cnn import CNN
from jaxnorm.model.fast import dropout


def normalization(norm, arch="matched", groups=4, train=True, name=None):
    return CNN(norm, arch, groups=groups).normalization(train, name)


def initial(net, seed, images):
    """The net's initial variables."""
    return jax.jit(net.init, **SOON)(jax.random.key(seed), images)


RNG = np.random.default_rng(1)
ALL_NORMS = ("batch", "group", "layer", "pixel", "instance", "rms")
"""Those of Flax's own classes; `test_norms.py` has them all."""


@pytest.mark.parametrize(
    ("norm", "arch", "count"),
    [
        ("batch", "original", 45_776),
        ("group", "original", 45_776),
        ("layer", "original", 46_412),
        ("batch", "matched", 45_776),
        ("group", "matched", 45_776),
        ("layer", "matched", 45_776),
        ("instance", "matched", 45_776),
        ("rms", "matched", 45_536),
        ("none", "matched", 45_296),
    ],
)
def test_parameters_are_counted_exactly(norm, arch, count):
    net = CNN(norm, arch)
    assert summary.count_parameters(net) == count
    assert sum(row.kernel + row.norm for row in summary.summarize(net)) == count


@pytest.mark.parametrize(("norm", "window"), [("batch", 4), ("group", 5), ("layer", 5)])
def test_the_layer_table_tells_the_shapes_that_the_net_has(norm, window):
    net = CNN(norm)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(net.init, jax.random.key(0), images)

    def layers(variables):
        return net.apply(variables, images, capture_intermediates=True, mutable="intermediates")

    seen = jax.eval_shape(layers, variables)[1]["intermediates"]
    rows = {row.name: row for row in summary.summarize(net)}
    for name in (f"{'c' if i in (3, 7, 11) else 'C'}{i}" for i in range(1, 12)):
        assert (2, *rows[name].shape) == seen[name]["__call__"][0].shape
    fields = [3, 5, 5, 6, 10, 14, 18, 18, 20, 28, 36, 44, 44 + 4 * (window - 1)]
    assert [row.receptive_field for row in rows.values()] == [*fields, fields[-1]]


def test_the_matched_net_is_the_studys_group_net():
    assert cnn.ARCHS["original"]("group") == cnn.ARCHS["matched"]("layer")
    modules = [normalization("group", arch, 4, True, "n") for arch in ("original", "matched")]
    assert modules[0] == modules[1]


def test_feature_maps_have_the_sides_of_the_studys_page():
    sides = {
        "batch": [32, 32, 34, 17, 15, 13, 11, 11, 5, 5, 5, 5, 1, 1],
        "group": [30, 28, 28, 14, 14, 14, 14, 14, 7, 7, 7, 5, 1, 1],
    }
    sides["layer"] = sides["group"]
    for norm, wanted in sides.items():
        assert [row.shape[0] for row in summary.summarize(CNN(norm))] == wanted


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("train", [False, True])
def test_logits_have_a_row_for_each_image_and_a_column_for_each_class(classes, train):
    net = CNN("batch", "matched", num_classes=classes)

    def logits(images):
        variables = net.init(jax.random.key(0), images)
        rngs = {"dropout": jax.random.key(1)}
        return net.apply(variables, images, train=train, rngs=rngs, mutable=["batch_stats"])[0]

    outputs = jax.eval_shape(logits, jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32))
    chex.assert_shape(outputs, (5, classes))
    assert outputs.dtype == jnp.float32


@pytest.mark.parametrize("images", [jnp.zeros((2, 28, 28, 1)), jnp.zeros((2, 32, 32, 3), "uint8")])
def test_other_images_are_refused(images):
    with pytest.raises(AssertionError):
        CNN("group").init(jax.random.key(0), images)


def test_groups_that_do_not_divide_and_norms_without_a_net_are_refused():
    with pytest.raises(UserError, match="groups=3 does not divide the 16 channels of C1"):
        summary.summarize(CNN("group", groups=3))
    assert summary.summarize(CNN("batch", groups=3))
    with pytest.raises(UserError, match="arch=matched"):
        summary.summarize(CNN("rms"))


def closed_form(norm: str, x: np.ndarray, scale, bias, cotangent, groups: int):
    """A norm and its gradients in float64, from the formula: y = (x - m) / sqrt(v + eps) * s + b.

    With u = dL/dy * s and z = (x - m) / sqrt(v + eps), and means over what the norm averages over,
    dL/dx = (u - mean(u) - z mean(u z)) / sqrt(v + eps); rms norm has m = 0 and no mean(u).
    """
    x, cotangent = x.astype(np.float64), cotangent.astype(np.float64)
    n, h, w, c = x.shape
    groups = {"instance": c, "group": groups}.get(norm, 1)
    of_group = (n, h, w, groups, c // groups), (1, 2, 4)
    shape, axes = {"batch": (x.shape, (0, 1, 2)), "pixel": (x.shape, 3)}.get(norm, of_group)

    def mean(values):
        return np.broadcast_to(values.reshape(shape).mean(axes, keepdims=True), shape).reshape(
            x.shape
        )

    m = 0 if norm == "rms" else mean(x)
    inverse = 1 / np.sqrt(mean((x - m) ** 2) + 1e-5)
    z = (x - m) * inverse
    u = cotangent * scale
    to_x = (u - (0 if norm == "rms" else mean(u)) - z * mean(u * z)) * inverse
    summed = tuple(range(4 - np.ndim(scale)))
    return z * scale + bias, to_x, (cotangent * z).sum(summed), cotangent.sum(summed)


@pytest.mark.parametrize("spread", [1.0, 3e-3], ids=["unit", "near-eps"])
@pytest.mark.parametrize(
    ("norm", "arch"), [(norm, "matched") for norm in ALL_NORMS] + [("layer", "original")]
)
def test_each_norm_and_its_gradients_equal_the_closed_form(norm, arch, spread):
    """With inputs far from zero, and with variances near eps, so that neither can be dropped."""
    x = (RNG.normal(size=(6, 5, 4, 8)) * spread + 2 * spread).astype(np.float32)
    cotangent = RNG.normal(size=x.shape).astype(np.float32)
    module = normalization(norm, arch, 4, True, None)
    params = initial(module, 0, x)
    shape = x.shape[1:] if (norm, arch) == ("layer", "original") else x.shape[-1:]
    chex.assert_shape(params["params"]["scale"], shape)
    scale, bias = RNG.uniform(0.5, 1.5, shape), RNG.uniform(-1, 1, shape)
    chosen = {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}
    if norm == "rms":
        bias = np.zeros(shape)
        del chosen["bias"]

    def apply(x, params):
        return module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    variables = {name: value for name, value in params.items() if name != "params"}

    def both(x, params, cotangent):
        outputs, back = jax.vjp(apply, x, params)
        return outputs, *back(cotangent)

    outputs, to_x, to_params = jax.jit(both)(x, chosen, cotangent)
    wanted = closed_form(norm, x, scale, bias, cotangent, 4)
    np.testing.assert_allclose(outputs, wanted[0], atol=2e-5)
    np.testing.assert_allclose(to_x, wanted[1], atol=2e-5 * np.abs(wanted[1]).max())
    np.testing.assert_allclose(to_params["scale"], wanted[2], atol=1e-4)
    if "bias" in chosen:
        np.testing.assert_allclose(to_params["bias"], wanted[3], atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("norm", ALL_NORMS)
def test_no_variance_is_a_difference_of_squares(norm, fast):
    """At a mean of 2,000 and a deviation of 1 the squares are rounded to a quarter."""
    x = (2_000 + RNG.normal(size=(6, 5, 4, 16))).astype(np.float32)
    module = CNN(norm, "matched", fast=fast).normalization(True)
    outputs, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    wanted = closed_form(norm, x, np.ones(16), 0, x, 4)[0]
    np.testing.assert_allclose(outputs, wanted, atol=2e-3)


def outputs_of(norm, x, groups=4, arch="matched"):
    module = normalization(norm, arch, groups, True, None)
    return jax.jit(module.init_with_output)(jax.random.key(0), x)[0]


def test_layer_norm_is_group_norm_with_one_group_and_instance_norm_with_a_group_a_channel():
    x = jnp.asarray(RNG.normal(size=(3, 5, 5, 8)), jnp.float32)
    chex.assert_trees_all_close(outputs_of("layer", x), outputs_of("group", x, 1), atol=1e-5)
    chex.assert_trees_all_close(outputs_of("instance", x), outputs_of("group", x, 8), atol=1e-5)
    chex.assert_trees_all_equal(outputs_of("none", x), x)
    assert np.abs(outputs_of("layer", x) - outputs_of("group", x, 2)).max() > 1e-3


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_only_batch_norm_lets_one_example_reach_another(norm):
    """The gradient of example 0's output with respect to the other examples."""
    x = jnp.asarray(RNG.normal(size=(3, 4, 4, 8)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.square(outputs_of(norm, x)[0] - 1).sum()))(x)
    across = np.abs(gradient[1:]).max()
    assert across > 1e-4 if norm == "batch" else across == 0


def test_running_averages_equal_the_closed_form_and_evaluation_leaves_and_uses_them():
    batches = RNG.normal(size=(3, 6, 4, 4, 8)) * 2 + 1
    train, test = (normalization("batch", "matched", 4, mode, None) for mode in (True, False))
    apply = jax.jit(partial(train.apply, mutable="batch_stats"))
    variables = train.init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
    mean, var = np.zeros(8), np.ones(8)
    for batch in batches:
        _, updates = apply(variables, jnp.asarray(batch, jnp.float32))
        variables = {**variables, **updates}
        flat = batch.reshape(-1, 8)
        mean, var = 0.9 * mean + 0.1 * flat.mean(0), 0.9 * var + 0.1 * flat.var(0, ddof=1)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], var, rtol=1e-5)
    x = jnp.asarray(batches[0], jnp.float32)
    outputs, updates = test.apply(variables, x, mutable="batch_stats")
    np.testing.assert_allclose(outputs, (batches[0] - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


def test_initial_kernels_are_uniform_within_one_over_root_fan_in():
    params = initial(CNN("group"), 0, jnp.zeros((1, 32, 32, 3)))["params"]
    for name, leaves in params.items():
        if "kernel" in leaves:
            kernel = np.asarray(leaves["kernel"])
            bound = np.prod(kernel.shape[:3]) ** -0.5
            assert np.abs(kernel).max() <= bound, name
            error = bound / 3**0.5 / (2 * kernel.size) ** 0.5  # of a deviation, roughly
            assert abs(kernel.std() - bound / 3**0.5) < 5 * error, name
        else:
            chex.assert_trees_all_equal(leaves["scale"], jnp.ones_like(leaves["scale"]))
            chex.assert_trees_all_equal(leaves["bias"], jnp.zeros_like(leaves["bias"]))


def test_one_seed_gives_the_same_kernels_and_masks_under_every_norm(monkeypatch):
    """Of plain nets, whose operators are compiled once for all norms; `fast` changes no name."""
    images = jnp.asarray(RNG.normal(size=(2, 32, 32, 3)), jnp.float32)
    kernels, masks, original = {}, {}, dropout.keep_mask
    for norm in NORMS:
        net, drawn = CNN(norm, "every-kind", fast=False), []
        monkeypatch.setattr(
            dropout, "keep_mask", lambda *a, to=drawn: to.append(original(*a)) or to[-1]
        )
        variables = initial(net, 4, images)
        rngs = {"dropout": jax.random.key(9)}
        net.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        kernels[norm] = {k: v["kernel"] for k, v in variables["params"].items() if "kernel" in v}
        masks[norm] = drawn
    assert len(masks["batch"]) == 3
    for norm in NORMS:
        chex.assert_trees_all_equal(kernels[norm], kernels["batch"])
        chex.assert_trees_all_equal(masks[norm], masks["batch"])
    assert not any(np.array_equal(m, masks["batch"][1]) for m in masks["batch"][2:])
