"""Figures from a run directory alone: all are there, from the right rows, in the right colours."""

import dataclasses
import io
import shutil

import numpy as np
import pytest
from helpers import losses_of, probes_of, rewrite_net
from matplotlib.image import imread

from jaxnorm.analysis import drawing, figures, inside, stats, tables
from jaxnorm.analysis.results import Run

NORMS = ("batch", "group", "layer")


def names_of(norms):
    """The figures of a run of these norms."""
    names = {f"{kind}-{norm}" for norm in norms for kind in ("curves", "confusion")}
    names |= {f"mistakes-{rule}-{norm}" for norm in norms for rule in ("confident", "drawn")}
    names |= {"mistakes-common", "loss", "accuracy", "class-accuracy", "training-images", "seeds"}
    return names | {"activations", "gradients", "batch-statistics", "depth", "corruptions"}


def test_every_figure_of_every_norm_is_drawn_and_nothing_is_written(sweep, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: drawing.png(figure, 26))  # a fifth as large
    run = Run(sweep(norm="batch,layer", seeds=2))
    before = sorted(run.directory.path.rglob("*"))
    charts, missing = figures.draw(run)
    assert missing == []
    assert sorted(run.directory.path.rglob("*")) == before
    titles = {chart.name: chart.title for chart in charts}
    assert set(titles) == names_of(("batch", "layer"))
    assert titles["curves-batch"] == "batch norm: 45,584 parameters; mean and range of 2 seeds"
    for chart in charts:
        height, width = imread(io.BytesIO(chart.png)).shape[:2]
        assert 180 <= width <= 260, chart.name
        assert 70 <= height <= 260, chart.name


def shown(figure):
    """The pictures in a figure, and the words above them: each straight over its picture."""
    (axes,) = figure.axes
    for image, text in zip(axes.images, axes.texts, strict=True):
        left, right, _, top = image.get_extent()
        assert text.get_position() == pytest.approx(((left + right) / 2, top), abs=0.04)
    images = [np.asarray(image.get_array()) for image in axes.images]
    places = {tuple(image.get_extent()) for image in axes.images}
    assert len(places) == len(images)  # none over another
    return images, [text.get_text() for text in axes.texts]


def test_mistakes_show_the_right_images_as_they_are_with_class_and_confidence(made_up, tiny):
    run = made_up
    for name, figure in figures.mistakes(run):
        images, titles = shown(figure)
        rows = run.mistakes[name]
        assert len(images) == len(rows) <= 10
        for image, title, row in zip(images, titles, rows, strict=True):
            np.testing.assert_array_equal(image, tiny.test_images[row])
            assert title.startswith(f"true: {tiny.class_names[tiny.test_labels[row]]}\n")
            for norm in [name.split("-")[2]] if name.count("-") == 2 else NORMS:
                probability = stats.probabilities(run.logits[norm][row])
                assert probability.argmax() != tiny.test_labels[row]
                prediction = f"{tiny.class_names[probability.argmax()]} {probability.max():.0%}"
                assert prediction in title
        assert run.info.dataset.caption in figure.get_supxlabel()


def test_curves_hold_the_records(sweep):
    run = Run(sweep(seeds=1))
    for name, figure in figures.curves(run):
        norm = name.split("-")[1]
        batch, *by_epoch = figure.axes
        losses = losses_of(run.directory, (norm, 1))
        np.testing.assert_array_equal(batch.lines[0].get_ydata(), losses)
        fields = ("train_accuracy", "test_loss", "test_accuracy")
        for axes, field in zip(by_epoch, fields, strict=True):
            wanted = [getattr(epoch, field) for epoch in run.epochs[norm, 1]]
            np.testing.assert_array_equal(axes.lines[0].get_ydata(), wanted)
            assert not axes.collections


def test_curves_of_several_seeds_are_their_mean_and_range(made_up):
    run = made_up
    _, figure = list(figures.curves(run))[1]
    test = figure.axes[3]
    means = [(9 + 12 + 11) / 66, (15 + 16 + 15) / 66]
    np.testing.assert_allclose(test.lines[0].get_ydata(), means)
    (band,) = test.collections
    edges = band.get_paths()[0].vertices
    for epoch, wanted in ((1, (9, 12)), (2, (15, 16))):
        heights = edges[edges[:, 0] == epoch][:, 1]
        np.testing.assert_allclose((heights.min(), heights.max()), np.array(wanted) / 22)
    assert len(figure.axes[0].lines) == 1 + 3  # each batch of the first seed, a mean of each


def test_the_norms_stand_together_on_one_graph_each_told_apart(made_up):
    for _, figure in figures.together(made_up):
        lines = figure.axes[0].lines
        assert len(lines) == 6
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 6
        assert len({line.get_marker() for line in lines}) == 3


def test_many_norms_have_two_panels_each_so_that_no_norm_has_two_lines_in_one(sweep):
    norms = [*NORMS, "pixel", "instance", "rms", "none", "ghost"]
    rows = {norm: ((number, number + 5),) for number, norm in enumerate(norms, 5)}
    run = Run(sweep(accuracies=rows, norm=",".join(norms), seeds=1))
    for (_, figure), what in zip(figures.together(run), ("loss", "accuracy"), strict=True):
        assert [axes.get_ylabel() for axes in figure.axes] == [f"test {what}", f"train {what}"]
        for axes, when in zip(figure.axes, ("test", "train"), strict=True):
            for line, norm in zip(axes.lines, norms, strict=True):
                wanted = [getattr(epoch, f"{when}_{what}") for epoch in run.epochs[norm, 1]]
                np.testing.assert_array_equal(line.get_ydata(), wanted)
        words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert words == norms
    ((_, figure),) = inside.depth(run)
    panels = np.reshape(figure.axes, (2, 2))
    measured = probes_of(run.directory, ("ghost", 1))
    for row, when in enumerate(("initial_gradients", "gradients")):
        assert [len(axes.lines) for axes in panels[row]] == [len(norms)] * 2
        np.testing.assert_allclose(panels[row, 0].lines[-1].get_ydata(), measured[when])
        cosines = panels[row, 1].lines[-1].get_ydata()
        np.testing.assert_allclose(cosines, measured["similarities"][row])


def test_the_seeds_figure_shows_every_value_and_every_paired_difference(made_up, sweep):
    ((_, figure),) = figures.seeds(made_up)
    left, right = figure.axes
    pairs = [line for line in left.lines if line.get_color() == "#999999"]
    np.testing.assert_allclose(
        [line.get_ydata() for line in pairs],
        np.array([[16, 15, 12], [18, 16, 11], [14, 15, 13]]) / 22,
    )
    points = [line for line in right.lines if line.get_color() == "#999999"]
    np.testing.assert_allclose(
        [line.get_xdata() for line in points],
        np.array([[1, 2, -1], [4, 7, 1], [3, 5, 2]]) / 0.22,
    )
    assert [tick.get_text() for tick in right.get_yticklabels()] == [
        *("batch - group", "batch - layer", "group - layer")
    ]
    assert list(figures.seeds(Run(sweep("one", seeds=1)))) == []
    ((_, alone),) = figures.seeds(Run(sweep("alone", norm="group")))
    assert len(alone.axes) == 1  # no norm to compare it with


def test_confusion_is_the_mean_of_the_seeds(made_up, tiny):
    run = made_up
    figure = dict(figures.confusion(run))["confusion-layer"]
    counts = np.array([float(text.get_text()) for text in figure.axes[0].texts]).reshape(4, 4)
    wanted = np.zeros((4, 4))
    for seed in (1, 2, 3):
        predicted = run.predictions["layer", seed].predicted
        for true, guess in zip(tiny.test_labels, predicted, strict=True):
            wanted[true, guess] += 1 / 3
    np.testing.assert_allclose(counts, wanted.round())


def test_inside_shows_what_was_measured(made_up):
    run = made_up
    drawn = dict(inside.inside(run))
    panels = drawn["activations"].axes
    for line, norm in zip(panels[3].lines, NORMS, strict=True):
        measured = probes_of(run.directory, (norm, 1))
        np.testing.assert_array_equal(line.get_ydata(), measured["after"][:, 1])
    batch = drawn["batch-statistics"].axes[0].lines
    measured = probes_of(run.directory, ("batch", 1))
    np.testing.assert_array_equal(batch[0].get_ydata(), measured["batch_accuracy"])
    assert list(batch[1].get_ydata()) == [0.5, 0.5]  # running averages


def test_depth_and_corruptions_are_means_of_what_was_measured(sweep):
    run = Run(sweep())
    figure = dict(inside.depth(run))["depth"]
    assert figure.get_supxlabel().endswith("n = 3 seeds (1 to 3), 1 measured")
    left, right = figure.axes
    measured = probes_of(run.directory, ("batch", 1))
    np.testing.assert_allclose(left.lines[0].get_ydata(), measured["initial_gradients"])
    np.testing.assert_allclose(right.lines[1].get_ydata(), measured["similarities"][1])
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(NORMS)
    axes = dict(inside.corruptions(run))["corruptions"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "noise", "blur"]
    measured = probes_of(run.directory, ("layer", 1))
    np.testing.assert_allclose(axes.lines[2].get_ydata()[1:], measured["corrupted_accuracy"])
    nets = run.directory.path / "nets"
    for norm in NORMS:
        for seed in (2, 3):
            shutil.copy(nets / f"{norm}-1" / "probes.npz", nets / f"{norm}-{seed}")
    for make in (inside.depth, inside.corruptions):
        ((_, figure),) = make(Run(run.directory))
        assert figure.get_supxlabel().endswith("n = 3 seeds (1 to 3)")


def test_what_an_earlier_version_did_not_measure_is_neither_shown_nor_missing(sweep, unpainted):
    directory = sweep(norm="batch,layer", seeds=2)
    newer = dict.fromkeys(("similarities", "corruptions", "precise_accuracy"))
    for norm in ("batch", "layer"):
        rewrite_net(directory, (norm, 1), "probes", **newer)
    charts, missing = figures.draw(Run(directory))
    assert missing == []
    wanted = names_of(("batch", "layer")) - {"depth", "corruptions"}
    assert {chart.name for chart in charts} == wanted
    assert tables.evaluation(Run(directory)).rows == []


def test_gradients_of_dead_nets_are_drawn(sweep):
    """Nothing but zeros, for which a logarithmic axis has no place."""
    run = Run(sweep(norm="batch", seeds=1))
    dead = dict.fromkeys(("gradients", "initial_gradients"), np.zeros(3, np.float32))
    rewrite_net(run.directory, ("batch", 1), "probes", **dead)
    drawn = dict([*inside.inside(run), *inside.depth(run)])
    for name in ("gradients", "depth"):
        assert drawn[name].axes[0].get_yscale() == "linear"
        assert figures.png(drawn[name], 20)


def test_a_line_of_zeros_has_no_place_on_a_logarithmic_axis_and_the_legend_says_so(sweep):
    run = Run(sweep(norm="batch,layer", seeds=1))
    rewrite_net(run.directory, ("layer", 1), "probes", gradients=np.zeros(3, np.float32))
    axes = dict(inside.inside(run))["gradients"].axes[0]
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["batch", "layer: 0"]


def test_names_are_no_formulas(sweep, tiny, monkeypatch):
    named = (figures.mistakes, figures.confusion, figures.training_images)
    monkeypatch.setattr(figures, "FIGURES", named)  # that show the names of classes
    monkeypatch.setattr(figures, "png", lambda figure: drawing.png(figure, 20))
    data = dataclasses.replace(tiny, class_names=("$\\frac$", "a_b^c", "$", "d"))
    charts, missing = figures.draw(Run(sweep(norm="batch", seeds=1, dataset=data)))
    assert missing == []
    (words,) = (chart.text for chart in charts if chart.name == "training-images")
    assert "; $\\frac$; " in words
    assert r"\$" not in words


def test_training_images_are_the_sets_own(made_up, tiny):
    ((_, figure),) = figures.training_images(made_up)
    images, titles = shown(figure)
    originals = {
        image.tobytes(): label
        for image, label in zip(tiny.train_images, tiny.train_labels, strict=True)
    }
    assert len(images) == 20
    for image, title in zip(images, titles, strict=True):
        assert tiny.class_names[originals[image.tobytes()]] == title


@pytest.mark.parametrize(
    ("gone", "undrawn"),
    [
        ("examples.npz", {"mistakes", "training"}),
        ("nets/batch-1/probes.npz", set()),
        ("logits", {"mistakes", "confusion", "class"}),
        ("losses", {"curves"}),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_drawn(sweep, gone, undrawn, unpainted):
    directory, where = sweep(norm="batch,group", seeds=2), gone
    if gone.endswith(".npz"):
        (directory.path / gone).unlink()
    else:
        where = f"nets/group-1{'/result.npz' * (gone == 'logits')}"
        changed = {"logits": None, "losses": np.zeros(0, np.float32)}
        rewrite_net(directory, ("group", 1), **{gone: changed[gone]})
    charts, missing = figures.draw(Run(directory))
    lacking = names_of(("batch", "group")) - {chart.name for chart in charts}
    assert {name.split("-")[0] for name in lacking} == undrawn
    (line,) = missing
    assert f"{directory.path / where} " in line


def test_figures_of_finished_nets_say_which_seed_is_shown(sweep):
    """The first net of group norm stopped after its first epoch."""
    rows = {"batch": ((5, 9), (5, 9)), "group": ((5,), (5, 9))}
    run = Run(sweep(accuracies=rows, norm="batch,group", seeds=2))
    drawn = dict(figures.mistakes(run))
    assert drawn["mistakes-common"].get_suptitle().endswith("(seed 2)")
    _, accuracy = figures.together(run)
    assert accuracy[1].get_suptitle().endswith("mean and range of 1/2 seeds")
    for line in accuracy[1].axes[0].lines:
        assert len(line.get_ydata()) == 2
    assert accuracy[1].get_supxlabel().endswith("3 of 4 nets finished")


def test_a_long_class_name_is_cut():
    assert figures.label_of("x" * 24) == "x" * 24
    assert figures.label_of("x" * 25) == "x" * 23 + "\N{HORIZONTAL ELLIPSIS}"
    assert figures.label_of("$1") == r"\$1"
