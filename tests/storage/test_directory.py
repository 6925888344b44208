"""Run directories: written whole, read with care."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
from helpers import Evil
from hypothesis import given
from hypothesis import strategies as st

from jaxnorm.config import Config, UserError
from jaxnorm.records import DatasetInfo, Environment, Epoch, RunInfo
from jaxnorm.storage.directory import RunDirectory

DATASET = DatasetInfo(
    "cifar10", "x", "f", "s", None, ["a", "b", "c"], (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), 10, 2
)
ENVIRONMENT = Environment("now", "run", "cpu", "seed=1,batch=1", {"jax": "1"}, None, "passed")
INFO = RunInfo(Config(norm="batch"), {"batch": 1}, DATASET, ENVIRONMENT)
NET = ("batch", 1)


def epoch(number: int = 1, norm="batch", **changes) -> Epoch:
    values = Epoch(norm, 1, number, 1.5, 0.25, 1.25, 0.5, 3.0, 1.0)
    return dataclasses.replace(values, **changes)


def test_a_used_or_unwritable_path_is_refused_and_nothing_is_made(scratch):
    (scratch / "file").write_text("x")
    (scratch / "used").mkdir()
    (scratch / "used" / "y").write_text("x")
    for path in (scratch / "file", scratch / "used", scratch / "file" / "in", scratch):
        with pytest.raises(UserError, match="out="):
            RunDirectory.create(path)
    assert sorted(entry.name for entry in scratch.iterdir()) == ["file", "used"]
    made = RunDirectory.create(scratch / "deep" / "new")
    assert made.path.stat().st_mode & 0o077 == 0
    made.path.chmod(0o777)
    RunDirectory.create(scratch / "deep" / "new")  # empty: not used yet
    assert made.path.stat().st_mode & 0o077 == 0


def test_what_is_written_is_read_back(scratch):
    run = RunDirectory.create(scratch / "run")
    run.write_info(INFO)
    assert run.info() == INFO
    assert run.epochs() == []
    for number in (1, 2):
        run.append_epoch(epoch(number))
    assert run.epochs() == [epoch(1), epoch(2)]
    validated = epoch(3, validation_loss=0.5, validation_accuracy=1.0)
    run.append_epoch(validated)
    assert run.epochs()[2] == validated
    losses = np.arange(5, dtype=np.float32)
    run.write_net("step_losses", NET, values=losses)
    np.testing.assert_array_equal(run.step_losses(NET), losses)
    logits, labels = np.ones((2, 3), np.float32), np.array([1, 2], np.int32)
    run.write_net("predictions", NET, logits=logits, labels=labels)
    np.testing.assert_array_equal(run.predictions(NET)[0], logits)
    np.testing.assert_array_equal(run.predictions(NET)[1], labels)


def test_a_half_line_is_dropped_and_a_damaged_one_is_named(scratch):
    run = RunDirectory.create(scratch / "run")
    for number in (1, 2, 3):
        run.append_epoch(epoch(number))
    path = run.path / "metrics.jsonl"
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert run.epochs() == [epoch(1), epoch(2)]
    lines = whole.splitlines(keepends=True)
    wrong = [
        "{}\n",
        "[1]\n",
        "rubbish\n",
        "\xff\n",
        lines[1].replace("0.5", "0.6"),
        lines[1].replace('"epoch": 2', '"epoch": 3'),
        lines[1].replace("batch", "layer"),
    ]
    for line in wrong:
        path.write_text(lines[0] + line + lines[2], encoding="latin-1")
        with pytest.raises(UserError, match="line 2"):
            run.epochs()
        assert run.read_epochs()[0] == [epoch(1), epoch(3)]


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0},
        {"test_accuracy": 1.5},
        {"train_loss": -1.0},
        {"validation_loss": 1.5},
    ],
)
def test_an_epoch_out_of_range_is_refused(changes):
    with pytest.raises(UserError):
        epoch(**changes)


@given(st.recursive(st.booleans() | st.integers(), st.lists, max_leaves=5))
def test_run_json_with_any_wrong_field_is_refused_in_one_line(tmp_path_factory, value):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.write_info(INFO)
    good = json.loads((run.path / "run.json").read_text())
    for name in good:
        fits = {"deterministic": isinstance(value, bool), "resumed": value == []}
        if fits.get(name):
            continue
        (run.path / "run.json").write_text(json.dumps({**good, name: value}))
        with pytest.raises(UserError) as error:
            run.info()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DatasetInfo)])
def test_run_json_with_a_wrong_dataset_field_is_refused(scratch, name):
    run = RunDirectory(scratch)
    run.write_info(INFO)
    good = json.loads((run.path / "run.json").read_text())
    data = good["dataset"]
    for wrong in ({**data, name: {}}, {k: v for k, v in data.items() if k != name}):
        (run.path / "run.json").write_text(json.dumps({**good, "dataset": wrong}))
        with pytest.raises(UserError, match="dataset"):
            run.info()


@pytest.mark.parametrize(
    "change",
    [
        {"environment": None, "versions": {"jaxnorm": "0.1.0"}},  # as 0.1.0 wrote it
        {"format": 3},
        {"dataset": {**dataclasses.asdict(DATASET), "licence": "x"}},
    ],
)
def test_a_record_of_another_version_says_so(scratch, change):
    run = RunDirectory(scratch)
    run.write_info(INFO)
    values = json.loads((scratch / "run.json").read_text()) | change
    values = {name: value for name, value in values.items() if value is not None}
    (scratch / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"an older or newer jaxnorm wrote it.*read it with"):
        run.info()


def test_a_wrong_value_is_no_matter_of_versions(scratch):
    run = RunDirectory(scratch)
    run.write_info(INFO)
    content = (scratch / "run.json").read_text()
    (scratch / "run.json").write_text(
        content.replace('"deterministic": false', '"deterministic": 3')
    )
    with pytest.raises(UserError, match=r"deterministic=3 is wrong[^;]*$"):
        run.info()


@pytest.mark.parametrize("text", ["--out \udcff", "--out \N{SKULL}\udc80", "na\u00efve \u2028"])
def test_whatever_a_record_is_given_can_be_read_again(scratch, text):
    run = RunDirectory(scratch)
    run.write_info(
        dataclasses.replace(INFO, environment=dataclasses.replace(ENVIRONMENT, command=text))
    )
    wanted = text.encode(errors="backslashreplace").decode()
    assert run.info().environment.command == wanted


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_a_file_system_without_locks_is_said(scratch, monkeypatch, error):
    run = RunDirectory(scratch)

    def fail():
        raise error

    monkeypatch.setattr(run._lock, "acquire", fail)
    with (
        pytest.raises(UserError, match=r"\.lock cannot be locked.*such as a local disk"),
        run.locked(),
    ):
        pass
    error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError), run.locked():
        pass


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[]", b"{}", b'{"config": 1}'])
def test_a_missing_or_damaged_run_json_is_refused(scratch, content):
    if content is not None:
        (scratch / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json"):
        RunDirectory(scratch).info()


def test_damaged_arrays_are_refused_by_name(scratch):
    run = RunDirectory.create(scratch / "run")
    with pytest.raises(UserError, match="missing"):
        run.step_losses(NET)
    run.write_bytes("step_losses/batch-1.npy", b"rubbish")
    run.write_bytes("predictions/batch-1.npz", b"PK rubbish")
    for read in (run.step_losses, run.predictions):
        with pytest.raises(UserError, match="damaged"):
            read(NET)
    logits, labels = np.ones((2, 3), np.float32), np.array([0, 1])
    for wrong in (
        {"logits": np.ones(3)},
        {"logits": logits, "labels": np.array([0, 3])},
        {"logits": logits, "labels": np.array([-1, 0])},
        {"logits": logits, "labels": np.array([0, 1, 2])},
        {"logits": logits, "labels": labels.astype(np.float32)},
        {"logits": logits.astype(np.int32), "labels": labels},
        {"logits": logits * np.inf, "labels": labels},
        {"logits": np.array([Evil(scratch / "evil")], object), "labels": labels},
        {"logits": logits[:0], "labels": labels[:0]},
    ):
        run.write_net("predictions", NET, **wrong)
        with pytest.raises(UserError, match="damaged"):
            run.predictions(NET)
    assert not (scratch / "evil").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(scratch, monkeypatch):
    run = RunDirectory.create(scratch / "run")
    run.write_bytes("a.txt", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_bytes("a.txt", b"new")
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == {"a.txt": b"old"}


def test_links_pipes_and_bombs_are_refused(scratch, tmp_path_factory):
    run = RunDirectory.create(scratch / "run")
    outside = tmp_path_factory.mktemp("outside")
    (run.path / "figures").symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        run.write_bytes("figures/a.png", b"x")
    assert list(outside.iterdir()) == []
    (run.path / "predictions").mkdir()
    os.mkfifo(run.path / "predictions" / "batch-1.npz")
    with pytest.raises(UserError, match="is damaged"):
        run.predictions(NET)
    with (run.path / "run.json").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(UserError, match="no file of up to"):
        run.info()
    bomb = {"logits": np.zeros((70_000, 1000), np.float32), "labels": np.zeros(70_000, np.int32)}
    (run.path / "predictions" / "batch-1.npz").unlink()
    run.write_net("predictions", NET, **bomb)
    assert (run.path / "predictions" / "batch-1.npz").stat().st_size < 2_000_000
    with pytest.raises(UserError, match="is damaged"):
        run.predictions(NET)


def test_what_cannot_be_read_is_an_oserror_and_no_damage(scratch, monkeypatch):
    run = RunDirectory.create(scratch / "run")
    run.write_net("step_losses", NET, values=np.zeros(3, np.float32))

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        run.step_losses(NET)
