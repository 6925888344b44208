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


SAME = ((1, 1), (1, 1))


def plain_convolution(images, kernel, padding):
    order = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=order)


@pytest.mark.parametrize(
    ("kernel", "padding", "side"),
    [
        ((3, 3, 2, 5), ((0, 0), (0, 0)), (6, 7)),
        ((3, 3, 2, 5), SAME, (6, 7)),
        ((3, 3, 4, 3), ((2, 0), (0, 1)), (6, 7)),
        ((3, 3, 3, 16), SAME, (6, 8)),
        ((3, 3, 8, 16), ((0, 0), (0, 0)), (6, 7)),
        ((3, 3, 16, 32), SAME, (6, 7)),
        ((1, 1, 4, 3), ((0, 0), (0, 0)), (6, 7)),
        ((1, 1, 4, 3), ((2, 0), (0, 1)), (6, 7)),
        ((2, 4, 3, 3), ((0, 1), (2, 1)), (6, 7)),
        ((1, 1, 4, 3), ((0, 0), (0, 0)), (1, 1)),
    ],
)
def test_convolution_and_both_gradients_equal_xlas(kernel, padding, side):
    images, weights = normal(5, *side, kernel[2]), normal(*kernel)
    ours = partial(convolution.convolve, window_strides=(1, 1), padding=padding)
    outputs, gradients = with_gradients(ours, images, weights)
    plain = partial(plain_convolution, padding=padding)
    wanted, wanted_gradients = with_gradients(plain, images, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(outputs, wanted)
    chex.assert_trees_all_close(outputs, wanted, atol=1e-5)
    chex.assert_trees_all_close(gradients, wanted_gradients, atol=3e-5)


@pytest.mark.parametrize("count", [1, 16, 20, 29, 34])
def test_a_kernels_gradient_is_that_of_all_images_however_they_are_cut(count, monkeypatch):
    monkeypatch.setattr(xla, "MICRO_BATCH_BYTES", 4 * 16 * 5 * 6 * 4)  # 16 images
    images, weights = normal(count, 5, 6, 3), normal(3, 3, 3, 4)
    _, wanted = with_gradients(lambda w: plain_convolution(images, w, SAME), weights)
    _, ours = with_gradients(lambda w: convolution.convolve(images, w, (1, 1), SAME), weights)
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_nets_under_vmap_are_convolved_and_masked_as_one_by_one():
    images, kernels = normal(3, 2, 6, 6, 2), normal(3, 3, 3, 2, 4)
    one = partial(convolution.convolve, window_strides=(1, 1), padding=SAME)
    total = jax.jit(jax.grad(lambda x, w: jnp.square(one(x, w)).sum(), (0, 1)))
    apart = [total(x, w) for x, w in zip(images, kernels, strict=True)]
    apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    chex.assert_trees_all_close(jax.vmap(total)(images, kernels), apart, rtol=2e-5, atol=1e-4)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(partial(dropout.keep_mask, layer=2, shape=(3, 4, 4, 2), rate=0.4))
    chex.assert_trees_all_equal(jax.vmap(draw)(keys), jnp.stack([draw(key) for key in keys]))


def test_pieces_divide_and_are_few():
    image = xla.MICRO_BATCH_BYTES // 16
    for count in range(1, 300):
        piece = xla.micro_batch_of(count, image)
        assert count % piece == 0
        assert piece > 8 or piece == count
    assert [xla.micro_batch_of(count, image) for count in (16, 40, 64, 128)] == [16, 10, 16, 16]
    assert xla.micro_batch_of(64, image // 4) == 64
    assert xla.micro_batch_of(7, 10 * xla.MICRO_BATCH_BYTES) == 1


SLOW = {"use_fast_variance": False}
IMAGE = {"reduction_axes": (1, 2, 3), "feature_axes": -1}
FLAX_NORMS = {
    "batch": (nn.BatchNorm(use_running_average=False, **SLOW), (True, 8, True)),
    "group": (nn.GroupNorm(4, **SLOW), (False, 4, True)),
    "layer": (nn.LayerNorm(**IMAGE, **SLOW), (False, 1, True)),
    "instance": (nn.InstanceNorm(**SLOW), (False, 8, True)),
    "rms": (nn.RMSNorm(**IMAGE), (False, 1, False)),
}


@pytest.mark.parametrize("norm", FLAX_NORMS)
def test_normalize_and_its_gradients_equal_flaxs_far_from_zero(norm):
    """At a mean 300 deviations away, where inputs are rounded to 3e-5, the sum of 280 of them moves
    a mean by up to 1e-4, and a scale of three multiplies that. A variance taken from mean squares
    would be off by 5e-3. (Of forty draws nine differ from Flax by more than 3e-4.)
    """
    module, (batch, groups, centered) = FLAX_NORMS[norm]
    module = module.clone(epsilon=1e-3)
    inputs, scale, bias = normal(6, 5, 7, 8) + 300, normal(8), normal(8)
    params = {"scale": scale, "bias": bias} if centered else {"scale": scale}
    over = norms.Over(batch, groups, centered, epsilon=1e-3)

    def flax(inputs, params):
        return module.apply({"params": params}, inputs, mutable=["batch_stats"])[0]

    def ours(inputs, params):
        return norms.normalize(inputs, params["scale"], params.get("bias", 0 * bias), over)[0]

    wanted, wanted_gradients = with_gradients(flax, inputs, params)
    outputs, gradients = with_gradients(ours, inputs, params)
    chex.assert_trees_all_close(outputs, wanted, rtol=1e-4, atol=1e-3)
    chex.assert_trees_all_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "ghost"])
@pytest.mark.parametrize("shape", [(64, 28, 28, 32), (70, 14, 14, 64), (16, 30, 30, 4)])
def test_normalize_is_right_at_the_nets_own_sizes(norm, shape):
    """Compiled, against float64. At the first two sizes jaxlib 0.10.1 gets two sums in a row wrong
    by a seventh (a fused reduction that leaves out its padding), at no smaller batch. A ghost is an
    image as high as two.
    """
    if norm == "ghost":
        shape = (shape[0] // 2, 2 * shape[1], *shape[2:])
    channels = shape[-1]
    groups = {"group": 4, "layer": 1}.get(norm, channels)
    over = norms.Over(norm == "batch", groups, whole=norm == "ghost")
    axes = (0, 1, 2) if norm == "batch" else (1, 2, 4)
    inputs, cotangent = normal(*shape) + 0.5, normal(*shape)
    scale, bias = normal(channels), normal(channels)

    @jax.jit
    def both(*arguments):
        outputs, back = jax.vjp(lambda *a: norms.normalize(*a, over)[0], *arguments)
        return outputs, *back(cotangent)

    def grouped(values):
        values = np.asarray(values, np.float64)
        return values if norm == "batch" else values.reshape(*shape[:3], over.groups, -1)

    x, g = grouped(inputs), grouped(cotangent * scale[None, None, None])
    deviation = np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    x = (x - x.mean(axes, keepdims=True)) / deviation
    to_inputs = g - g.mean(axes, keepdims=True) - x * (g * x).mean(axes, keepdims=True)
    normalized, g = x.reshape(shape), np.asarray(cotangent, np.float64)
    wanted = (normalized * np.asarray(scale) + np.asarray(bias), to_inputs / deviation)
    wanted += ((g * normalized).sum((0, 1, 2)), g.sum((0, 1, 2)))
    for result, expected in zip(both(inputs, scale, bias), wanted, strict=True):
        error = np.abs(np.asarray(result, np.float64) - expected.reshape(result.shape)).max()
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


def test_relu_and_its_gradient_equal_flaxs_whatever_its_first_value_is():
    ours, flaxs = (jax.jit(partial(with_gradients, relu)) for relu in (dropout.relu, nn.relu))
    for first in (0.0, -0.0, 1.0, -1.0, np.nan, np.inf):
        x = np.array(normal(2, 3, 4, 5))
        x[0, 0, 0, :2] = first, 0.0
        chex.assert_trees_all_equal(ours(x), flaxs(x))


def test_gradients_can_be_differentiated_again():
    images, kernel = normal(2, 6, 6, 2), normal(3, 3, 2, 4)

    def of_gradient(convolve, relu, max_pool):
        """The gradient of a gradient's squares."""

        def cubes(kernel):
            return (max_pool(relu(convolve(images, kernel))) ** 3).sum()

        squares = jax.grad(lambda kernel: jnp.square(jax.grad(cubes)(kernel)).sum())
        return jax.jit(squares)(kernel)

    convolve = partial(convolution.convolve, window_strides=(1, 1), padding=SAME)
    ours = of_gradient(convolve, dropout.relu, pooling.max_pool)
    convolve = partial(plain_convolution, padding=SAME)
    flax = of_gradient(convolve, nn.relu, partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)))
    np.testing.assert_allclose(ours, flax, rtol=1e-4, atol=1e-4 * np.abs(flax).max())


POOLED = [
    (pooling.max_pool, lambda x: nn.max_pool(x, (2, 2), (2, 2)), side)
    for side in ((6, 6), (7, 5), (2, 3), (34, 34))
]
POOLED += [(pooling.global_max, layers.plain.global_max, (5, 4))]


@pytest.mark.parametrize("values", ["normal", "tied", "bfloat16"])
@pytest.mark.parametrize(("ours", "plain", "side"), POOLED)
def test_a_maximum_and_its_gradient_equal_flaxs(ours, plain, side, values):
    images = normal(3, *side, 4)
    if values == "tied":  # after a ReLU, ties at zero are the rule
        images = jnp.round(images)
    images = images.astype("bfloat16" if values == "bfloat16" else "float32")
    outputs, wanted = with_gradients(ours, images), with_gradients(plain, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(outputs, wanted)
    chex.assert_trees_all_equal(outputs, wanted)


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
            x = plain_convolution(images, kernel, SAME)
            x = jax.nn.standardize(x, axis=(0, 1, 2), epsilon=1e-5) * scale[None, None, None]
            x = layers.plain.global_max(nn.relu(x + bias[None, None, None]))
        else:
            x = convolution.convolve(images, kernel, (1, 1), SAME)
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
        x = convolution.convolve(images, kernel, (1, 1), SAME)
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
    ours = with_gradients(lambda x: dropout.dropout_relu(x, mask, rate), inputs)
    plain = with_gradients(lambda x: nn.relu(jnp.where(mask, x / (1 - rate), 0)), inputs)
    chex.assert_trees_all_close(ours, plain, rtol=1e-6)


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


def test_a_micro_batch_of_a_batch_gets_the_batchs_masks():
    draw = partial(dropout.keep_mask, jax.random.key(3), 2, rate=0.4)
    draw = jax.jit(draw, static_argnames="shape")
    pieces = [draw(shape=(2, 4, 4, 3), first_image=jnp.int32(first)) for first in (0, 2, 4)]
    chex.assert_trees_all_equal(jnp.concatenate(pieces), draw(shape=(6, 4, 4, 3)))


def test_masks_do_not_change():
    """Stored runs can be repeated only while a key gives the same mask."""
    mask = dropout.keep_mask(jax.random.key(7, impl="threefry2x32"), 1, (32,), 0.5)
    assert "".join("01"[int(kept)] for kept in mask) == "01111110010111010101111110101011"
