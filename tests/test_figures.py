"""Figures from a run directory alone: all are there, from the right rows, in the right colours."""

import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from jaxnorm import figures, stats
from jaxnorm.records import RunDirectory

NORMS = ("batch", "group", "layer")
NAMES = {f"{kind}-{norm}" for norm in NORMS for kind in ("curves", "confusion")}
NAMES |= {f"mistakes-{rule}-{norm}" for norm in NORMS for rule in ("confident", "drawn")}
NAMES |= {"mistakes-common", "loss", "accuracy", "class-accuracy", "training-images"}


def test_every_figure_of_every_norm_is_drawn(tiny_run):
    drawn = {path.stem: path for path in (tiny_run.path / "figures").iterdir()}
    assert set(drawn) == NAMES
    for path in drawn.values():
        height, width = imread(path).shape[:2]
        assert 900 <= width <= 1300, path
        assert 350 <= height <= 1300, path


def shown(figure):
    """The pictures in a figure, and the titles above them."""
    tiles = [axes for axes in figure.axes if axes.images]
    return [np.asarray(a.images[0].get_array()) for a in tiles], [a.get_title() for a in tiles]


def test_mistakes_show_the_right_images_as_they_are_with_class_and_confidence(tiny_run, tiny):
    run = figures.Run(tiny_run)
    for name, figure in figures.mistakes(run):
        images, titles = shown(figure)
        rows = run.rows()[name]
        assert len(images) == len(rows) <= 10
        for image, title, row in zip(images, titles, rows, strict=True):
            np.testing.assert_array_equal(image, tiny.test_images[row])
            assert title.startswith(f"true: {tiny.class_names[tiny.test_labels[row]]}\n")
            for norm in [name.split("-")[2]] if name.count("-") == 2 else NORMS:
                probability = stats.probabilities(run.logits[norm][row])
                assert probability.argmax() != tiny.test_labels[row]
                said = f"{tiny.class_names[probability.argmax()]} {probability.max():.0%}"
                assert said in title
        assert tiny_run.info().dataset["caption"] in figure.get_supxlabel()


def test_curves_hold_the_records(tiny_run):
    run = figures.Run(tiny_run)
    for name, figure in figures.curves(run):
        norm = name.split("-")[1]
        batch, *by_epoch = figure.axes
        np.testing.assert_array_equal(batch.lines[0].get_ydata(), tiny_run.step_losses(norm, 3))
        fields = ("train_accuracy", "test_loss", "test_accuracy")
        for axes, field in zip(by_epoch, fields, strict=True):
            wanted = [getattr(epoch, field) for epoch in run.epochs[norm]]
            np.testing.assert_array_equal(axes.lines[0].get_ydata(), wanted)


def test_the_norms_stand_together_on_one_graph_each_told_apart(tiny_run):
    for _, figure in figures.together(figures.Run(tiny_run)):
        lines = figure.axes[0].lines
        assert len(lines) == 6
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 6
        assert len({line.get_marker() for line in lines}) == 3


def test_training_images_are_the_sets_own(tiny_run, tiny):
    ((_, figure),) = figures.training_images(figures.Run(tiny_run))
    images, titles = shown(figure)
    originals = {
        image.tobytes(): label
        for image, label in zip(tiny.train_images, tiny.train_labels, strict=True)
    }
    assert len(images) == 20
    for image, title in zip(images, titles, strict=True):
        assert tiny.class_names[originals[image.tobytes()]] == title


@pytest.mark.parametrize("gone", ["examples.npz", "predictions/group-3.npz", "step_losses"])
def test_what_is_missing_is_named_and_the_rest_is_drawn(tiny_run, scratch, gone):
    copy = RunDirectory(scratch / "copy")
    shutil.copytree(tiny_run.path, copy.path, ignore=shutil.ignore_patterns("figures"))
    path = copy.path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    drawn, missing = figures.draw(copy)
    assert {"loss.png", "accuracy.png"} <= set(drawn)
    assert missing
    assert all(gone in line for line in missing)
