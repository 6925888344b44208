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


def normalization(norm, arch="matched", train=True):
    return CNN(norm, arch).normalization(train, None)


def initial(net, seed, images):
    """The net's initial variables."""
    return jax.jit(net.init, **SOON)(jax.random.key(seed), images)


RNG = np.random.default_rng(1)
ALL_NORMS = ("batch", "group", "layer", "pixel", "instance", "rms")
"""Those of Flax's own classes; `test_norms.py` has them all."""


COUNTS = {
    "original": {"batch": 45_776, "group": 45_776, "layer": 46_412},
    "matched": dict.fromkeys(("batch", "group", "layer", "instance"), 45_776)
    | {"rms": 45_536, "none": 45_296},
    "attention": dict.fromkeys(("batch", "group", "layer"), 48_485),
}


@pytest.mark.parametrize(("arch", "norm"), [(a, norm) for a in COUNTS for norm in COUNTS[a]])
def test_parameters_are_counted_exactly(arch, norm):
    net = CNN(norm, arch)
    assert summary.count_parameters(net) == COUNTS[arch][norm]
    assert sum(row.kernel + row.norm for row in summary.summarize(net)) == COUNTS[arch][norm]


OTHER = [30, 28, 28, 14, 14, 14, 14, 14, 7, 7, 7, 5, 1, 1]


@pytest.mark.parametrize(
    ("norm", "window", "sides"),
    [("batch", 4, [32, 32, 34, 17, 15, 13, 11, 11, 5, 5, 5, 5, 1, 1])]
    + [(norm, 5, OTHER) for norm in ("group", "layer")],
)
def test_the_layer_table_tells_the_shapes_that_the_net_and_the_studys_page_have(
    norm, window, sides
):
    net = CNN(norm)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(net.init, jax.random.key(0), images)

    def layers(variables):
        return net.apply(variables, images, capture_intermediates=True, mutable="intermediates")

    seen = jax.eval_shape(layers, variables)[1]["intermediates"]
    rows = {row.name: row for row in summary.summarize(net)}
    for name in (f"{'c' if i in (3, 7, 11) else 'C'}{i}" for i in range(1, 12)):
        assert (2, *rows[name].shape) == seen[name]["__call__"][0].shape
    assert [row.shape[0] for row in rows.values()] == sides
    fields = [3, 5, 5, 6, 10, 14, 18, 18, 20, 28, 36, 44, 44 + 4 * (window - 1)]
    assert [row.receptive_field for row in rows.values()] == [*fields, fields[-1]]


def test_the_matched_net_is_the_studys_group_net():
    assert cnn.ARCHS["original"]("group") == cnn.ARCHS["matched"]("layer")
    assert normalization("group", "original") == normalization("group")


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
        means = values.reshape(shape).mean(axes, keepdims=True)
        return np.broadcast_to(means, shape).reshape(x.shape)

    m = 0 if norm == "rms" else mean(x)
    inverse = 1 / np.sqrt(mean((x - m) ** 2) + 1e-5)
    z, u = (x - m) * inverse, cotangent * scale
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
    module = normalization(norm, arch)
    variables = initial(module, 0, x)
    shape = x.shape[1:] if (norm, arch) == ("layer", "original") else x.shape[-1:]
    drawn = {"scale": RNG.uniform(0.5, 1.5, shape), "bias": RNG.uniform(-1, 1, shape)}
    chosen = {name: drawn[name].astype(np.float32) for name in variables["params"]}
    chex.assert_trees_all_equal_shapes(variables["params"], chosen)

    @jax.jit
    def both(x, params, cotangent):
        def apply(x, params):
            return module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

        outputs, back = jax.vjp(apply, x, params)
        return outputs, *back(cotangent)

    outputs, to_x, to_params = both(x, chosen, cotangent)
    bias = drawn["bias"] if "bias" in chosen else np.zeros(shape)
    wanted = closed_form(norm, x, drawn["scale"], bias, cotangent, 4)
    np.testing.assert_allclose(outputs, wanted[0], atol=2e-5)
    np.testing.assert_allclose(to_x, wanted[1], atol=2e-5 * np.abs(wanted[1]).max())
    for name, values in zip(("scale", "bias"), wanted[2:], strict=True):
        if name in chosen:
            np.testing.assert_allclose(to_params[name], values, atol=1e-4)
    assert ("bias" in chosen) == (norm != "rms")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("norm", ALL_NORMS)
def test_no_variance_is_a_difference_of_squares(norm, fast):
    """At a mean of 2,000 and a deviation of 1 the squares are rounded to a quarter."""
    x = (2_000 + RNG.normal(size=(6, 5, 4, 16))).astype(np.float32)
    module = CNN(norm, "matched", fast=fast).normalization(True)
    outputs, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    wanted = closed_form(norm, x, np.ones(16), 0, x, 4)[0]
    np.testing.assert_allclose(outputs, wanted, atol=2e-3)


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_only_batch_norm_lets_one_example_reach_another(norm):
    """The gradient of example 0's output with respect to the other examples."""
    x = jnp.asarray(RNG.normal(size=(3, 4, 4, 8)), jnp.float32)
    module = normalization(norm)

    def of_first(x):
        return jnp.square(module.init_with_output(jax.random.key(0), x)[0][0] - 1).sum()

    across = np.abs(jax.jit(jax.grad(of_first))(x)[1:]).max()
    assert across > 1e-4 if norm == "batch" else across == 0


def test_none_changes_nothing():
    x = jnp.asarray(RNG.normal(size=(3, 4, 4, 8)), jnp.float32)
    chex.assert_trees_all_equal(normalization("none").apply({}, x), x)


def test_running_averages_equal_the_closed_form_and_evaluation_leaves_and_uses_them():
    batches = RNG.normal(size=(3, 6, 4, 4, 8)) * 2 + 1
    train, test = (normalization("batch", train=mode) for mode in (True, False))
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
        if "kernel" not in leaves:
            wanted = {"scale": jnp.ones_like(leaves["scale"]), "bias": 0 * leaves["bias"]}
            chex.assert_trees_all_equal(leaves, wanted)
            continue
        kernel = np.asarray(leaves["kernel"])
        bound = np.prod(kernel.shape[:3]) ** -0.5
        assert np.abs(kernel).max() <= bound, name
        error = bound / 3**0.5 / (2 * kernel.size) ** 0.5  # of a deviation, roughly
        assert abs(kernel.std() - bound / 3**0.5) < 5 * error, name


def test_one_seed_gives_the_same_kernels_and_masks_under_every_norm(monkeypatch):
    images, original = jnp.zeros((2, 32, 32, 3)), dropout.keep_mask

    def drawn(net):
        masks = []
        monkeypatch.setattr(
            dropout, "keep_mask", lambda *a: masks.append(original(*a)) or masks[-1]
        )
        variables, rngs = net.init(jax.random.key(4), images), {"dropout": jax.random.key(9)}
        net.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        params = variables["params"].items()
        return {name: leaves["kernel"] for name, leaves in params if "kernel" in leaves}, masks

    def of(norm, arch):
        return jax.jit(partial(drawn, CNN(norm, arch)), **SOON)()

    for norm in NORMS:
        chex.assert_trees_all_equal(of(norm, "three-layers"), of("batch", "three-layers"))
    kernels, masks = of("batch", "every-kind")
    chex.assert_trees_all_equal(of("layer", "every-kind"), (kernels, masks))
    assert (len(kernels), len(masks)) == (5, 3)
    assert not any(np.array_equal(mask, masks[1]) for mask in masks[2:])
