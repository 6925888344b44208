"""Every norm against a float64 closed form, written from its paper alone, and how it is used."""

import dataclasses
import math
from functools import partial

import chex
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_timm_golden as timm
from helpers import SOON
from jax.sharding import PartitionSpec as P
from scipy import special

from jaxnorm import norms
from jaxnorm.config import NORMS, Config, UserError
from jaxnorm.model import layers, summary
from jaxnorm.model.cnn import CNN
from jaxnorm.training.experiment import Experiment, mesh_for
from jaxnorm.training.mesh import ONE, MeshShape

EPSILON, KEPT, SIZE, GROUPS = 0.1, 0.7, 2, 4
SHAPE = (5, 4, 3, 8)
RELAXED, STEP = (2, 6, 10), 5  # 3/4 of d's limit and 3/8 of r's
D_LIMIT, R_LIMIT = 0.75 * 0.8, 1 + 0.375 * (3 - 1)
SLOW = {"epsilon": EPSILON, "use_fast_variance": False}
AVERAGES = {"use_running_average": False, "momentum": KEPT}
MODULES = {
    "batch": norms.BatchNorm(**AVERAGES, **SLOW),
    "group": norms.GroupNorm(GROUPS, **SLOW),
    "layer": norms.LayerNorm(**SLOW),
    "pixel": norms.PixelNorm(**SLOW),
    "instance": norms.InstanceNorm(**SLOW),
    "rms": norms.RMSNorm(epsilon=EPSILON),
    "none": norms.Identity(),
    "ghost": norms.GhostBatchNorm(SIZE, epsilon=EPSILON, **AVERAGES),
    "renorm": norms.BatchRenorm(3.0, 0.8, RELAXED, epsilon=EPSILON, **AVERAGES),
    "frn": norms.FilterResponseNorm(epsilon=EPSILON),
    "evonorm-s0": norms.EvoNormS0(GROUPS, epsilon=EPSILON),
    "dyt": norms.DynamicTanh(),
    "derf": norms.DynamicErf(),
}
FAST = ("ghost", "renorm", "frn", "evonorm-s0", "derf")
"""Those of which the nets have a fast form; that of Flax's norms is held against Flax's."""


def fast(module):
    """The fast form of a norm, with the same fields."""
    fields = [field.name for field in dataclasses.fields(module) if field.name != "parent"]
    kind = getattr(layers, type(module).__name__)
    return kind(**{field: getattr(module, field) for field in fields})


MODULES |= {f"fast {name}": fast(MODULES[name]) for name in FAST}
KEEPING = ("batch", "ghost", "renorm", "fast ghost", "fast renorm")
FIRST = {"scale": 1, "bias": 0, "threshold": 0, "v": 1, "alpha": 0.5, "shift": 0}


class Over:
    """The means over what shares a statistic: `axes`, of channels in so many groups."""

    def __init__(self, axes, groups=None):
        self.axes, self.groups = axes, groups

    def mean(self, values):
        shape = values.shape
        if self.groups:
            values = values.reshape(*shape[:-1], self.groups, -1)
        means = values.mean(self.axes, keepdims=True)
        return np.broadcast_to(means, values.shape).reshape(shape)


OVER = {
    "batch": Over((0, 1, 2)),
    "group": Over((1, 2, 4), GROUPS),
    "layer": Over((1, 2, 3)),
    "pixel": Over((3,)),
    "instance": Over((1, 2)),
    "rms": Over((1, 2, 3)),
}


def normalized(x, p, g, over, centered=True):
    """y = (x - m) / s * scale + bias, s^2 = mean (x - m)^2 + eps. With u = g scale and
    z = (x - m) / s: dx = (u - mean u - z mean(u z)) / s.
    """
    m = over.mean(x) if centered else 0
    s = np.sqrt(over.mean((x - m) ** 2) + EPSILON)
    z, u = (x - m) / s, g * p["scale"]
    to_x = (u - (over.mean(u) if centered else 0) - z * over.mean(u * z)) / s
    return z * p["scale"] + p.get("bias", 0), {"x": to_x, "scale": g * z, "bias": g}


def ghost(x, p, g, state):
    parts = [
        normalized(x[i : i + SIZE], p, g[i : i + SIZE], OVER["batch"])
        for i in range(0, len(x), SIZE)
    ]
    gradients = {k: np.concatenate([part[1][k] for part in parts]) for k in parts[0][1]}
    return np.concatenate([part[0] for part in parts]), gradients


def renorm(x, p, g, state):
    """y = ((x - m) / s * r + d) * scale + bias; r and d are constants."""
    mean = OVER["batch"].mean
    m = mean(x)
    s = np.sqrt(mean((x - m) ** 2) + EPSILON)
    r = np.clip(s / state["deviation"], 1 / R_LIMIT, R_LIMIT)
    d = np.clip((m - state["mean"]) / state["deviation"], -D_LIMIT, D_LIMIT)
    z, u = (x - m) / s, g * p["scale"] * r
    to_x = (u - mean(u) - z * mean(u * z)) / s
    return (z * r + d) * p["scale"] + p["bias"], {"x": to_x, "scale": g * (z * r + d), "bias": g}


def frn(x, p, g, state):
    """y = max(h, threshold), h = x / sqrt(mean x^2 + eps) * scale + bias."""
    h, _ = normalized(x, p, g, OVER["instance"], centered=False)
    above = h > p["threshold"]
    _, gradients = normalized(x, p, g * above, OVER["instance"], centered=False)
    return np.where(above, h, p["threshold"]), {**gradients, "threshold": g * ~above}


def evonorm_s0(x, p, g, state):
    """y = n / s * scale + bias, n = x sigmoid(v x), s^2 the variance of the group + eps."""
    mean, sigmoid = OVER["group"].mean, special.expit(p["v"] * x)
    s, n, u = np.sqrt(mean((x - mean(x)) ** 2) + EPSILON), x * sigmoid, g * p["scale"]
    slope = sigmoid * (1 - sigmoid)
    to_x = u * (sigmoid + p["v"] * x * slope) / s - (x - mean(x)) * mean(u * n) / s**3
    to_v = u * x**2 * slope / s
    return n / s * p["scale"] + p["bias"], {"x": to_x, "scale": g * n / s, "bias": g, "v": to_v}


def squashed(x, p, g, value, slope):
    """y = f(alpha x + shift) * scale + bias."""
    u = g * p["scale"] * slope
    gradients = {"x": u * p["alpha"], "alpha": u * x, "shift": u, "scale": g * value, "bias": g}
    return value * p["scale"] + p["bias"], gradients


def dyt(x, p, g, state):
    return squashed(x, p, g, value := np.tanh(p["alpha"] * x), 1 - value**2)


def derf(x, p, g, state):
    inner = p["alpha"] * x + p["shift"]
    return squashed(x, p, g, special.erf(inner), 2 / math.sqrt(math.pi) * np.exp(-(inner**2)))


CLOSED = {
    name: lambda x, p, g, state, name=name: normalized(x, p, g, OVER[name], name != "rms")
    for name in OVER
}
CLOSED |= {"ghost": ghost, "renorm": renorm, "frn": frn, "evonorm-s0": evonorm_s0}
CLOSED |= {"dyt": dyt, "derf": derf, "none": lambda x, p, g, state: (x, {"x": g})}
CLOSED |= {f"fast {name}": CLOSED[name] for name in FAST}
EVERY = pytest.mark.parametrize("name", MODULES)


def drawn(name, shape=SHAPE, seed=0):
    """An input, parameters and state, all f32, none of them at its initial value."""
    rng = np.random.default_rng([seed, len(name), ord(name[-1])])
    x = rng.normal(0.4, 1.5, shape).astype(np.float32)
    variables = dict(MODULES[name].init(jax.random.key(0), x))

    def other(path, leaf):
        if leaf.dtype == jnp.int32:
            return jnp.int32(STEP)
        return jnp.float32(rng.uniform(0.3, 1.4, leaf.shape))

    return x, jax.tree_util.tree_map_with_path(other, variables)


def exact(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def applied(module, variables, x):
    """The outputs, and the state after them."""
    return module.apply(variables, x, mutable=["batch_stats"])


def assert_close(got, wanted, error=2e-5):
    wanted = np.asarray(wanted, np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=error * max(np.abs(wanted).max(), 1))


def test_the_tables_are_of_the_same_norms():
    assert MODULES.keys() == CLOSED.keys()
    plain = [name for name in MODULES if not name.startswith("fast")]
    assert plain == list(NORMS) == list(Config("every").norms)
    paths = [f"jaxnorm.norms:{type(MODULES[name]).__name__}" for name in plain]
    assert paths == [row.path for row in NORMS.values()]


@EVERY
def test_initial_parameters_are_the_papers_and_averages_are_kept_by_three(name):
    variables = MODULES[name].init(jax.random.key(0), jnp.ones(SHAPE))
    assert ("batch_stats" in variables) == (name in KEEPING)
    for parameter, values in variables.get("params", {}).items():
        shape = () if parameter in ("alpha", "shift") else SHAPE[-1:]
        chex.assert_trees_all_equal(values, jnp.full(shape, FIRST[parameter], jnp.float32))


def check_values_and_gradients(name, x, variables):
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    @jax.jit
    def both(x, params):
        def apply(x, params):
            return applied(MODULES[name], {**variables, "params": params}, x)[0]

        outputs, back = jax.vjp(apply, x, params)
        return outputs, *back(cotangent)

    params, state = variables.get("params", {}), exact(variables.get("batch_stats"))
    outputs, to_x, to_params = both(x, params)
    wanted, gradients = CLOSED[name](*exact((x, params, cotangent)), state)
    assert_close(outputs, wanted)
    assert_close(to_x, gradients["x"])
    for parameter, got in to_params.items():
        axes = tuple(range(x.ndim - got.ndim))
        assert_close(got, gradients[parameter].sum(axes), 5e-5)


@pytest.mark.parametrize("kind", ["drawn", "whole ghosts", "one image", "constant"])
@EVERY
def test_values_and_gradients_equal_the_closed_form(name, kind):
    """The last ghost of five images is smaller; a constant has no variance."""
    count = {"whole ghosts": 2 * SIZE, "one image": 1}.get(kind, SHAPE[0])
    x, variables = drawn(name, (count, *SHAPE[1:]))
    if kind == "constant":
        x = np.full_like(x, 0.3)
    check_values_and_gradients(name, x, variables)


@pytest.mark.parametrize("shape", [(8, 32, 32, 16), (4, 28, 28, 32), (64, 28, 28, 32)])
@pytest.mark.parametrize("name", FAST)
def test_fast_forms_are_right_at_the_nets_own_sizes(name, shape):
    """At which jaxlib 0.10.1 leaves out a seventh of some sums."""
    check_values_and_gradients(f"fast {name}", *drawn(f"fast {name}", shape))


@pytest.mark.parametrize("name", ["derf", "fast derf"])
def test_the_gradient_of_erf_is_exact_far_from_zero(name):
    """Where it is far below what the tests above allow."""
    inner = np.linspace(-9, 9, 61, dtype=np.float32)
    x, module = inner.reshape(1, 61, 1, 1), MODULES[name].clone(alpha=1.0)
    variables = module.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: module.apply(variables, x).sum())(x).ravel()
    wanted = 2 / math.sqrt(math.pi) * np.exp(-(inner.astype(np.float64) ** 2))
    np.testing.assert_allclose(gradient, wanted, rtol=2e-5)


def after(name, x, state):
    """The state after a step, in the words of the papers."""
    flat = x.reshape(-1, x.shape[-1])
    if "renorm" in name:
        s = np.sqrt(flat.var(0) + EPSILON)
        values = {"mean": flat.mean(0), "deviation": s}
    else:
        size = SIZE if "ghost" in name else len(x)
        parts = [x[i : i + size].reshape(-1, x.shape[-1]) for i in range(0, len(x), size)]
        shares = np.array([len(part) for part in parts]) / len(flat)
        values = {"mean": sum(w * p.mean(0) for w, p in zip(shares, parts, strict=True))}
        values["var"] = sum(w * p.var(0) for w, p in zip(shares, parts, strict=True))
    moved = {name: KEPT * state[name] + (1 - KEPT) * values[name] for name in values}
    return moved | {"step": state["step"] + 1} if "step" in state else moved


@pytest.mark.parametrize("count", [5, 2 * SIZE])
@pytest.mark.parametrize("name", KEEPING)
def test_training_moves_the_averages_and_evaluation_uses_and_leaves_them(name, count):
    x, variables = drawn(name, (count, *SHAPE[1:]))
    params, state = exact(variables["params"]), exact(variables["batch_stats"])
    moved = applied(MODULES[name], variables, x)[1]["batch_stats"]
    wanted = after(name, x.astype(np.float64), state)
    assert moved.keys() == wanted.keys()
    for average, values in wanted.items():
        assert_close(moved[average], values, 1e-6)
    evaluating = MODULES[name].clone(use_running_average=True)
    outputs, left = applied(evaluating, variables, x)
    divisor = state.get("deviation")
    divisor = np.sqrt(state["var"] + EPSILON) if divisor is None else divisor
    assert_close(outputs, (x - state["mean"]) / divisor * params["scale"] + params["bias"])
    chex.assert_trees_all_equal(left["batch_stats"], variables["batch_stats"])
    one = evaluating.apply(variables, x[:1])
    assert_close(one, outputs[:1])


@pytest.mark.parametrize(("step", "d_limit", "r_limit"), [(2, 0, 1), (6, 0.8, 2), (10, 0.8, 3)])
def test_the_limits_of_renorm_relax_with_the_step(step, d_limit, r_limit, monkeypatch):
    """From those of batch norm."""
    monkeypatch.setitem(globals(), "D_LIMIT", d_limit)
    monkeypatch.setitem(globals(), "R_LIMIT", r_limit)
    x, variables = drawn("renorm")
    variables["batch_stats"]["step"] = jnp.int32(step)
    params, state = exact((variables["params"], variables["batch_stats"]))
    outputs, _ = applied(MODULES["renorm"], variables, x)
    assert_close(outputs, renorm(x.astype(np.float64), params, 1.0 * x, state)[0])
    if not d_limit:
        assert_close(outputs, CLOSED["batch"](*exact((x, params, x)), state)[0])


@EVERY
def test_bfloat16_inputs_are_normalized_in_float32(name):
    x, variables = drawn(name)
    half = jnp.bfloat16(x)
    params, state = exact((variables.get("params", {}), variables.get("batch_stats")))
    outputs, _ = applied(MODULES[name], variables, half)
    assert outputs.dtype == (jnp.bfloat16 if name == "none" else jnp.float32)
    wanted = CLOSED[name](*exact((half, params, half)), state)[0]
    assert_close(outputs, wanted)
    if name != "none":
        short, moved = applied(MODULES[name].clone(dtype=jnp.bfloat16), variables, half)
        assert short.dtype == jnp.bfloat16
        assert_close(short, wanted, 5e-3)
        assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(moved))


@EVERY
def test_jit_and_vmap_over_seeds_equal_one_call_each(name):
    inputs = [drawn(name, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    apply = partial(applied, MODULES[name])
    together = jax.vmap(lambda x, variables: apply(variables, x))(*stacked)
    for number, (x, variables) in enumerate(inputs):
        eager = apply(variables, x)
        of_one = jax.tree.map(lambda leaf, number=number: leaf[number], together)
        chex.assert_trees_all_close(of_one, eager, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(jax.jit(apply)(variables, x), eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KEEPING)
def test_two_devices_that_share_a_batch_compute_what_one_does(name):
    """Ghosts lie within a device."""
    x, variables = drawn(name, (8, *SHAPE[1:]))
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "devices")

    def both(module, x, cotangent):
        apply = partial(applied, module, variables)
        outputs, back, moved = jax.vjp(apply, x, has_aux=True)
        return outputs, back(cotangent)[0], moved

    sharing = partial(both, MODULES[name].clone(axis_name="devices"))
    parts, out = P("devices"), (P("devices"), P("devices"), P())
    shared = jax.shard_map(sharing, mesh=mesh, in_specs=parts, out_specs=out, check_vma=False)
    one = both(MODULES[name], x, cotangent)
    chex.assert_trees_all_close(jax.jit(shared)(x, cotangent), one, rtol=1e-5, atol=1e-5)


def test_the_ragged_batch_of_a_norm_across_images_is_not_filled_up(tiny):
    """Of 70 images in batches of 32; batch norm takes a mask."""
    sizes = {}
    for group in Experiment([Config("every", "three-layers", "tiny", 1, 32)], tiny, ONE).groups():
        (*_, last), _ = group.chunks(1)
        sizes[group.norm] = last.batches.shape[2]
    assert sizes == dict.fromkeys(NORMS, 32) | {"ghost": 6, "renorm": 6}


def test_a_ghost_never_spans_devices(tiny):
    def config(**changes):
        return Config("ghost", "three-layers", "tiny", 1, **changes)

    assert mesh_for([], config(batch_size=32, ghost_size=16), MeshShape(batch=2)).batch == 2
    assert mesh_for([], config(batch_size=32, ghost_size=16, seeds=1), None).batch == 1
    with pytest.raises(UserError, match="would cut ghosts of 12 images in a batch of 32"):
        mesh_for([], config(batch_size=32, ghost_size=12), MeshShape(batch=2))
    with pytest.raises(UserError, match="ghosts of 16 images in a batch of 6"):  # the ragged one
        Experiment([config(batch_size=32, ghost_size=16)], tiny, MeshShape(batch=2))
    Experiment([config(batch_size=32, ghost_size=16)], tiny, ONE)


@pytest.mark.parametrize("norm", timm.PARAMETERS)
def test_values_and_gradients_equal_timms(norm):
    arrays = {name: np.float32(values) for name, values in timm.drawn(norm).items()}
    kinds = {"frn": norms.FilterResponseNorm(), "evonorm-s0": norms.EvoNormS0(timm.GROUPS)}
    params = {name: arrays[name] for name in timm.PARAMETERS[norm]}
    outputs, back = jax.vjp(
        lambda x, params: kinds[norm].apply({"params": params}, x), arrays["x"], params
    )
    to_x, to_params = back(arrays["to_y"])
    with np.load(timm.GOLDEN) as stored:
        for name, got in {"y": outputs, "x": to_x, **to_params}.items():
            assert_close(got, stored[f"{norm} {name}"])


def test_the_epsilon_of_frn_is_the_papers():
    x = jnp.full((1, 2, 2, 1), 1e-3)
    outputs = norms.FilterResponseNorm().init_with_output(jax.random.key(0), x)[0]
    assert_close(outputs, np.full(x.shape, 0.5**0.5))


def test_groups_that_do_not_divide_the_channels_are_refused_by_name():
    config = Config("evonorm-s0", "matched", groups=3)
    with pytest.raises(UserError, match="norm=evonorm-s0: groups=3 does not divide the 16"):
        summary.check_nets(config, 10)


@pytest.mark.parametrize("arch", ["matched", "residual", "attention"])
def test_every_net_has_fewer_than_50_000_parameters(arch):
    counts = summary.check_nets(Config("every", arch), 10)
    bare, layers = counts["none"], sum(row.norm > 0 for row in summary.summarize(CNN("dyt", arch)))
    channels = counts["rms"] - bare
    more = {"none": 0, "rms": channels, "frn": 3 * channels, "evonorm-s0": 3 * channels}
    if arch == "attention":  # whose learned slopes take the place of ReLU
        more |= {"frn": 2 * channels, "evonorm-s0": 2 * channels}
    more |= {"dyt": 2 * channels + layers, "derf": 2 * channels + 2 * layers}
    assert counts == {norm: bare + more.get(norm, 2 * channels) for norm in NORMS}


def test_settings_of_a_run_reach_its_norms(tiny):
    settings = {"groups": 2, "ghost_size": 7, "alpha": 0.8, "norm_momentum": 0.6}
    config = Config("every", "three-layers", "tiny", 20, 7, **settings)
    experiment = Experiment([config], tiny, ONE)
    fields = {}
    for norm in config.norms:
        module = experiment.program(config, norm).model.normalization(True)
        names = NORMS[norm].settings.keys() - {"axis_name"}
        fields[norm] = {name: getattr(module, name) for name in names}
    kept, relaxed = {"momentum": 0.6}, {"relaxed": (6, 30, 50)}  # of 200 steps
    assert fields == {norm: {} for norm in NORMS} | {
        "batch": kept, "group": {"num_groups": 2}, "ghost": {"size": 7, **kept},
        "renorm": relaxed | kept, "evonorm-s0": {"groups": 2}, "dyt": {"alpha": 0.8},
        "derf": {"alpha": 0.8},
    }  # fmt: skip


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("norm", ["frn", "evonorm-s0", "dyt"])
def test_no_relu_follows_a_norm_that_activates(norm, fast):
    net = CNN(norm, "three-layers", fast=fast, dropout=0.0)
    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = jax.jit(net.init, **SOON)(jax.random.key(1), images)
    if norm == "frn":
        variables["params"]["C1_norm"]["threshold"] -= 0.5
    logits, seen = net.apply(variables, images, capture_intermediates=True, mutable="intermediates")
    x = seen["intermediates"]["C1_norm"]["__call__"][0]
    assert x.min() < -0.1
    x = x if NORMS[norm].activates else jnp.maximum(x, 0)
    kernel = variables["params"]["c11"]["kernel"][0, 0]
    np.testing.assert_allclose(logits, x.mean((1, 2)) @ kernel, atol=1e-5)


def test_a_norm_goes_into_a_model_of_nnx():
    x = jnp.asarray(drawn("renorm")[0])
    module = nnx.bridge.ToNNX(norms.BatchRenorm(use_running_average=False), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(module, x)
    assert int(module.step.get_value() if hasattr(module.step, "get_value") else module.step) == 0
    outputs = module(x, mutable=["batch_stats"])
    assert outputs.shape == x.shape
    assert_close(module.mean[...], 0.01 * x.mean((0, 1, 2)), 1e-5)
