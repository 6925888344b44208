"""Going on with a run that was cut off: the same bits as from an unbroken run."""

import dataclasses
import errno
import importlib
import json
import multiprocessing
import shutil

import numpy as np
import pytest
from runs import difference

from jaxnorm import experiment, train
from jaxnorm.config import Config, UserError
from jaxnorm.devices import ONE, Layout
from jaxnorm.observers import Observer
from jaxnorm.records import RunDirectory

CONFIG = Config(norm="layer", dataset="tiny", epochs=3, batch_size=16, seed=3, seeds=2)
"""Its nets train one after the other here (`ONE`), as far as is not said otherwise."""


class Stopped(BaseException):
    pass


class StopAfter(Observer):
    """Stops a run when so many epochs of all nets are complete, and writes down what it hears."""

    def __init__(self, epochs=10**9):
        self.left, self.begun, self.warnings = epochs, None, []

    def on_epoch(self, epoch):
        self.left -= 1
        if not self.left:
            raise Stopped

    def on_begun(self, complete):
        self.begun = complete

    def on_warning(self, text):
        self.warnings.append(text)


def stopped(path, tiny, epochs, config=CONFIG, layout=ONE):
    directory = RunDirectory.create(path)
    with pytest.raises(Stopped):
        experiment.run(config, tiny, directory, "x", StopAfter(epochs), layout)
    return directory


def resumed(directory, tiny, layout=ONE):
    heard = StopAfter()
    experiment.resume(tiny, directory, "y", heard, layout=layout)
    return heard


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An unbroken run of layer norm, two seeds of three epochs each."""
    directory = RunDirectory.create(tmp_path_factory.mktemp("whole") / "run")
    experiment.run(CONFIG, tiny, directory, "x", layout=ONE)
    return directory


@pytest.fixture
def copy(whole, scratch):
    """A copy of it to damage."""
    shutil.copytree(whole.path, scratch / "copy")
    return RunDirectory(scratch / "copy")


def test_the_same_command_gives_the_same_bytes_but_for_the_times(whole, tiny, scratch):
    again = RunDirectory.create(scratch / "again")
    experiment.run(CONFIG, tiny, again, "x", layout=ONE)
    assert difference(again, whole) == ""

    def text(directory):
        lines = (directory.path / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line) | {"train_seconds": 0, "test_seconds": 0} for line in lines]
        return "\n".join(map(json.dumps, values))

    assert text(again) == text(whole)
    for name in ("step_losses/layer-3.npy", "predictions/layer-4.npz"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize("epochs", [1, 3, 4, 6])
def test_a_run_stopped_anywhere_goes_on_to_the_same_end(whole, tiny, scratch, epochs):
    directory = stopped(scratch / "run", tiny, epochs)
    assert len(directory.epochs()) == epochs
    heard = resumed(directory, tiny)
    assert (heard.begun, heard.warnings) == (epochs, [])
    assert difference(directory, whole) == ""
    (again,) = directory.info().resumed or [{"command": "y"}]
    assert again["command"] == "y"


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_goes_on_on_another_mesh_to_the_same_end(whole, tiny, scratch, epochs):
    """Stopped between the lines of two nets that train together, they are an epoch apart."""
    directory = stopped(scratch / "run", tiny, epochs, layout=Layout(seed=2))
    heard = resumed(directory, tiny, Layout(seed=2) if epochs == 1 else ONE)
    assert heard.begun == epochs
    assert difference(directory, whole) == ""
    (again,) = directory.info().resumed
    assert (directory.info().mesh, again["mesh"]) == (
        "seed=2,batch=1",
        "seed=2,batch=1" if epochs == 1 else "seed=1,batch=1",
    )


def test_twenty_epochs_are_seven_and_thirteen(tiny, scratch):
    config = dataclasses.replace(CONFIG, epochs=20, seeds=1)
    unbroken = RunDirectory.create(scratch / "unbroken")
    experiment.run(config, tiny, unbroken, "x", layout=ONE)
    directory = stopped(scratch / "run", tiny, 7, config)
    assert resumed(directory, tiny).begun == 7
    assert difference(directory, unbroken) == ""


def test_what_was_written_of_an_epoch_without_its_line_is_made_again(copy, whole, tiny):
    lines = (copy.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy.path / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    (copy.path / ".writing-x").write_text("half")
    heard = resumed(copy, tiny)
    assert (heard.begun, heard.warnings) == (5, [])
    assert not (copy.path / ".writing-x").exists()
    assert difference(copy, whole) == ""


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(directory):
    files = [each for each in directory.rglob("*") if each.is_file()]
    return max(files, key=lambda each: each.stat().st_size)


@pytest.mark.parametrize(
    ("damaged", "begun"),
    [
        (["checkpoints/layer-3/3"], 5),
        (["checkpoints/layer-3/3", "checkpoints/layer-3/2"], 3),
        (["step_losses/layer-4.npy"], 3),
        (["predictions/layer-3.npz"], 5),
    ],
    ids=["newest checkpoint", "both checkpoints", "losses", "predictions"],
)
def test_what_is_damaged_is_told_and_made_again(copy, whole, tiny, damaged, begun):
    for name in damaged:
        path = copy.path / name
        flip(largest(path)) if path.is_dir() else path.write_bytes(b"rubbish")
    heard = resumed(copy, tiny)
    assert heard.begun == begun
    (warning,) = heard.warnings
    assert "is damaged; going" in warning
    assert difference(copy, whole) == ""


def test_losses_or_checkpoints_that_are_gone_are_made_again(copy, whole, tiny):
    np.save(copy.path / "step_losses" / "layer-3.npy", whole.step_losses("layer", 3)[:7])
    lines = (copy.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy.path / "metrics.jsonl").write_text("".join(lines[:5]))
    shutil.rmtree(copy.checkpoints("layer", 4))
    heard = resumed(copy, tiny)
    assert heard.begun == 0  # of seed 3 one epoch has losses, and no checkpoint is that old
    assert len(heard.warnings) == 2
    assert difference(copy, whole) == ""


def test_a_finished_run_has_nothing_to_do(copy, whole, tiny):
    before = {path: path.stat().st_mtime_ns for path in copy.path.rglob("*") if path.is_file()}
    assert resumed(copy, tiny).begun == 6
    after = {path: path.stat().st_mtime_ns for path in copy.path.rglob("*") if path.is_file()}
    assert {k: v for k, v in after.items() if k.name != ".lock"} == {
        k: v for k, v in before.items() if k.name != ".lock"
    }
    shutil.rmtree(copy.path / "checkpoints")  # as after a merge
    assert resumed(copy, tiny).begun == 6


def test_seeds_that_train_in_one_program_go_on_together_or_apart(tiny, scratch, monkeypatch):
    monkeypatch.setattr(train, "nets_at_once", lambda *_: 2)
    config = dataclasses.replace(CONFIG, batch_size=35)
    whole = RunDirectory.create(scratch / "whole")
    experiment.run(config, tiny, whole, "x", layout=ONE)
    numbers = [(each.epoch, each.seed) for each in whole.epochs()]
    assert numbers == [(1, 3), (2, 3), (3, 3), (1, 4), (2, 4), (3, 4)]  # as one after the other
    together = stopped(scratch / "together", tiny, 4, config)
    assert resumed(together, tiny).begun == 4
    assert difference(together, whole) == ""
    apart = stopped(scratch / "apart", tiny, 3, config)
    assert resumed(apart, tiny).begun == 3
    assert [(each.epoch, each.seed) for each in apart.epochs()] == numbers


def test_other_data_and_no_run_are_refused(copy, tiny, scratch):
    with pytest.raises(UserError, match="not what"):
        resumed(copy, dataclasses.replace(tiny, fingerprint="0"))
    (scratch / "empty").mkdir()
    with pytest.raises(UserError, match="not a run directory"):
        resumed(RunDirectory(scratch / "empty"), tiny)


def test_a_run_begun_by_other_code_goes_on_with_a_warning(tiny, scratch):
    directory = stopped(scratch / "run", tiny, 5)
    info = directory.info()
    directory.write_info(dataclasses.replace(info, versions={**info.versions, "jax": "0.0"}))
    (warning,) = resumed(directory, tiny).warnings
    assert "other code" in warning
    (again,) = directory.info().resumed
    assert again["versions"] == info.versions


def hold(path, ready, done):
    with RunDirectory(path).locked():
        ready.set()
        done.wait(60)


def test_a_second_process_is_refused_and_a_dead_one_holds_no_lock(copy, tiny):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(copy.path, ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match="by another process"):
        resumed(copy, tiny)
    process.kill()
    process.join()
    assert resumed(copy, tiny).begun == 6


def test_a_run_is_not_begun_over_another(copy, tiny):
    with pytest.raises(UserError, match="already used"):
        experiment.run(CONFIG, tiny, copy, "x", layout=ONE)


@pytest.mark.parametrize(
    "write",
    [
        "jaxnorm.checkpoints.Writer.save",
        "jaxnorm.records.RunDirectory.write_step_losses",
        "jaxnorm.records.RunDirectory.write_predictions",
        "jaxnorm.records.RunDirectory.append_epoch",
    ],
)
def test_a_disk_that_fails_any_write_of_an_epoch_loses_that_epoch_alone(
    tiny, scratch, whole, monkeypatch, write
):
    """As where a directory turns read-only: the fourth write of a kind fails."""
    module, kind, name = write.rsplit(".", 2)
    home = getattr(importlib.import_module(module), kind)
    right, calls = getattr(home, name), []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError(errno.EROFS, "Read-only file system", "x")
        return right(*arguments)

    monkeypatch.setattr(home, name, fails_once)
    directory = RunDirectory.create(scratch / "run")
    with pytest.raises(OSError, match="Read-only"):
        experiment.run(CONFIG, tiny, directory, "x", layout=ONE)
    assert resumed(directory, tiny).begun == 3
    assert difference(directory, whole) == ""


@pytest.mark.parametrize(("where", "step"), [("train_nets", 3), ("evaluate_nets", None)])
def test_a_loss_that_is_not_finite_keeps_what_was_good(
    tiny, scratch, whole, monkeypatch, where, step
):
    """In the second epoch of the first seed: five pieces of an epoch, or an evaluation."""
    right, calls = getattr(train, where), []

    def turns_nan(*arguments):
        calls.append(1)
        found = right(*arguments)
        if len(calls) < (8 if step else 2):
            return found
        if step is None:
            return found._replace(logits=found.logits * np.nan, loss=found.loss * np.nan)
        state, steps = found
        return state, steps._replace(losses=steps.losses * np.nan)

    directory = RunDirectory.create(scratch / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, where, turns_nan)
        with pytest.raises(experiment.NonFiniteLoss, match="layer norm, seed 3") as raised:
            experiment.run(CONFIG, tiny, directory, "x", layout=ONE)
    assert (raised.value.epoch, raised.value.step) == (2, step)
    assert [each.epoch for each in directory.epochs()] == [1]
    assert resumed(directory, tiny).begun == 1
    assert difference(directory, whole) == ""


def test_lines_that_follow_on_none_are_told_and_dropped(copy, whole, tiny):
    lines = (copy.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    other = lines[0].replace('"seed": 3', '"seed": 9')
    (copy.path / "metrics.jsonl").write_text("".join([*lines[:5], lines[4], lines[0], other]))
    heard = resumed(copy, tiny)
    assert heard.begun == 5
    assert heard.warnings[0].startswith("3 lines of metrics.jsonl are not of this run")
    assert difference(copy, whole) == ""
