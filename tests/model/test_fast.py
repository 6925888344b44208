"""The fast operators against Flax's and XLA's own: values, gradients, and the masks' statistics."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_gradients_close
from jax import lax

from jaxnorm.model import layers
from jaxnorm.model.fast import convolution, dropout, pooling, xla
from jaxnorm.model.fast import norm as norms

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    """A test draws the same numbers whichever tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def with_gradients(function, *arguments):
    """What the function returns, and the gradients of a random sum of it, compiled as one."""
    shape = jax.eval_shape(function, *arguments).shape
    cotangent = np.random.default_rng(2).normal(size=shape).astype(np.float32)

    def both(*arguments):
        outputs, back = jax.vjp(function, *arguments)
        return outputs, back(jnp.asarray(cotangent, outputs.dtype))

    return jax.jit(both)(*arguments)


def plain_convolution(images, kernel, padding):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("side", "kernel", "padding"),
    [
        ((6, 7), (3, 3, 2, 5), ((0, 0), (0, 0))),
        ((6, 7), (3, 3, 2, 5), ((1, 1), (1, 1))),
        ((6, 7), (3, 3, 4, 3), ((2, 0), (0, 1))),
        ((6, 8), (3, 3, 3, 16), ((1, 1), (1, 1))),
        ((6, 7), (3, 3, 8, 16), ((0, 0), (0, 0))),
        ((6, 7), (3, 3, 16, 32), ((1, 1), (1, 1))),
        ((6, 7), (1, 1, 4, 3), ((0, 0), (0, 0))),
        ((6, 7), (1, 1, 4, 3), ((1, 1), (1, 1))),
        ((6, 7), (1, 1, 4, 3), ((2, 0), (0, 1))),
        ((6, 7), (2, 4, 3, 3), ((0, 1), (2, 1))),
        ((1, 1), (1, 1, 4, 3), ((0, 0), (0, 0))),
    ],
)
def test_convolution_and_both_gradients_equal_xlas(side, kernel, padding):
    images, weights = normal(5, *side, kernel[2]), normal(*kernel)
    ours = partial(convolution.convolve, window_strides=(1, 1), padding=padding)
    plain = partial(plain_convolution, padding=padding)
    outputs, gradients = with_gradients(ours, images, weights)
    wanted, wanted_gradients = with_gradients(plain, images, weights)
    chex.assert_shape(outputs, wanted.shape)
    chex.assert_type(outputs, jnp.float32)
    chex.assert_trees_all_close(outputs, wanted, atol=1e-5)
    chex.assert_trees_all_close(gradients, wanted_gradients, atol=3e-5)


def test_convolution_equals_a_sum_over_the_window_in_float64():
    images, kernel = np.asarray(normal(2, 5, 6, 3)), np.asarray(normal(3, 3, 3, 4))
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    wanted = sum(padded[:, i : i + 5, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
    ours = convolution.convolve(jnp.asarray(images), jnp.asarray(kernel), (1, 1), ((1, 1), (1, 1)))
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_convolution_under_vmap_equals_one_by_one():
    images, kernels = normal(3, 2, 6, 6, 2), normal(3, 3, 3, 2, 4)
    one = partial(convolution.convolve, window_strides=(1, 1), padding=((1, 1), (1, 1)))
    total = jax.jit(jax.grad(lambda x, w: jnp.square(one(x, w)).sum(), (0, 1)))
    together = jax.jit(jax.vmap(total))(images, kernels)
    apart = [total(x, w) for x, w in zip(images, kernels, strict=True)]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart), rtol=2e-5, atol=1e-4
    )


@pytest.mark.parametrize("count", [1, 16, 20, 29, 34])
def test_a_kernels_gradient_is_that_of_all_images(count, monkeypatch):
    """However many there are, and however they are cut into pieces."""
    monkeypatch.setattr(xla, "MICRO_BATCH_BYTES", 4 * 16 * 5 * 6 * 4)  # 16 images
    images, weights, padding = normal(count, 5, 6, 3), normal(3, 3, 3, 4), ((1, 1), (1, 1))
    _, wanted = with_gradients(lambda w: plain_convolution(images, w, padding), weights)
    _, ours = with_gradients(lambda w: convolution.convolve(images, w, (1, 1), padding), weights)
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_pieces_divide_and_are_few():
    image = xla.MICRO_BATCH_BYTES // 16
    for count in range(1, 300):
        piece = xla.micro_batch_of(count, image)
        assert count % piece == 0
        assert piece > 8 or piece == count
    assert [xla.micro_batch_of(count, image) for count in (16, 40, 64, 128)] == [16, 10, 16, 16]
    assert xla.micro_batch_of(64, image // 4) == 64
    assert xla.micro_batch_of(7, 10 * xla.MICRO_BATCH_BYTES) == 1


FLAX_NORMS = {
    "batch": (nn.BatchNorm(use_running_average=False, use_fast_variance=False), (True, 8, True)),
    "group": (nn.GroupNorm(4, use_fast_variance=False), (False, 4, True)),
    "layer": (
        nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=-1, use_fast_variance=False),
        (False, 1, True),
    ),
    "instance": (nn.InstanceNorm(use_fast_variance=False), (False, 8, True)),
    "rms": (nn.RMSNorm(reduction_axes=(1, 2, 3), feature_axes=-1), (False, 1, False)),
}


@pytest.mark.parametrize("norm", FLAX_NORMS)
@pytest.mark.parametrize(("offset", "atol"), [(0.0, 2e-5), (300.0, 1e-3)])
def test_normalize_and_its_gradients_equal_flaxs(norm, offset, atol):
    """`offset` moves the mean 300 deviations away, where inputs are rounded to 3e-5, the sum of 280
    of them moves a mean by up to 1e-4, and a scale of three multiplies that. A variance taken from
    mean squares would be off by 5e-3. (Of forty draws nine differ from Flax by more than 3e-4.)
    """
    module, (batch, groups, centered) = FLAX_NORMS[norm]
    module = module.clone(epsilon=1e-3)
    inputs, scale, bias = normal(6, 5, 7, 8) + offset, normal(8), normal(8)
    params = {"scale": scale, "bias": bias} if centered else {"scale": scale}
    over = norms.Over(batch, groups, centered, epsilon=1e-3)

    def flax(inputs, params):
        return module.apply({"params": params}, inputs, mutable=["batch_stats"])[0]

    def ours(inputs, params):
        return norms.normalize(inputs, params["scale"], params.get("bias", 0 * bias), over)[0]

    wanted, wanted_gradients = with_gradients(flax, inputs, params)
    outputs, gradients = with_gradients(ours, inputs, params)
    chex.assert_trees_all_close(outputs, wanted, rtol=1e-4, atol=atol)
    chex.assert_trees_all_close(gradients, wanted_gradients, rtol=1e-4, atol=10 * atol)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("shape", [(64, 28, 28, 32), (70, 14, 14, 64), (16, 30, 30, 4)])
def test_normalize_is_right_at_the_nets_own_sizes(norm, shape):
    """Compiled, against float64. At the first two sizes jaxlib 0.10.1 gets two sums in a row wrong
    by a seventh (a fused reduction that leaves out its padding), at no smaller batch.
    """
    channels = shape[-1]
    over = norms.Over(norm == "batch", {"batch": channels, "group": 4, "layer": 1}[norm])
    axes = (0, 1, 2) if norm == "batch" else (1, 2, 4)
    inputs, cotangent = normal(*shape) + 0.5, normal(*shape)
    scale, bias = normal(channels), normal(channels)

    def ours(inputs, scale, bias):
        return norms.normalize(inputs, scale, bias, over)[0]

    def both(inputs, scale, bias):
        outputs, back = jax.vjp(ours, inputs, scale, bias)
        return outputs, *back(cotangent)

    def grouped(values):
        values = np.asarray(values, np.float64)
        return values if norm == "batch" else values.reshape(*shape[:3], over.groups, -1)

    x, g = grouped(inputs), grouped(cotangent * scale[None, None, None])
    deviation = np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    x = (x - x.mean(axes, keepdims=True)) / deviation
    to_inputs = g - g.mean(axes, keepdims=True) - x * (g * x).mean(axes, keepdims=True)
    normalized = x.reshape(shape)
    wanted = (
        normalized * np.asarray(scale) + np.asarray(bias),
        (to_inputs / deviation).reshape(shape),
        (np.asarray(cotangent) * normalized).sum((0, 1, 2)),
        np.asarray(cotangent, np.float64).sum((0, 1, 2)),
    )
    for result, expected in zip(jax.jit(both)(inputs, scale, bias), wanted, strict=True):
        error = np.abs(np.asarray(result, np.float64) - expected).max()
        assert error < 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("norm", ["group", "layer", "instance"])
@pytest.mark.parametrize("shape", [(4, 28, 28, 32), (6, 5, 7, 8)])
@pytest.mark.parametrize(
    ("offset", "deviation", "atol"), [(1e8, 0, 0), (123_456.7, 0, 0), (1e5, 1, 5e-3)]
)
def test_normalize_corrects_values_as_well_as_variances(norm, shape, offset, deviation, atol):
    """At a mean of 1e5 float32 holds every 0.008th number, so that a value is off by up to 0.004;
    of constants nothing is left.
    """
    over = norms.Over(False, {"group": 4, "layer": 1, "instance": shape[-1]}[norm])
    inputs, ones = offset + deviation * normal(*shape), jnp.ones(shape[-1])
    outputs = jax.jit(lambda x: norms.normalize(x, ones, 0 * ones, over)[0])(inputs)
    x = np.asarray(inputs, np.float64).reshape(*shape[:3], over.groups, -1)
    centered = x - x.mean((1, 2, 4), keepdims=True)
    wanted = centered / np.sqrt(np.square(centered).mean((1, 2, 4), keepdims=True) + 1e-5)
    np.testing.assert_allclose(outputs, wanted.reshape(shape), atol=atol)


def test_normalize_tells_the_statistics_it_used():
    inputs, ones = normal(6, 5, 7, 8) * 2 + 1, jnp.ones(8)
    _, statistics = norms.normalize(inputs, ones, 0 * ones, norms.Over(True, 8))
    np.testing.assert_allclose(statistics.mean[0], inputs.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(statistics.variance[0], inputs.var((0, 1, 2)), rtol=1e-5)


def test_relu_and_its_gradient_equal_flaxs_whatever_its_first_value_is():
    for first in (0.0, -0.0, 1.0, -1.0, np.nan, np.inf):
        x = np.array(normal(2, 3, 4, 5))
        x[0, 0, 0, :2] = first, 0.0
        chex.assert_trees_all_equal(with_gradients(dropout.relu, x), with_gradients(nn.relu, x))


def test_gradients_can_be_differentiated_again():
    images, kernel = normal(2, 6, 6, 2), normal(3, 3, 2, 4)

    def of_gradient(convolve, relu, max_pool):
        """The gradient of a gradient's squares."""

        def cubes(kernel):
            return (max_pool(relu(convolve(images, kernel))) ** 3).sum()

        squares = jax.grad(lambda kernel: jnp.square(jax.grad(cubes)(kernel)).sum())
        return jax.jit(squares)(kernel)

    same = ((1, 1), (1, 1))
    convolve = partial(convolution.convolve, window_strides=(1, 1), padding=same)
    ours = of_gradient(convolve, dropout.relu, pooling.max_pool)
    convolve = partial(plain_convolution, padding=same)
    flax = of_gradient(convolve, nn.relu, partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)))
    np.testing.assert_allclose(ours, flax, rtol=1e-4, atol=1e-4 * np.abs(flax).max())


def test_max_pool_keeps_the_type_of_its_input():
    images = normal(2, 4, 4, 3).astype(jnp.bfloat16)
    outputs, (gradient,) = with_gradients(pooling.max_pool, images)
    chex.assert_type([outputs, gradient], jnp.bfloat16)


@pytest.mark.parametrize("side", [(6, 6), (7, 5), (2, 3), (34, 34)])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_and_its_gradient_equal_flaxs(side, ties):
    images = normal(3, *side, 4)
    images = jnp.round(images) if ties else images  # after a ReLU, ties at zero are the rule
    ours = with_gradients(pooling.max_pool, images)
    chex.assert_shape(ours[0], (3, side[0] // 2, side[1] // 2, 4))
    flax = with_gradients(lambda x: nn.max_pool(x, (2, 2), (2, 2)), images)
    chex.assert_trees_all_equal(ours, flax)


def test_global_max_and_its_gradient_equal_jaxs():
    images = normal(3, 5, 4, 6)
    jaxs = with_gradients(lambda x: x.max((1, 2), keepdims=True), images)
    chex.assert_trees_all_equal(with_gradients(pooling.global_max, images), jaxs)
    tied = jax.grad(lambda x: pooling.global_max(x).sum())(jnp.zeros((1, 2, 2, 1)))
    assert tied.ravel().tolist() == [1, 0, 0, 0]
    low = images.astype(jnp.bfloat16)
    outputs, (gradient,) = with_gradients(pooling.global_max, low)
    chex.assert_type([outputs, gradient], jnp.bfloat16)


@pytest.mark.parametrize("plain", [False, True])
def test_the_gradient_of_a_maximum_does_not_hang_on_how_xla_rounds(plain):
    """Of 29 images, a normalized activation, ReLU and the maximum: XLA computes the activation
    twice, and not to the same bits at every level. What the self-check compares with must be right
    too, and it is compiled at level 0.
    """
    images, kernel = normal(29, 8, 8, 32), normal(3, 3, 32, 64)
    scale, bias = normal(64), normal(64)

    def loss(kernel, scale, bias):
        if plain:
            order = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=order)
            x = jax.nn.standardize(x, axis=(0, 1, 2), epsilon=1e-5) * scale[None, None, None]
            x = layers.plain.global_max(nn.relu(x + bias[None, None, None]))
        else:
            x = convolution.convolve(images, kernel, (1, 1), ((1, 1), (1, 1)))
            x = norms.normalize(x, scale, bias, norms.Over(True, 64))[0]
            x = pooling.global_max(nn.relu(x))
        return jnp.square(x).sum()

    *others, usual = [
        jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options={"xla_backend_optimization_level": n})(
            kernel, scale, bias
        )
        for n in (0, 1, 3)
    ]
    for gradients in others:
        assert_gradients_close(gradients, usual, typical=1e-4)


def test_what_is_stored_is_computed_once(monkeypatch):
    """A block's gradient, compiled with `xla.stored` and without: XLA draws the dropout mask in as
    many places as it computes the activation. If `stored` saves none of them, it can go.
    """
    images, kernel = normal(4, 16, 16, 16), normal(3, 3, 16, 16)

    def loss(kernel, key):
        x = convolution.convolve(images, kernel, (1, 1), ((1, 1), (1, 1)))
        mask = dropout.keep_mask(key, 1, x.shape, 0.1)
        x = dropout.dropout_relu(x, mask, 0.1)
        return jnp.square(convolution.convolve(pooling.max_pool(x), kernel, (1, 1), "SAME")).sum()

    def account():
        """The shifts of the hash, and all operations."""
        gradient = jax.jit(lambda *arguments: jax.grad(loss)(*arguments))
        compiled = gradient.lower(kernel, jax.random.key(0)).compile()
        return compiled.as_text().count(" shift-right-logical("), compiled.cost_analysis()["flops"]

    shifts, operations = account()
    monkeypatch.setattr(xla, "stored", lambda x: x)
    wasted_shifts, wasted_operations = account()
    assert 2 * shifts <= wasted_shifts
    assert operations < wasted_operations


def test_dropout_relu_and_its_gradient_equal_the_plain_form():
    inputs, mask, rate = normal(4, 5, 5, 3), jnp.asarray(RNG.random((4, 5, 5, 3)) > 0.3), 0.3
    wanted, back = jax.vjp(lambda x: nn.relu(jnp.where(mask, x / (1 - rate), 0)), inputs)
    outputs, our_back = jax.vjp(lambda x: dropout.dropout_relu(x, mask, rate), inputs)
    chex.assert_trees_all_close(outputs, wanted, rtol=1e-6)
    cotangent = normal(*wanted.shape)
    chex.assert_trees_all_close(our_back(cotangent), back(cotangent), rtol=1e-6)


def test_dropout_alone_and_its_gradient_equal_the_plain_form():
    inputs, key = normal(4, 5, 5, 3), jax.random.key(2)
    (wanted, back), (outputs, our_back) = (
        jax.vjp(lambda x, drop=drop: drop(x, 0.3, key, 1, 8), inputs)
        for drop in (layers.plain.drop, layers.drop)
    )
    assert (outputs < 0).any()
    chex.assert_trees_all_close(outputs, wanted, rtol=1e-6)
    chex.assert_trees_all_close(our_back(inputs), back(inputs), rtol=1e-6)
    both = layers.dropout_relu(inputs, 0.3, key, 1, 8)
    chex.assert_trees_all_close(jnp.maximum(outputs, 0), both, rtol=1e-6)
    for drop in (layers.plain.drop, layers.drop):
        assert drop(inputs, 0.3, None, 1) is inputs


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_masks_keep_the_right_share_of_every_part(rate):
    """Five standard errors, over the whole mask, each image, each pixel and each channel."""
    mask = np.asarray(dropout.keep_mask(jax.random.key(3), 0, (64, 16, 16, 32), rate), np.float64)
    for axes in [(0, 1, 2, 3), (1, 2, 3), (0, 3), (0, 1, 2)]:
        counts = mask.size / np.prod([mask.shape[axis] for axis in range(4) if axis not in axes])
        error = np.sqrt(rate * (1 - rate) / counts)
        assert np.abs(mask.mean(axes) - (1 - rate)).max() < 5 * error


def test_masks_of_neighbours_layers_steps_and_seeds_are_uncorrelated():
    """Between any two masks, and between a mask and itself shifted: |correlation| < 5 / sqrt(n)."""
    shape, rate = (32, 16, 16, 8), 0.1
    step = [jax.random.fold_in(jax.random.key(1), i) for i in range(3)]
    masks = [dropout.keep_mask(key, layer, shape, rate) for key in step for layer in range(4)]
    masks.append(dropout.keep_mask(jax.random.key(2), 0, shape, rate))
    flat = np.stack([np.asarray(mask, np.float64).ravel() for mask in masks])
    correlation = np.corrcoef(flat) - np.eye(len(masks))
    limit = 5 / np.sqrt(flat.shape[1])
    assert np.abs(correlation).max() < limit
    for shift in (1, 2, 8, 128, 2048):
        assert abs(np.corrcoef(flat[0][shift:], flat[0][:-shift])[0, 1]) < limit


def test_masks_under_vmap_equal_one_by_one():
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(partial(dropout.keep_mask, layer=2, shape=(3, 4, 4, 2), rate=0.4))
    together = jax.vmap(draw)(keys)
    chex.assert_trees_all_equal(together, jnp.stack([draw(key) for key in keys]))


def test_a_micro_batch_of_a_batch_gets_the_batchs_masks():
    draw = partial(dropout.keep_mask, jax.random.key(3), 2, rate=0.4)
    draw = jax.jit(draw, static_argnames="shape")
    whole = draw(shape=(6, 4, 4, 3))
    pieces = [draw(shape=(2, 4, 4, 3), first_image=jnp.int32(first)) for first in (0, 2, 4)]
    chex.assert_trees_all_equal(jnp.concatenate(pieces), whole)


def test_masks_do_not_change():
    """Stored runs can be repeated only while a key gives the same mask."""
    mask = dropout.keep_mask(jax.random.key(7, impl="threefry2x32"), 1, (32,), 0.5)
    assert "".join("01"[int(kept)] for kept in mask) == MASK


MASK = "01111110010111010101111110101011"
