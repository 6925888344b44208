"""Runs that stop and resume: the bits of an unbroken run, and nothing complete is lost."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
from helpers import difference, run, train

from jaxnorm.config import Config, UserError, product, study
from jaxnorm.runs import runner
from jaxnorm.storage import checkpoint
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import epoch as epochs
from jaxnorm.training.fit import Callback, NonFiniteLoss
from jaxnorm.training.mesh import ONE, MeshShape

CONFIG = Config(
    norm="layer", arch="three-layers", dataset="tiny", epochs=3, batch_size=16, seed=3, seeds=2
)
"""Its nets train one after the other here (`ONE`), as far as is not said otherwise."""


class Stopped(BaseException):
    pass


class StopAfter(Callback):
    """Stops a run when so many epochs of all nets are complete, and writes down what it hears."""

    def __init__(self, epochs=10**9):
        self.left, self.complete, self.warnings, self.together = epochs, None, [], []

    def on_start(self, norm, seeds, steps):
        self.together.append(seeds)

    def on_epoch(self, config, epoch):
        self.left -= 1
        if not self.left:
            raise Stopped

    def on_resume(self, complete):
        self.complete = complete

    def on_warning(self, text):
        self.warnings.append(text)


def stopped(path, tiny, epochs, config=CONFIG, mesh=ONE):
    with pytest.raises(Stopped):
        run(config, tiny, path, StopAfter(epochs), mesh)
    return RunDirectory(path)


def resumed(directory, tiny, mesh=ONE, **changes):
    heard = StopAfter()
    run(dataclasses.replace(directory.info().config, **changes), tiny, directory.path, heard, mesh)
    return heard


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An unbroken run of layer norm, two seeds of three epochs each."""
    return run(CONFIG, tiny, tmp_path_factory.mktemp("whole") / "run", mesh=ONE)


@pytest.fixture
def copy(whole, scratch):
    """A copy of it to damage."""
    shutil.copytree(whole.path, scratch / "copy")
    return RunDirectory(scratch / "copy")


def test_the_same_command_gives_the_same_bytes_but_for_the_times(whole, tiny, scratch):
    again = run(CONFIG, tiny, scratch / "again", mesh=ONE)
    assert difference(again, whole) == ""
    for name in ("step_losses/layer-3.npy", "predictions/layer-4.npz"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize("epochs", [1, 3, 4, 6])
def test_a_run_stopped_anywhere_resumes_to_the_same_end(whole, tiny, scratch, epochs):
    directory = stopped(scratch / "run", tiny, epochs)
    assert len(directory.epochs()) == epochs
    heard = resumed(directory, tiny)
    assert (heard.complete, heard.warnings) == (epochs, [])
    assert difference(directory, whole) == ""
    assert len(directory.info().resumed) == (epochs < 6)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_resumes_on_another_mesh_to_the_same_end(whole, tiny, scratch, epochs):
    """Stopped between the lines of two nets that train together, they are an epoch apart."""
    directory = stopped(scratch / "run", tiny, epochs, mesh=MeshShape(seed=2))
    heard = resumed(directory, tiny, MeshShape(seed=2) if epochs == 1 else ONE)
    assert heard.complete == epochs
    assert difference(directory, whole) == ""
    (again,) = directory.info().resumed
    assert directory.info().environment.mesh == "seed=2,batch=1"
    assert again.mesh == ("seed=2,batch=1" if epochs == 1 else "seed=1,batch=1")


def test_a_finished_run_grows_by_seeds_and_by_epochs(whole, tiny, scratch):
    """As one command would have made it, bit for bit; what was there is not trained again."""
    small = dataclasses.replace(CONFIG, epochs=2, seeds=1)
    directory = run(small, tiny, scratch / "run", mesh=ONE)
    before = {(e.seed, e.epoch): e for e in directory.epochs()}
    assert resumed(directory, tiny, seeds=2).complete == 2
    assert resumed(directory, tiny, epochs=3).complete == 4
    assert difference(directory, whole) == ""
    assert {(e.seed, e.epoch): e for e in directory.epochs()}.items() >= before.items()
    for seed in (3, 4):
        name = f"probes/layer-{seed}.npz"
        assert (directory.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_the_seeds_that_a_run_grows_by_train_side_by_side(tiny, scratch):
    """The finished one takes no place beside them, which would leave a device idle."""
    small = dataclasses.replace(CONFIG, epochs=1, seeds=1)
    directory = run(small, tiny, scratch / "run", mesh=ONE)
    assert resumed(directory, tiny, MeshShape(seed=2), seeds=3).together == [[4, 5]]


def test_a_finished_net_that_was_not_measured_is_measured(copy, whole, tiny):
    name = "probes/layer-4.npz"
    (copy.path / name).unlink()
    resumed(copy, tiny)
    assert (copy.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_net_that_cannot_be_measured_keeps_no_other_from_it(copy, whole, tiny):
    for seed in (3, 4):
        (copy.path / f"probes/layer-{seed}.npz").unlink()
    flip(copy.path / "checkpoints/layer-3/epoch-3.msgpack")
    (warning,) = resumed(copy, tiny).warnings
    assert warning.startswith("layer norm is not measured inside")
    name = "probes/layer-4.npz"
    assert (copy.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_finished_run_without_checkpoints_does_not_start_again_to_grow(copy, tiny):
    shutil.rmtree(copy.path / "checkpoints")
    before = {path: path.read_bytes() for path in copy.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is finished and has no whole checkpoint"):
        resumed(copy, tiny, epochs=4)
    assert {path: path.read_bytes() for path in before} == before


def test_lines_that_are_trained_again_are_kept_aside(tiny, scratch):
    directory = stopped(scratch / "run", tiny, 5)
    lines = (directory.path / "metrics.jsonl").read_bytes()
    shutil.rmtree(directory.path / "checkpoints" / "layer-4")
    assert resumed(directory, tiny).complete == 3
    assert (directory.path / "metrics.jsonl.damaged-1").read_bytes() == lines


def test_other_settings_are_refused(copy, tiny):
    for changes in (
        {"seed": 2},
        {"epochs": 2},
        {"momentum": 0.8},
        {"momentum": 0.95},
        {"seeds": 1},
        {"norm": "group"},
    ):
        with pytest.raises(UserError, match=f"{next(iter(changes))}=.* conflicts with the run"):
            resumed(copy, tiny, **changes)
    with pytest.raises(UserError, match="not what"):
        resumed(copy, dataclasses.replace(tiny, fingerprint="0"))


def test_what_was_written_of_an_epoch_without_its_line_is_written_again(copy, whole, tiny):
    lines = (copy.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy.path / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    (copy.path / ".writing-x").write_text("half")
    heard = resumed(copy, tiny)
    assert (heard.complete, heard.warnings) == (5, [])
    assert not (copy.path / ".writing-x").exists()
    assert difference(copy, whole) == ""


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHECKPOINTS = ["checkpoints/layer-4/epoch-3.msgpack", "checkpoints/layer-4/epoch-2.msgpack"]


def test_a_finished_net_needs_no_checkpoint(copy, whole, tiny):
    """Not even to be flipped: nothing that is complete is trained again."""
    for name in CHECKPOINTS:
        flip(copy.path / name)
    before = {path: path.read_bytes() for path in copy.path.rglob("*") if path.is_file()}
    heard = resumed(copy, tiny)
    assert (heard.complete, heard.warnings) == (6, [])
    assert {path: path.read_bytes() for path in before} == before
    (copy.path / "probes/layer-4.npz").unlink()
    (warning,) = resumed(copy, tiny).warnings
    assert "is not measured inside" in warning
    shutil.rmtree(copy.path / "checkpoints")
    assert resumed(copy, tiny).complete == 6


@pytest.mark.parametrize(("damaged", "complete"), [(1, 4), (2, 3)])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_counts(
    tiny, scratch, whole, damaged, complete
):
    directory = stopped(scratch / "run", tiny, 5)
    names = [f"checkpoints/layer-4/epoch-{number}.msgpack" for number in (2, 1)][:damaged]
    for name in names:
        flip(directory.path / name)
    heard = resumed(directory, tiny)
    assert heard.complete == complete
    assert len(heard.warnings) == damaged + 1
    assert "it is kept as" in heard.warnings[0]
    for name in names:
        assert (directory.path / name).with_suffix(".damaged").exists()
    assert difference(directory, whole) == ""


@pytest.mark.parametrize("name", ["step_losses/layer-4.npy", "predictions/layer-4.npz"])
def test_a_damaged_record_is_written_again_from_the_checkpoint(copy, whole, tiny, name):
    (copy.path / name).write_bytes(b"rubbish")
    heard = resumed(copy, tiny)
    assert (heard.complete, heard.warnings) == (6, [])
    assert difference(copy, whole) == ""


def test_a_checkpoint_of_another_net_does_not_count(copy, whole, tiny):
    """It is whole and of the same layers, but its logits are not those that the line tells of."""
    folder = copy.path / "checkpoints"
    shutil.copy(folder / "layer-3" / "epoch-3.msgpack", folder / "layer-4" / "epoch-3.msgpack")
    (copy.path / "predictions" / "layer-4.npz").unlink()
    heard = resumed(copy, tiny)
    assert heard.complete == 5
    assert "seed 4: a record of epoch 3 is damaged; resumes after epoch 2" in heard.warnings[0]
    assert difference(copy, whole) == ""


def test_swapped_and_wrong_lines_are_set_aside_and_what_is_whole_counts(copy, whole, tiny):
    path = copy.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert resumed(copy, tiny).complete == 6
    assert difference(copy, whole) == ""
    wrong = lines[5].replace('"epoch": 3', '"epoch": 4')
    path.write_text("".join([*lines[:5], wrong, lines[0]]))
    heard = resumed(copy, tiny)
    assert heard.complete == 5
    assert "1 damaged and 1 other lines" in heard.warnings[0]
    assert (copy.path / "metrics.jsonl.damaged-1").exists()
    assert difference(copy, whole) == ""


def test_a_record_that_cannot_be_read_stops_it_and_nothing_is_lost(copy, tiny, monkeypatch):
    """A stale network handle is no damage."""
    before = {path: path.read_bytes() for path in copy.path.rglob("*") if path.is_file()}
    original = os.open

    def stale(path, *rest):
        if str(path).endswith((".npy", ".npz", ".msgpack")):
            raise OSError(116, "Stale file handle", str(path))
        return original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", stale)
        with pytest.raises(OSError, match="Stale"):
            resumed(copy, tiny)
    assert {path: path.read_bytes() for path in before} == before


def test_nets_that_train_in_one_program_resume_together_or_apart(tiny, scratch, monkeypatch):
    monkeypatch.setattr(epochs, "nets_at_once", lambda *_: 2)
    config = dataclasses.replace(CONFIG, batch_size=35)
    whole = run(config, tiny, scratch / "whole", mesh=ONE)
    numbers = [(epoch.epoch, epoch.seed) for epoch in whole.epochs()]
    assert numbers == [(1, 3), (2, 3), (3, 3), (1, 4), (2, 4), (3, 4)]  # as one after the other
    together = stopped(scratch / "together", tiny, 4, config)
    assert resumed(together, tiny).complete == 4
    assert difference(together, whole) == ""
    apart = stopped(scratch / "apart", tiny, 3, config)
    assert resumed(apart, tiny).complete == 3
    assert [(epoch.epoch, epoch.seed) for epoch in apart.epochs()] == numbers


def test_a_run_of_other_code_resumes_with_a_warning(tiny, scratch):
    directory = stopped(scratch / "run", tiny, 5)
    info = directory.info()
    other = dataclasses.replace(info.environment, git_revision="0")
    directory.write_info(dataclasses.replace(info, environment=other))
    (warning,) = resumed(directory, tiny).warnings
    assert "other code" in warning
    (again,) = directory.info().resumed
    assert again.git_revision == info.environment.git_revision


def hold(path, ready, done):
    with RunDirectory(path).locked():
        ready.set()
        done.wait(60)


@pytest.mark.slow
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
    assert resumed(copy, tiny).complete == 6


@pytest.mark.parametrize(
    ("home", "name", "number"),
    [
        (checkpoint, "save", 4),
        (RunDirectory, "write_net", 7),  # the predictions, and then the losses
        (RunDirectory, "write_net", 8),
        (RunDirectory, "append_epoch", 4),
    ],
)
def test_a_disk_that_fails_any_write_of_an_epoch_loses_that_epoch_alone(
    tiny, scratch, whole, monkeypatch, home, name, number
):
    """As where a directory turns read-only: a write of the fourth epoch fails."""
    original, calls = getattr(home, name), []

    def fails_once(*arguments, **arrays):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(errno.EROFS, "Read-only file system", "x")
        return original(*arguments, **arrays)

    monkeypatch.setattr(home, name, fails_once)
    with pytest.raises(OSError, match="Read-only"):
        run(CONFIG, tiny, scratch / "run", mesh=ONE)
    monkeypatch.undo()
    directory = RunDirectory(scratch / "run")
    assert resumed(directory, tiny).complete == 3
    assert difference(directory, whole) == ""


@pytest.mark.parametrize(("where", "step"), [("train_nets", 3), ("evaluate_nets", None)])
def test_a_loss_that_is_not_finite_keeps_what_was_good_and_others_go_on(
    tiny, scratch, whole, monkeypatch, where, step
):
    """In the second epoch of the first seed: five chunks of an epoch, or an evaluation."""
    original, calls = getattr(epochs, where), []

    def turns_nan(*arguments):
        calls.append(1)
        results = original(*arguments)
        if len(calls) != (8 if step else 2):
            return results
        if step is None:
            return results._replace(logits=results.logits * np.nan, loss=results.loss * np.nan)
        state, steps = results
        return state, steps._replace(losses=steps.losses * np.nan)

    heard = StopAfter()
    with monkeypatch.context() as patch:
        patch.setattr(epochs, where, turns_nan)
        directory = run(CONFIG, tiny, scratch / "run", heard, ONE)
    (warning,) = heard.warnings
    assert f"layer norm, seed 3, is nan at epoch 2{', step 3' if step else ''}" in warning
    assert [(e.seed, e.epoch) for e in directory.epochs()] == [(3, 1), (4, 1), (4, 2), (4, 3)]
    assert resumed(directory, tiny).complete == 4
    assert difference(directory, whole) == ""


def test_a_run_of_which_every_net_diverges_stops(tiny, scratch):
    config = dataclasses.replace(CONFIG, seeds=1, learning_rate=1e30)
    heard = StopAfter()
    with pytest.raises(NonFiniteLoss, match=r"seed 3.*epoch 1, step [1-5]") as raised:
        run(config, tiny, scratch / "run", heard, ONE)
    assert raised.value.epoch == 1
    assert heard.warnings == []  # the error says it
    assert RunDirectory(scratch / "run").epochs() == []


def test_a_line_says_what_it_should(whole):
    line = json.loads((whole.path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == [
        *("norm", "seed", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("train_seconds", "test_seconds", "crc32"),
    ]
    assert runner.load_state(whole.path, "layer", 4)[1].params


def test_a_sweep_that_is_refused_is_left_as_it_was(tiny, scratch):
    """Its first run could go on; the second has no checkpoint to go on from."""
    configs = product(
        study,
        {"norm": "layer", "arch": "three-layers", "dataset": "tiny", "epochs": 1},
        {"batch_size": (35, 70)},
    )
    sweep = Sweep.create(scratch / "s", configs, "x")
    train(sweep, tiny)
    shutil.rmtree(sweep.directories[1].path / "checkpoints")
    files = [path for path in sweep.folder.path.rglob("*.json*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    longer = [dataclasses.replace(config, epochs=2) for config in configs]
    with pytest.raises(UserError, match="is finished and has no whole checkpoint"):
        train(Sweep(scratch / "s", longer), tiny)
    assert {path: path.read_bytes() for path in files} == before
    again = Sweep.open(scratch / "s")
    assert again.configs == configs
    train(again, tiny)
