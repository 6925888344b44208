"""A run's records read once, and the numbers made from them."""

import csv
import dataclasses
import errno
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import refusal, remove_nets, rewrite_net

from jaxnorm.analysis import figures, page, results, tables
from jaxnorm.analysis.results import Run, differences
from jaxnorm.config import NetId
from jaxnorm.records import to_lines


def test_nets_are_found_by_norm_and_seed(made_up):
    assert made_up.norms == ["batch", "group", "layer"]
    assert made_up.seeds("group") == [1, 2, 3]
    assert [epoch.test_accuracy for epoch in made_up.epochs["layer", 2]] == [6 / 22, 11 / 22]
    assert made_up.sample("batch").values == (16 / 22, 18 / 22, 14 / 22)
    assert made_up.sample("batch", "train").values == (15 / 22, 17 / 22, 13 / 22)
    assert made_up.seeds_text == "n = 3 seeds (1 to 3)"
    assert made_up.caption == "tiny; matched nets, n = 3 seeds (1 to 3)"


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("*-3", "n = 2 seeds (1 to 2), 6 of 9 nets finished"),
        ("*-[23]", "seed 1, 3 of 9 nets finished"),
        ("*", "n = 3 seeds (1 to 3), 0 of 9 nets finished"),
    ],
)
def test_seeds_that_are_not_finished_are_not_counted(sweep, gone, text):
    directory = sweep()
    remove_nets(directory, gone)
    assert Run(directory).seeds_text == text


def test_only_finished_nets_count_and_the_caption_says_which(sweep):
    """The first net of group norm stopped after its first epoch, with 2 of 22 right."""
    rows = {"group": ((2,), (9, 9), (9, 12), (9, 9))}
    directory = sweep(accuracies=rows, norm="group", seeds=4)
    remove_nets(directory, "group-3")
    run = Run(directory)
    assert run.seeds("group") == list(run.summaries["group"]) == [2, 4]
    assert run.sample("group").n == 2
    assert run.caption.endswith("n = 2 seeds (2, 4), 2 of 4 nets finished")
    totals = np.bincount(run.labels)
    np.testing.assert_allclose(run.class_accuracies("group") @ totals, [9, 9])
    np.testing.assert_allclose(run.confusion("group").diagonal().sum(), 9)
    assert list(run.predictions) == [("group", 2), ("group", 4)]
    np.testing.assert_array_equal(run.logits["group"], run.predictions["group", 2].logits)


def test_a_norm_without_a_finished_net_is_left_out(sweep):
    rows = {"batch": ((5, 9), (5, 9)), "group": ((5,), (5,)), "layer": ((5,), (5, 9))}
    run = Run(sweep(accuracies=rows, seeds=2))
    assert run.norms == ["batch", "layer"]
    assert [run.shown_seed(norm) for norm in run.norms] == [2, 2]  # of both, so that they compare
    assert not any("group" in name for name in run.mistakes)


def test_what_was_measured_is_kept_of_every_norm_that_has_any(sweep):
    directory = sweep()
    nets = directory.path / "nets"
    (nets / "batch-1" / "probes.npz").rename(nets / "batch-2" / "probes.npz")
    (nets / "layer-1" / "probes.npz").unlink()
    run = Run(directory)
    measured = run.probes({"epoch": "iu"})
    assert {norm: list(nets) for norm, nets in measured.items()} == {"batch": [2], "group": [1]}
    (line,) = run.unmeasured
    assert "layer-1/probes.npz is missing" in line


def test_data_of_which_nobody_knows_whether_it_is_verified_says_so(sweep, tiny):
    data = dataclasses.replace(tiny, verified=None)
    run = Run(sweep(dataset=data, seeds=1))
    assert run.caption == "tiny, origin not known; matched nets, seed 1"


def test_differences_are_paired_by_seed_if_the_norms_were_trained_apart_too(made_up, sweep):
    apart = [Run(sweep(norm, norm=norm)) for norm in ("batch", "group")]
    for pair in (made_up.differences[0], *differences(apart)):
        assert (pair.first, pair.second) == ("batch", "group")
        np.testing.assert_allclose(pair.sample.values, np.array([1, 2, -1]) / 22)


def test_accuracies_of_the_classes_are_each_seeds_own(made_up):
    accuracies = made_up.class_accuracies("group")
    assert accuracies.shape == (3, 4)
    totals = np.bincount(made_up.labels)
    np.testing.assert_allclose(accuracies @ totals, [15, 16, 15])
    np.testing.assert_allclose(made_up.confusion("group").diagonal().sum(), (15 + 16 + 15) / 3)


def test_classes_that_are_too_many_to_be_shown_are_one_line(sweep, monkeypatch):
    monkeypatch.setattr(results, "MOST_CLASSES", 3)
    run = Run(sweep(seeds=1))
    for show in (tables.classes, lambda run: next(figures.confusion(run))):
        assert "4 classes are more than the 3 that can be shown" in refusal(show, run)


def test_images_that_were_not_kept_are_named(made_up, sweep, tiny):
    rows = made_up.mistakes["mistakes-common"]
    assert len(rows)
    for row, image in zip(rows, made_up.images(rows), strict=True):
        np.testing.assert_array_equal(image, tiny.test_images[row])
    assert "lacks 1 of the test images" in refusal(made_up.images, np.array([1000]))
    alone = Run(sweep("alone", norm="batch")).mistakes
    assert list(alone) == ["mistakes-confident-batch", "mistakes-drawn-batch"]


def test_predictions_of_another_epoch_or_another_net_are_refused(sweep):
    directory, net = sweep(), NetId("group", 2)
    good = Run(directory).predictions[net]
    for keep, message in (
        (lambda logits: (logits * 2, good.labels), "are not those of its last line"),
        (lambda logits: (logits[:, ::-1], good.labels), "are not those of its last line"),
        (lambda logits: (logits[::-1], good.labels[::-1]), "has other labels than the first net"),
        (lambda logits: (logits[:-1], good.labels[:-1]), "its arrays do not fit together"),
        (lambda logits: (logits[:, :3], good.labels % 3), "its arrays do not fit together"),
        (lambda logits: (logits, good.labels + 1), "it has labels of no class"),
        (lambda logits: (None, good.labels), "holds no predictions of 22 test images"),
    ):
        logits, labels = keep(good.logits)
        rewrite_net(directory, net, logits=logits, labels=labels)
        assert re.search(f"group-2.*{message}", refusal(lambda: Run(directory).predictions))


@pytest.mark.parametrize("numbers", [[1, 0], [0, 0], [1], [0, 1, 1], [0, 1, 2], []], ids=str)
def test_a_net_whose_lines_are_wrong_is_named_and_the_others_count(sweep, numbers):
    directory, net = sweep(norm="batch", seeds=2), NetId("batch", 2)
    epochs = Run(directory).epochs[net]
    epochs.append(dataclasses.replace(epochs[-1], epoch=3))
    lines = to_lines([epochs[number] for number in numbers])
    rewrite_net(directory, net, epochs=lines, losses=np.ones(5 * len(numbers), np.float32))
    run = Run(directory)
    (line,) = run.damaged
    assert str(run.net(*net).path) in line
    assert run.seeds("batch") == list(run.summaries["batch"]) == [1]


def test_lines_that_tell_of_images_that_no_net_held_out_are_wrong(sweep):
    directory, net = sweep(norm="batch", seeds=2), NetId("batch", 2)
    validated = {"validation_loss": 1.0, "validation_accuracy": 0.5}
    epochs = [dataclasses.replace(epoch, **validated) for epoch in Run(directory).epochs[net]]
    rewrite_net(directory, net, epochs=to_lines(epochs))
    (line,) = Run(directory).damaged
    assert "batch-2 and its run.json disagree about held-out images" in line


def test_a_net_that_cannot_be_opened_is_named_and_the_others_count(sweep, monkeypatch):
    """As one of another user's, or one on a disk that fails."""
    run = Run(sweep(norm="batch", seeds=2))
    read = run.directory.read_bytes

    def denied(name, *arguments):
        if "batch-2" in str(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return read(name, *arguments)

    monkeypatch.setattr(run.directory, "read_bytes", denied)
    assert [("Permission denied" in line) for line in run.damaged] == [True]
    assert run.seeds("batch") == [1]


def test_the_csv_holds_every_epoch_of_every_net(sweep):
    rows = {"batch": ((5, 9), (5,)), "none": ((4, 8),) * 2}
    run = Run(sweep(accuracies=rows, norm="batch,none", seeds=2))
    rows = list(csv.DictReader(run.csv().splitlines()))
    wanted = [vars(epoch) for epochs in run.epochs.values() for epoch in epochs]
    assert len(rows) == 7
    for row, epoch in zip(rows, wanted, strict=True):
        assert row == {k: "" if v is None else str(v) for k, v in epoch.items()}


def test_a_reduced_run_shows_what_the_whole_one_shows(sweep, unpainted, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "notebooks" / "tools")
    tool, run = importlib.import_module("reduce"), Run(sweep(norm="batch,group", seeds=2))
    whole = page.write(run.directory)
    exact = {net: run.step_losses(*net) for net in run.finished}
    tool.reduce(run, mistakes=True)
    tool.sweep_up(run.directory.path)
    files = {path.name for path in run.directory.path.rglob("*") if path.is_file()}
    assert files == {"run.json", "examples.npz", "result.npz", "probes.npz"}
    reduced = page.read(run.directory)
    for field in ("missing", "headline", "finding", "tables"):
        assert getattr(reduced, field) == getattr(whole, field)
    assert reduced.missing == []
    for ours, theirs in zip(reduced.charts, whole.charts, strict=True):
        assert (ours.name, ours.text) == (theirs.name, theirs.text)
    kept = [net for net, made in reduced.run.predictions.items() if made.logits is not None]
    assert kept == [("batch", 1), ("group", 1)]
    for net, losses in exact.items():
        np.testing.assert_array_equal(reduced.run.step_losses(*net), losses)
    tool.reduce(Run(run.directory), mistakes=False)
    bare = page.read(run.directory)
    assert bare.tables == whole.tables
    for net, made in bare.run.predictions.items():
        assert made.log_probabilities.dtype == np.float16
        losses = bare.run.step_losses(*net)
        assert losses.dtype == np.float32
        np.testing.assert_allclose(losses, exact[net], rtol=1e-3)
        assert (losses != exact[net]).any()
    logits, examples = bare.missing  # which the pictures of mistakes need
    assert logits.endswith("batch-1 holds no logits")
    assert examples.endswith("examples.npz is missing")


def test_a_reduced_tuning_keeps_its_lines_alone(sweep, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "notebooks" / "tools")
    tool, directory = importlib.import_module("reduce"), sweep(norm="group", validation=4)
    lines = Run(directory).epochs
    (directory.path / "learning-rate.png").touch()
    tool.reduce(Run(directory), mistakes=False)
    tool.sweep_up(directory.path)
    files = {path.name for path in directory.path.rglob("*") if path.is_file()}
    assert files == {"run.json", "result.npz", "probes.npz"}
    kept = np.load(directory.path / "nets" / "group-1" / "result.npz")
    assert {name: kept[name].size for name in kept} == {"epochs": 1, "environments": 1, "losses": 0}
    assert Run(directory).epochs == lines


def test_a_run_is_shown_by_its_path_whatever_was_read(made_up):
    assert made_up.predictions
    assert repr(made_up) == f"Run({str(made_up.directory.path)!r})"
