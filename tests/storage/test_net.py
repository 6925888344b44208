"""The folder of a net: one file commits an epoch, whole or not at all; what is damaged is set aside
and the epoch before it counts.
"""

import dataclasses
import hashlib
import shutil
import zipfile

import chex
import jax
import numpy as np
import pytest
from helpers import failing, refusal
from reduce import reduced

from jaxnorm.config import NetId
from jaxnorm.records import Environment, Epoch, Lost, Predictions
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import Damaged, NetFolder, Saved

HERE = Environment("now", "run", "cpu", "x", {"jax": "1"}, None, "passed", False, "no")
LABELS = np.array([0, 1, 2, 0], np.int32)
LOGITS = np.array([[3, 0, 0], [0, 3, 0], [0, 3, 0], [3, 0, 1]], np.float32)
STATE = {
    "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.ones(3, np.float32),
    "mean": np.zeros(3, np.float32),
    "step": np.int32(7),
}


def saved_at(epoch):
    """All that belongs to an epoch of batch norm, seed 1; the logits are those of its line."""
    loss = -float(Predictions.of(LOGITS, LABELS).log_probabilities[:, 0].astype(float).mean())
    lines = [Epoch("batch", 1, n, 1.5, 0.25, loss, 0.75, 3.0, 1.0) for n in range(1, epoch + 1)]
    losses = np.arange(2 * epoch, dtype=np.float32)
    state = jax.tree.map(lambda leaf: leaf * leaf.dtype.type(epoch), STATE)
    return Saved(lines, [HERE], state, losses, LOGITS, LABELS)


SHAPES = saved_at(1)._replace(losses=np.zeros(0, np.float32))


@pytest.fixture
def folder(scratch):
    """Of a net after its third epoch."""
    folder = NetFolder(RunDirectory(scratch), NetId("batch", 1))
    for epoch in (1, 2, 3):
        folder.commit(saved_at(epoch))
    return folder


def names(folder, pattern="*"):
    return sorted(path.name for path in folder.path.glob(pattern))


def state_of(folder, epoch=3):
    return folder.path / f"state-{epoch}.msgpack"


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def write_result(folder, **changes):
    """The result of `saved_at(3)` with other arrays; those that are None are left out."""
    folder.finish(saved_at(3), {})
    arrays = {**np.load(folder.path / "result.npz"), **changes}
    kept = {name: array for name, array in arrays.items() if array is not None}
    folder.run.write_arrays(f"{folder.name}/result.npz", **kept)


def test_the_newest_two_states_stay_and_are_read_back_bit_for_bit(folder):
    (folder.path / "mine.txt").write_text("x")
    folder.commit(saved_at(4))
    assert names(folder) == ["metrics.jsonl", "mine.txt", "state-3.msgpack", "state-4.msgpack"]
    for epoch in (3, 4):
        chex.assert_trees_all_equal(folder.read(epoch, SHAPES), saved_at(epoch))
    assert (folder.epoch(), folder.complete(9)) == (4, 4)
    assert folder.epochs() == saved_at(4).epochs
    other = NetFolder(folder.run, NetId("group", 1))
    assert (other.epoch(), other.complete(9), other.epochs(), other.lost()) == (0, 0, [], None)


def test_a_state_that_cannot_be_written_leaves_those_before_it(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.path.iterdir()}

    monkeypatch.setattr("os.replace", failing(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space.*state-4\.msgpack"):
        folder.commit(saved_at(4))
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_one_flipped_bit_anywhere_is_damage_and_so_is_any_other_length(folder):
    content = state_of(folder).read_bytes()
    assert content[:32] == hashlib.sha256(content[32:]).digest()
    for place in range(0, len(content), 29):
        state_of(folder).write_bytes(content)
        flip(state_of(folder), place)
        with pytest.raises(Damaged, match="its checksum does not fit"):
            folder.read(3, SHAPES)
    for length in (0, 10, 32, len(content) - 1):
        state_of(folder).write_bytes(content[:length])
        with pytest.raises(Damaged):
            folder.read(3, SHAPES)


def test_a_state_of_other_arrays_is_damage(folder):
    """One-dimensional ones too, such as scales, biases and running averages."""
    wanted = [{"logits": LOGITS[:, :2]}, {"labels": LABELS.astype(np.int64)}]
    for name, leaf in STATE.items():
        longer, half = np.zeros((*leaf.shape, 1), leaf.dtype), leaf.astype(np.float16)
        wanted += [{"state": {**STATE, name: wrong}} for wrong in (longer, half)]
        rest = {other: array for other, array in STATE.items() if other != name}
        wanted.append({"state": {**rest, "another": leaf}})
    for other in wanted:
        with pytest.raises(Damaged, match=r"holds another net|cannot be read"):
            folder.read(3, SHAPES._replace(**other))


FORGED = [
    {"losses": np.zeros((3, 2), np.float32)},
    {"losses": np.zeros(5, np.float32)},  # not as many of every epoch
    {"losses": np.full(6, np.nan, np.float32)},
    {"losses": np.zeros(6, np.int32)},
    {"losses": "x"},
    {"logits": "x"},
    {"state": {**STATE, "step": 7}},
    {"state": "x"},
    {"epochs": [dataclasses.replace(line, seed=2) for line in saved_at(3).epochs]},
    {"environments": []},
]


@pytest.mark.parametrize("changes", FORGED, ids=str)
def test_what_passes_its_checksum_and_is_no_state_is_damage(folder, changes):
    folder.commit(saved_at(3)._replace(**changes))
    with pytest.raises(Damaged, match=r"holds another net|cannot be read"):
        folder.read(3, SHAPES)


def test_a_state_of_another_epoch_or_net_does_not_count(folder):
    shutil.copy(state_of(folder, 2), state_of(folder, 3))
    other = NetFolder(folder.run, NetId("batch", 2))
    shutil.copytree(folder.path, other.path)
    for wrong, epoch in ((folder, 3), (other, 2)):
        with pytest.raises(Damaged):
            wrong.read(epoch, SHAPES)


def test_without_a_whole_state_a_net_starts_again_and_has_no_lines(folder):
    for epoch in (2, 3):
        flip(state_of(folder, epoch))
    warnings = []
    assert "state-3.msgpack is damaged" in refusal(folder.epochs)
    assert folder.newest(SHAPES, warnings.append) is None
    assert len(warnings) == len(names(folder, "*.damaged-1")) == 2


def test_the_copy_of_the_lines_is_read_by_nothing_and_written_again(folder):
    copy = folder.path / "metrics.jsonl"
    for spoil in (copy.unlink, lambda: copy.write_text("rubbish")):
        spoil()
        epoch = folder.epoch()
        chex.assert_trees_all_equal(folder.newest(SHAPES, pytest.fail), saved_at(epoch))
        folder.commit(saved_at(epoch + 1))
        assert copy.read_text().count('"epoch"') == epoch + 1


def test_what_cannot_be_read_is_an_oserror_and_no_damage(folder, monkeypatch):
    write_result(folder)
    folder.lose(3, "x")
    stale = failing(OSError(116, "Stale file handle"))
    monkeypatch.setattr("os.open", stale)
    acts = [lambda: folder.newest(SHAPES, pytest.fail), lambda: folder.ended(3), folder.lost]
    acts += [lambda: folder.set_aside_damaged(pytest.fail), lambda: folder.complete(9)]
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(f"os.{name}", stale)
    for act in (*acts, folder.epoch):
        with pytest.raises(OSError, match="Stale"):
            act()


def test_a_link_out_of_the_run_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    shutil.copy(state_of(folder), outside)
    linked = NetFolder(folder.run, NetId("group", 1))
    (folder.run.path / linked.name).symlink_to(outside)
    acts = [lambda: linked.commit(saved_at(4)), linked.epoch, lambda: linked.read(3, SHAPES)]
    acts += [lambda: linked.lose(1, "x"), lambda: linked.finish(saved_at(3), {})]
    for act in (*acts, linked.locked().__enter__):
        assert "is a link" in refusal(act)
    assert [path.name for path in outside.iterdir()] == ["state-3.msgpack"]


def test_a_net_that_ended_is_read_back(folder):
    assert not folder.ended(3)
    folder.finish(saved_at(3), {"epoch": np.array(3)})
    assert folder.trained(3)
    assert folder.ended(3)
    assert not folder.ended(4)  # it grows
    assert folder.complete(3) == 3
    result, wanted = folder.result(), saved_at(3)
    assert (result.epochs, result.environments) == (wanted.epochs, [HERE])
    np.testing.assert_array_equal(result.losses, wanted.losses)
    chex.assert_trees_all_equal(folder.predictions(4, 3), Predictions.of(LOGITS, LABELS))
    assert folder.probes({"epoch": "iu"}) == {"epoch": 3}
    assert folder.probes({"epoch": "iu", "newer": "f"}) == {}
    folder.commit(saved_at(4))  # as one that grows: it is as far as its state
    assert [line.epoch for line in folder.epochs()] == [1, 2, 3, 4]
    other = NetFolder(folder.run, NetId("group", 1))
    other.lose(2, "why")
    assert other.ended(3)
    assert not other.trained(3)
    assert other.lost() == Lost(2, "why")


def test_no_small_record_decides_over_a_large_whole_one(folder):
    write_result(folder)
    folder.lose(3, "x")
    (folder.path / "lost.json").write_text("{")
    assert folder.ended(3)  # its result is whole
    content = (folder.path / "result.npz").read_bytes()
    for array in zipfile.ZipFile(folder.path / "result.npz").infolist():
        flip(folder.path / "result.npz", array.header_offset + 50 + array.compress_size // 2)
        assert not folder.ended(3)
        (folder.path / "result.npz").write_bytes(content)
    (folder.path / "result.npz").write_bytes(b"rubbish")
    warnings = []
    folder.set_aside_damaged(warnings.append)
    assert [warning.split(" is kept as ")[1].split(",")[0] for warning in warnings] == [
        str(folder.path / f"{name}.damaged-1") for name in ("result.npz", "lost.json")
    ]
    assert folder.lost() is None
    folder.set_aside_damaged(pytest.fail)


@pytest.mark.parametrize(
    "changes",
    [
        *({"epochs": wrong} for wrong in ("rubbish", "", np.zeros(2))),
        *({"environments": wrong} for wrong in ("[{}]", "[]")),
        *({"losses": wrong} for wrong in (np.zeros(5, "f4"), np.full(6, np.inf, "f4"), None)),
    ],
    ids=str,
)
def test_a_result_of_something_else_is_one_line(folder, changes):
    write_result(folder, **changes)
    said = refusal(folder.result)
    assert "result.npz is damaged" in said or "KeyError" in said
    assert not folder.ended(3)


KEPT = reduced(Predictions.of(LOGITS, LABELS), False)


def test_predictions_of_a_reduced_net_are_read(folder):
    write_result(folder, logits=None, **KEPT)
    got, wanted = folder.predictions(4, 3), Predictions.of(LOGITS, LABELS)
    np.testing.assert_array_equal(got.predicted, wanted.predicted)
    np.testing.assert_array_equal(got.log_probabilities, wanted.log_probabilities)
    assert got.logits is None
    assert got.calibration.shape == (3,)
    write_result(folder, logits=None, labels=None)  # as of a run whose predictions were removed
    assert "holds no predictions of 4 test images" in refusal(folder.predictions, 4, 3)


@pytest.mark.parametrize("form", [{"labels": LABELS, "logits": LOGITS}, KEPT], ids=len)
@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.array([0, 1, 2, 3])},
        {"labels": np.array([0, 1, 2, -1])},
        {"labels": np.array([0, 1, 2])},
        {"labels": np.array([0, 1, 1, 0])},  # forged: another accuracy than the last line's
        {"labels": LABELS.astype(np.float32)},
        {"labels": LABELS[:0], "logits": LOGITS[:0], "predicted": LABELS[:0]},
        {"logits": LOGITS * 2, "log_probabilities": KEPT["log_probabilities"] * 2},
        {"logits": LOGITS[:, ::-1], "predicted": KEPT["predicted"] * 0},
        {"logits": LOGITS[:, :2], "predicted": KEPT["predicted"] + 3},
        {"logits": LOGITS + np.inf, "log_probabilities": KEPT["log_probabilities"] - np.inf},
        {"logits": LOGITS.astype(np.int32), "log_probabilities": np.zeros((4, 3))},
        {"logits": LOGITS.astype(object), "calibration": np.zeros(2)},
    ],
    ids=str,
)
def test_predictions_that_do_not_fit_are_one_line(folder, form, changes):
    """Neither the run's images and classes, nor the last line of the net."""
    wrong = {name: changes[name] for name in changes if name in form}
    write_result(folder, **{"logits": None, **form, **wrong})
    said = refusal(folder.predictions, 4, 3)
    assert "result.npz is damaged" in said or "holds no predictions" in said
