"""What notebooks measure and draw, against plain arithmetic."""

import chex
import exploring
import numpy as np
import pytest
from helpers import init

from jaxnorm import norms
from jaxnorm.model.cnn import CNN
from jaxnorm.training import step


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_only_batch_norm_lets_one_images_loss_depend_on_another(tiny, norm):
    program = step.Program(model=CNN(norm, "three-layers", 4))
    state = init(program, tiny, 1)
    images, labels = tiny.train_images[:4], tiny.train_labels[:4]
    gradients = exploring.example_gradients(program, state, images, labels)
    chex.assert_shape(gradients, (4, 4))
    assert (gradients.diagonal() > 0).all()
    others = gradients[~np.eye(4, dtype=bool)]
    assert (others > 0).all() if norm == "batch" else (others == 0).all()


@pytest.mark.parametrize(
    ("norm", "place"),
    [
        ("batch", np.s_[:, :, :, 5]),
        ("group", np.s_[1, :, :, 4:6]),  # four groups of two channels
        ("layer", np.s_[1]),
        ("instance", np.s_[1, :, :, 5]),
        ("none", np.s_[1, 2, 3, 5]),
    ],
)
def test_what_a_norm_averages_over_by_hand(norm, place):
    wanted = np.zeros((3, 4, 4, 8), bool)
    wanted[place] = True
    np.testing.assert_array_equal(exploring.averaged_over(norm, at=(1, 2, 3, 5)), wanted)


def test_there_is_a_panel_for_each_norm_and_batch_sizes_are_in_order_with_their_seeds():
    masks = {norm: np.ones((2, 3, 3, 4), bool) for norm in ("batch", "layer")}
    figure = exploring.draw_averaged(masks)
    assert [axes.get_title() for axes in figure.axes] == ["batch norm", "layer norm"]
    figure = exploring.draw_example_gradients({"batch": np.eye(3), "layer": np.eye(3)})
    assert len(figure.axes) == 3  # and the scale
    values = {"batch": {16: [0.5, 0.7], 4: [0.2, 0.4]}, "group": {16: [0.6]}}
    (axes,) = exploring.draw_batch_sizes(values).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "16"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.3, 0.6])
    assert list(axes.lines[1].get_xdata()) == [1]


def test_a_norm_sees_batches_in_turn_and_the_last_is_what_it_returns():
    batches = np.random.default_rng(0).normal(3, 2, (3, 4, 5, 5, 2)).astype(np.float32)
    module = norms.BatchRenorm(relaxed=(0, 1, 1), momentum=0.5, use_running_average=False)
    moments = [(np.mean(x, (0, 1, 2)), np.std(x, (0, 1, 2))) for x in batches]
    mu, sigma = 0.0, 1.0
    for mean, deviation in moments[:2]:
        mu, sigma = (mu + mean) / 2, (sigma + deviation) / 2
    outputs = exploring.normalized(module, batches)
    np.testing.assert_allclose(outputs, (batches[2] - mu) / sigma, rtol=1e-4, atol=1e-4)
    outputs = exploring.normalized(norms.Identity(), batches)
    np.testing.assert_array_equal(outputs, batches[2])


def test_the_first_convolution_is_that_of_the_untrained_net(tiny):
    program = step.Program(model=CNN("none", "matched", 4))
    state = init(program, tiny, 1)
    kernel = np.asarray(state.params["C1"]["kernel"], np.float64)
    images = (tiny.train_images[:2] / 255 - tiny.mean) / tiny.deviation
    pixel = np.einsum("nhwc,hwcd->nd", images[:, 4:7, 9:12], kernel)
    outputs = exploring.convolved(tiny.train_images[:2].astype(np.float32), tiny)
    np.testing.assert_allclose(outputs[:, 4, 9], pixel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("by", "axis"), [("image", (1, 2, 3)), ("channel", (0, 1, 2))])
def test_a_panel_for_each_norm_has_mean_and_deviation_before_and_after(by, axis):
    before = np.random.default_rng(0).normal(3, 2, (4, 5, 5, 2))
    names = [str(i) for i in range(13)]
    figure = exploring.draw_moments(before, dict.fromkeys(names, before / 2), by)
    assert [axes.get_title() for axes in figure.axes if axes.axison] == names
    mean, low, high, after = (line.get_ydata() for line in figure.axes[12].lines)
    np.testing.assert_allclose(mean, before.mean(axis))
    np.testing.assert_allclose(low, before.mean(axis) - before.std(axis))
    np.testing.assert_allclose(high, before.mean(axis) + before.std(axis))
    np.testing.assert_allclose(after, before.mean(axis) / 2)
    (band,) = figure.axes[12].collections
    edges = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(edges.max(), ((before.mean(axis) + before.std(axis)) / 2).max())


def test_values_are_those_of_one_channel_in_the_images_named():
    before = np.random.default_rng(0).normal(3, 2, (4, 5, 5, 2))
    figure = exploring.draw_values(before, {"a": before, "b": -before}, images=(1, 3), channel=1)
    for axes, sign in zip(figure.axes, (1, -1), strict=False):
        for line, image in zip(axes.lines, (1, 3), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), before[image, :, :, 1].ravel())
            np.testing.assert_array_equal(line.get_ydata(), sign * before[image, :, :, 1].ravel())
    words = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert words == ["image 1", "image 3"]
