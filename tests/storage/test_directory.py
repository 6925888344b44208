"""Run directories: written whole, read with care."""

import dataclasses
import errno
import json
import os

import filelock
import numpy as np
import pytest
from helpers import Evil, failing, refusal

from jaxnorm.config import Config, UserError, from_json
from jaxnorm.records import DatasetInfo, Environment, Epoch, Layer, Lost, RunInfo
from jaxnorm.storage import directory
from jaxnorm.storage.directory import RunDirectory

DATASET = DatasetInfo(
    "cifar10", "x", "f", "s", None, ["a", "b", "c"], (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), 10, 2
)
ENVIRONMENT = Environment("now", "run", "cpu", "x", {"jaxnorm": "9"}, None, "passed", False, "no")
LAYER = Layer("C1", (4, 4, 4), 3, 9, 2)
INFO = RunInfo(3, Config(norm="batch"), {"batch": 1}, {"batch": [LAYER]}, DATASET, ENVIRONMENT)
LINE = Epoch("batch", 1, 1, 1.5, 0.25, 1.25, 0.5, 3.0, 1.0)


@pytest.fixture
def run(scratch):
    """A run directory with a `run.json`."""
    made = RunDirectory.create(scratch / "run")
    made.write_json("run.json", INFO)
    return made


def rewrite(run, **changes):
    """Changes fields of its `run.json`."""
    path = run.path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_used_or_unwritable_path_is_refused_and_nothing_is_made(scratch):
    (scratch / "file").write_text("x")
    (scratch / "used").mkdir()
    (scratch / "used" / "y").write_text("x")
    for path in (scratch / "file", scratch / "used", scratch / "file" / "in", scratch):
        assert "out=" in refusal(RunDirectory.create, path)
    assert sorted(entry.name for entry in scratch.iterdir()) == ["file", "used"]
    made = RunDirectory.create(scratch / "deep" / "new").path
    assert made.stat().st_mode & 0o077 == 0
    made.chmod(0o770)
    RunDirectory.create(made)  # empty: not used yet, and a group's remains the group's
    assert made.stat().st_mode & 0o777 == 0o770


def test_what_is_written_is_read_back(run):
    assert run.info() == INFO
    run.write_json("lost.json", Lost(3, "x"))
    assert run.read_json("lost.json", Lost) == Lost(3, "x")
    losses = np.arange(5, dtype=np.float32)
    run.write_arrays("a.npz", losses=losses, text="x")
    arrays = run.arrays("a.npz", {"losses": "f S", "text": "U"})
    np.testing.assert_array_equal(arrays["losses"], losses)
    assert str(arrays["text"]) == "x"
    assert run.arrays("a.npz", {"newer": "f"}, optional=True) == {}


@pytest.mark.parametrize(
    "changes",
    [{"epoch": 0}, {"test_accuracy": 1.5}, {"train_loss": -1.0}, {"validation_loss": 1.5}],
)
def test_an_epoch_out_of_range_is_refused(changes):
    with pytest.raises(UserError):
        dataclasses.replace(LINE, **changes)


DATA = dataclasses.asdict(DATASET)


def test_any_wrong_field_of_run_json_is_refused_in_one_line(run):
    path = run.path / "run.json"
    good = json.loads(path.read_text())
    for within in ("", "config", "dataset", "environment"):
        part = good[within] if within else good
        for name, value in list(part.items()):
            part[name] = [[3]]
            path.write_text(json.dumps(good))
            assert (within or name) in (said := refusal(run.info))
            assert "read it with" not in said or name == "format"  # no matter of versions
            if within == "dataset":
                del part[name]
                path.write_text(json.dumps(good))
                assert "dataset" in refusal(run.info)
            part[name] = value
    path.write_text(json.dumps(good))
    assert run.info() == INFO


@pytest.mark.parametrize(
    ("name", "value"),
    [("class_names", ["x"] * 60_000), ("class_names", []), ("test_count", 0), ("train_count", 0)],
)
def test_numbers_that_no_data_has_are_refused(run, name, value):
    rewrite(run, dataset={**DATA, name: value})
    said = refusal(run.info)
    assert f"dataset.{name}=" in said
    assert len(said) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"environment": None, "versions": {"jaxnorm": "0.1.0"}},  # as 0.1.0 wrote it
        {"format": None, "layers": None, "resumed": []},  # as 0.2.0 wrote it
        {"format": 2},
        {"format": 4},
        {"dataset": {**DATA, "licence": "x"}},
    ],
    ids=str,
)
def test_a_record_of_another_version_names_it(run, change):
    values = json.loads((run.path / "run.json").read_text()) | change
    values = {name: value for name, value in values.items() if value is not None}
    (run.path / "run.json").write_text(json.dumps(values))
    version = "jaxnorm 9" if "environment" in values else "another version of jaxnorm"
    assert f"is of {version}, whose records differ (" in refusal(run.info)


@pytest.mark.parametrize(
    "record", [INFO, DATASET, ENVIRONMENT, LINE, LAYER, Lost(1, "x")], ids=type
)
def test_a_key_of_pydantics_own_is_an_unknown_field(record):
    for value in ({}, None, "x"):
        text = json.dumps({**dataclasses.asdict(record), "__dataclass_self__": value})
        assert "unknown field: __dataclass_self__" in refusal(from_json, type(record), text)


@pytest.mark.parametrize("text", ["--out \udcff", "--out \N{SKULL}\udc80", "na\u00efve \u2028"])
def test_whatever_a_record_is_given_can_be_read_again(run, text):
    """Also a lone surrogate, which stands for a byte that is not UTF-8."""
    data = dataclasses.replace(DATASET, class_names=["a", text])
    environment = dataclasses.replace(ENVIRONMENT, command=text)
    run.write_json("run.json", dataclasses.replace(INFO, dataset=data, environment=environment))
    wanted = text.encode(errors="backslashreplace").decode()
    assert run.info().environment.command == run.info().dataset.class_names[1] == wanted
    rewrite(run, dataset={**DATA, "class_names": ["a", "\udcff"]})
    assert "run.json cannot be read" in refusal(run.info)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[]", b"{}", b'{"config": 1}'])
def test_a_missing_or_damaged_run_json_is_refused(scratch, content):
    if content is not None:
        (scratch / "run.json").write_bytes(content)
    assert "run.json" in refusal(RunDirectory(scratch).info)


def test_a_lock_is_held_by_one_process(run):
    with run.locked() as free, RunDirectory(run.path).locked() as another:
        assert (free, another) == (True, False)
        with run.locked("nets/batch-1") as of_net:
            assert of_net
    with RunDirectory(run.path).locked() as free:
        assert free


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_a_file_system_without_locks_is_said(run, monkeypatch, error):
    monkeypatch.setattr(filelock.FileLock, "acquire", failing(error))
    assert ".lock cannot be locked" in refusal(run.locked().__enter__)
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(filelock.FileLock, "acquire", failing(denied))
    with pytest.raises(PermissionError):
        run.locked().__enter__()


def test_damaged_arrays_are_refused_by_name(run, scratch):
    assert "a.npz is missing" in refusal(run.arrays, "a.npz", {"a": "f N"})
    run.write_bytes("a.npz", b"PK rubbish")
    assert "a.npz is damaged" in refusal(run.arrays, "a.npz", {"a": "f N"})
    a, b = np.ones((2, 3), np.float32), np.array([0, 1])
    for wrong in (
        {"a": np.ones(3)},
        {"a": a, "b": np.array([0, 1, 2])},
        {"a": a, "b": b.astype(np.float32)},
        {"a": a.astype(np.int32), "b": b},
        {"a": a * np.inf, "b": b},
        {"a": np.array([Evil(scratch / "evil")], object), "b": b},
    ):
        run.write_arrays("a.npz", **wrong)
        assert "a.npz is damaged" in refusal(run.arrays, "a.npz", {"a": "f N C", "b": "iu N"})
    assert not (scratch / "evil").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(run, monkeypatch):
    before = {path: path.read_bytes() for path in run.path.iterdir()}

    monkeypatch.setattr(os, "fsync", failing(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space.*run\.json"):
        run.write_bytes("run.json", b"new")
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_what_is_set_aside_is_never_written_over(run):
    (run.path / "a.txt.damaged-2").symlink_to("nowhere")
    kept = []
    for content in (b"first", b"second"):
        run.write_bytes("a.txt", content)
        kept.append(run.set_aside("a.txt"))
    assert [path.name for path in kept] == ["a.txt.damaged-1", "a.txt.damaged-3"]
    assert [path.read_bytes() for path in kept] == [b"first", b"second"]
    assert not (run.path / "a.txt").exists()


def test_links_pipes_and_bombs_are_refused(run, tmp_path_factory, monkeypatch):
    outside = tmp_path_factory.mktemp("outside")
    (run.path / "figures").symlink_to(outside)
    acts = [lambda: run.write_bytes("figures/a.png", b"x"), lambda: run.set_aside("figures/x")]
    acts += [run.locked("figures").__enter__, lambda: run.remove_half_written("figures")]
    for act in acts:
        assert "is a link" in refusal(act)
    assert list(outside.iterdir()) == []
    os.mkfifo(run.path / "a.npz")
    assert "is damaged" in refusal(run.arrays, "a.npz", {"a": "f N"})
    monkeypatch.setattr(directory, "_LARGEST", 2**20)
    os.truncate(run.path / "run.json", 2**28 + 1)
    assert "no file of up to" in refusal(run.info)
    run.write_arrays("b.npz", a=np.zeros(2**18 + 1, np.float32))
    assert (run.path / "b.npz").stat().st_size < 2**13
    assert "unpacks to" in refusal(run.arrays, "b.npz", {"a": "f N"})


def test_what_cannot_be_read_is_an_oserror_and_no_damage(run, monkeypatch):
    run.write_arrays("a.npz", a=np.zeros(3, np.float32))

    monkeypatch.setattr(os, "open", failing(OSError(116, "Stale file handle")))
    for read in (lambda: run.arrays("a.npz", {"a": "f N"}), lambda: run.read_json("x", Lost)):
        with pytest.raises(OSError, match="Stale"):
            read()
    assert "run.json cannot be read: Stale" in refusal(run.info)
