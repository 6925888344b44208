"""What the exploring notebook measures and draws, against plain arithmetic."""

import chex
import exploring
import numpy as np
import pytest
from helpers import init

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
