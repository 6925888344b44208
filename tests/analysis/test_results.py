"""A run's records read once, and the numbers made from them."""

import dataclasses

import numpy as np
import pytest

from jaxnorm.analysis import figures, results, tables
from jaxnorm.analysis.results import Run, differences
from jaxnorm.config import UserError


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
    directory.write_epochs([epoch for epoch in directory.epochs() if epoch.seed < 3])
    assert Run(directory).seeds_text == "n = 2 seeds (1 to 2), 6 of 9 nets finished"
    directory.write_epochs([epoch for epoch in directory.epochs() if epoch.seed != 2])
    assert Run(directory).seeds_text == "seed 1, 3 of 9 nets finished"
    directory.write_epochs([])
    assert Run(directory).seeds_text == "n = 3 seeds (1 to 3), 0 of 9 nets finished"


def test_only_finished_nets_count_and_the_caption_says_which(sweep):
    """The first net of group norm stopped after its first epoch, with 2 of 22 right."""
    rows = {"group": ((2,), (9, 9), (9, 12), (9, 9))}
    run = Run(sweep(accuracies=rows, norm="group", seeds=4))
    run.directory.write_epochs([epoch for epoch in run.directory.epochs() if epoch.seed != 3])
    run = Run(run.directory)
    assert run.seeds("group") == list(run.summaries["group"]) == [2, 4]
    assert run.sample("group").n == 2
    assert run.caption.endswith("n = 2 seeds (2, 4), 2 of 4 nets finished")
    totals = np.bincount(run.labels)
    np.testing.assert_allclose(run.class_accuracies("group") @ totals, [9, 9])
    np.testing.assert_allclose(run.confusion("group").diagonal().sum(), 9)
    assert list(run.predictions) == [("group", 2), ("group", 4)]
    np.testing.assert_array_equal(run.logits["group"], run.predictions["group", 2])


def test_a_norm_without_a_finished_net_is_left_out(sweep):
    rows = {"batch": ((5, 9), (5, 9)), "group": ((5,), (5,)), "layer": ((5,), (5, 9))}
    run = Run(sweep(accuracies=rows, seeds=2))
    assert run.norms == ["batch", "layer"]
    assert [run.shown_seed(norm) for norm in run.norms] == [2, 2]  # of both, so that they compare
    assert not any("group" in name for name in run.mistakes)


def test_what_was_measured_is_kept_of_every_norm_that_has_any(sweep):
    directory = sweep()
    (directory.path / "probes" / "batch-1.npz").rename(directory.path / "probes" / "batch-2.npz")
    (directory.path / "probes" / "layer-1.npz").unlink()
    run = Run(directory)
    measured = run.probes({"epoch": "iu"})
    assert {norm: list(nets) for norm, nets in measured.items()} == {"batch": [2], "group": [1]}
    (line,) = run.unmeasured
    assert "layer-1.npz is missing" in line


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
    directory = sweep()
    logits, labels = directory.predictions(("group", 2))
    for wrong in (logits * 2, logits[:, ::-1], logits[:-1], logits[:, :3]):
        kept = labels[: len(wrong)] % wrong.shape[1]
        directory.write_net("predictions", ("group", 2), logits=wrong, labels=kept)
        with pytest.raises(UserError, match="of group norm, seed 2, are not those of its epoch 2"):
            _ = Run(directory).predictions
    directory.write_net("predictions", ("group", 2), logits=logits, labels=labels)
    assert len(Run(directory).predictions) == 9


@pytest.mark.parametrize("lines", [[1, 0], [0, 0], [1], [0, 1, 1]], ids=str)
def test_epochs_out_of_order_are_refused(sweep, lines):
    directory = sweep(norm="batch", seeds=1)
    path = directory.path / "metrics.jsonl"
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(written[number] for number in lines))
    with pytest.raises(UserError, match="are not 1, 2, 3"):
        _ = Run(directory).epochs


def test_a_run_is_shown_by_its_path_whatever_was_read(sweep):
    run = Run(sweep(seeds=1))
    assert run.predictions
    assert repr(run) == f"Run({str(run.directory.path)!r})"
