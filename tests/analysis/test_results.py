"""A run's records read once, and the numbers made from them."""

import csv
import dataclasses
import errno
import importlib
from pathlib import Path

import numpy as np
import pytest
from helpers import remove_nets, rewrite_net

from jaxnorm.analysis import figures, page, results, tables
from jaxnorm.analysis.results import Run, differences
from jaxnorm.config import NetId, UserError
from jaxnorm.records import to_lines


def test_nets_are_found_by_norm_and_seed(sweep):
    run = Run(sweep())
    assert run.norms == ["batch", "group", "layer"]
    assert run.seeds("group") == [1, 2, 3]
    assert [epoch.test_accuracy for epoch in run.epochs["layer", 2]] == [6 / 22, 11 / 22]
    assert run.sample("batch").values == (16 / 22, 18 / 22, 14 / 22)
    assert run.sample("batch", "train").values == (15 / 22, 17 / 22, 13 / 22)
    assert run.seeds_text == "n = 3 seeds (1 to 3)"
    assert "matched nets, n = 3" in run.caption


def test_seeds_that_are_not_finished_are_not_counted(sweep):
    directory = sweep()
    remove_nets(directory, "*-3")
    assert Run(directory).seeds_text == "n = 2 seeds (1 to 2), 6 of 9 nets finished"
    remove_nets(directory, "*-2")
    assert Run(directory).seeds_text == "seed 1, 3 of 9 nets finished"
    remove_nets(directory, "*")
    assert Run(directory).seeds_text == "n = 3 seeds (1 to 3), 0 of 9 nets finished"


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
    for verified, words in ((None, "tiny, origin not known"), (True, "tiny")):
        data = dataclasses.replace(tiny, verified=verified)
        run = Run(sweep(f"{verified}", dataset=data))
        assert run.caption == f"{words}; matched nets, n = 3 seeds (1 to 3)"


def test_differences_are_of_the_last_test_accuracies(sweep):
    first = Run(sweep()).differences[0]
    assert (first.first, first.second) == ("batch", "group")
    np.testing.assert_allclose(first.sample.values, np.array([1, 2, -1]) / 22)


def test_norms_that_were_trained_apart_are_paired_by_seed(sweep):
    together = Run(sweep())
    norms = ("batch", "group")
    apart = [Run(sweep(norm, norm=norm)) for norm in norms]
    (pair,) = differences(apart)
    assert (pair.first, pair.second) == norms
    assert pair.sample == together.differences[0].sample


def test_accuracies_of_the_classes_are_each_seeds_own(sweep):
    run = Run(sweep())
    accuracies = run.class_accuracies("group")
    assert accuracies.shape == (3, 4)
    totals = np.bincount(run.labels)
    np.testing.assert_allclose(accuracies @ totals, [15, 16, 15])
    np.testing.assert_allclose(run.confusion("group").diagonal().sum(), (15 + 16 + 15) / 3)


def test_classes_that_are_too_many_to_be_shown_are_one_line(sweep, monkeypatch):
    monkeypatch.setattr(results, "MOST_CLASSES", 3)
    run = Run(sweep(seeds=1))
    for show in (tables.classes, lambda run: next(figures.confusion(run))):
        with pytest.raises(UserError, match="4 classes are more than the 3 that can be shown"):
            show(run)


def test_images_that_were_not_kept_are_named(sweep, tiny):
    run = Run(sweep())
    rows = run.mistakes["mistakes-common"]
    assert len(rows)
    for row, image in zip(rows, run.images(rows), strict=True):
        np.testing.assert_array_equal(image, tiny.test_images[row])
    with pytest.raises(UserError, match="lacks 1 of the test images"):
        run.images(np.array([1000]))
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
        with pytest.raises(UserError, match=f"group-2.*{message}"):
            _ = Run(directory).predictions


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
    run = Run(
        sweep(
            accuracies={"batch": ((5, 9), (5,)), "none": ((4, 8),) * 2}, norm="batch,none", seeds=2
        )
    )
    rows = list(csv.DictReader(run.csv().splitlines()))
    wanted = [vars(epoch) for epochs in run.epochs.values() for epoch in epochs]
    assert len(rows) == 7
    for row, epoch in zip(rows, wanted, strict=True):
        assert row == {k: "" if v is None else str(v) for k, v in epoch.items()}


def test_a_reduced_run_shows_what_the_whole_one_shows(sweep, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # drawing takes the time
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "notebooks" / "tools")
    tool, run = importlib.import_module("reduce"), Run(sweep())
    whole = page.write(run.directory)
    tool.reduce(run)
    files = {path.name for path in run.directory.path.rglob("*") if path.is_file()}
    assert files == {"run.json", "examples.npz", "result.npz", "probes.npz"}
    reduced = page.read(run.directory)
    for field in ("missing", "headline", "finding", "tables"):
        assert getattr(reduced, field) == getattr(whole, field)
    assert reduced.missing == []
    for ours, theirs in zip(reduced.charts, whole.charts, strict=True):
        assert (ours.name, ours.text) == (theirs.name, theirs.text)
    kept = [net for net, made in reduced.run.predictions.items() if made.logits is not None]
    assert kept == [("batch", 1), ("group", 1), ("layer", 1)]


def test_a_run_is_shown_by_its_path_whatever_was_read(sweep):
    run = Run(sweep(seeds=1))
    assert run.predictions
    assert repr(run) == f"Run({str(run.directory.path)!r})"
