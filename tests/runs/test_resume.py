"""Runs that stop and resume: the bits of an unbroken run, and nothing complete is lost."""

import dataclasses
import errno
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from helpers import StopAfter, Stopped, difference, refusal, run, train

from jaxnorm.analysis.results import Run
from jaxnorm.config import USUAL_RATES, Config, NetId, product, study
from jaxnorm.records import to_lines
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import NetFolder
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import epoch as epochs
from jaxnorm.training.mesh import ONE, MeshShape

CONFIG = Config(
    norm="layer", arch="three-layers", dataset="tiny", epochs=3, batch_size=30, seed=3, seeds=2
)
"""Its nets train one after the other here (`ONE`), as far as is not said otherwise. Of 70 images
the last batch has 10.
"""
SHORT = dataclasses.replace(CONFIG, epochs=2, seeds=1)


def stopped(path, tiny, epochs, config=CONFIG, mesh=ONE):
    with pytest.raises(Stopped):
        run(config, tiny, path, [StopAfter(epochs)], mesh)
    return RunDirectory(path)


def resumed(directory, tiny, mesh=ONE, **changes):
    heard, config = StopAfter(), dataclasses.replace(directory.info().config, **changes)
    run(config, tiny, directory.path, [heard], mesh)
    return heard


def net(directory, seed):
    return NetFolder(directory, NetId("layer", seed))


def numbers(directory):
    """The seed and the number of each complete epoch."""
    return [(e.seed, e.epoch) for lines in Run(directory).epochs.values() for e in lines]


def files(directory):
    """The content of every file."""
    return {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}


def flip(path):
    """Flips a bit; of an .npz amid its largest array, because not every bit of a header counts."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as members:
            largest = max(members.infolist(), key=lambda member: member.compress_size)
        place = largest.header_offset + 100 + largest.compress_size // 2
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An unbroken run of layer norm, two seeds of three epochs each."""
    return run(CONFIG, tiny, tmp_path_factory.mktemp("whole") / "run", mesh=ONE)


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """An unbroken run of one seed and two epochs."""
    return run(SHORT, tiny, tmp_path_factory.mktemp("short") / "run", mesh=ONE)


@pytest.fixture
def copy(whole, scratch):
    """A copy of the unbroken run to damage."""
    shutil.copytree(whole.path, scratch / "copy")
    return RunDirectory(scratch / "copy")


def test_the_same_command_gives_the_same_bytes_but_for_the_times(whole, tiny, scratch):
    again = run(CONFIG, tiny, scratch / "again", mesh=ONE)
    assert difference(again, whole) == ""
    for seed in (3, 4):
        probes = [net(directory, seed).path / "probes.npz" for directory in (again, whole)]
        assert probes[0].read_bytes() == probes[1].read_bytes()
    text = (net(whole, 4).path / "metrics.jsonl").read_text()
    assert text == to_lines(net(whole, 4).result().epochs)
    assert list(json.loads(text.splitlines()[0])) == [
        *("norm", "seed", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("train_seconds", "test_seconds"),
    ]


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_a_run_stopped_anywhere_resumes_to_the_same_end(whole, tiny, scratch, epochs):
    """After the third it is stopped before the first net is measured."""
    directory = stopped(scratch / "run", tiny, epochs)
    assert len(numbers(directory)) == epochs
    heard = resumed(directory, tiny)
    assert (heard.complete, heard.warnings) == (epochs, [])
    assert difference(directory, whole) == ""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_moments_of_another_optimizer_resume(tiny, scratch, optimizer):
    config = dataclasses.replace(SHORT, optimizer=optimizer, learning_rate=USUAL_RATES[optimizer])
    directory = stopped(scratch / "run", tiny, 1, config)
    resumed(directory, tiny)
    assert difference(directory, run(config, tiny, scratch / "whole", mesh=ONE)) == ""


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_resumes_on_another_mesh_to_the_same_end(whole, tiny, scratch, epochs):
    """Stopped between the states of two nets that train together, they are an epoch apart."""
    directory = stopped(scratch / "run", tiny, epochs, mesh=MeshShape(seed=2))
    heard = resumed(directory, tiny, MeshShape(seed=2) if epochs == 1 else ONE)
    assert heard.complete == epochs
    assert difference(directory, whole) == ""
    meshes = [one.mesh for one in net(directory, 4).result().environments]
    assert directory.info().environment.mesh == "seed=2,batch=1"
    assert meshes[-1] == ("seed=2,batch=1" if epochs == 1 else "seed=1,batch=1")


def test_nets_that_train_in_one_program_resume_together_or_apart(tiny, scratch, monkeypatch):
    monkeypatch.setattr(epochs, "nets_at_once", lambda *_: 2)
    whole = run(CONFIG, tiny, scratch / "whole", mesh=ONE)
    together, apart = (stopped(scratch / f"{n}", tiny, n) for n in (4, 3))
    assert numbers(together) == [(3, 1), (3, 2), (4, 1), (4, 2)]
    assert numbers(apart) == [(3, 1), (3, 2), (4, 1)]
    assert resumed(together, tiny).together == [[3, 4]]
    assert difference(together, whole) == ""
    assert resumed(apart, tiny).together == [[3], [4]]
    assert numbers(apart) == numbers(whole)


@pytest.mark.parametrize("number", range(7))
def test_a_kill_between_any_two_writes_loses_the_epoch_in_hand_alone(
    tiny, scratch, short, monkeypatch, number
):
    """As a disk that fails then: `run.json`, two states with their copies, probes and result."""
    original, written = RunDirectory.write_bytes, []

    def stops(self, name, content):
        if len(written) == number:
            raise OSError(errno.EROFS, "Read-only file system", "x")
        written.append(name)
        original(self, name, content)

    directory = RunDirectory(scratch / "run")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_bytes", stops)
        with pytest.raises(OSError, match="Read-only"):
            run(SHORT, tiny, directory.path, mesh=ONE)
    complete = sum("state-" in name for name in written)
    heard = StopAfter()
    run(SHORT, tiny, directory.path, [heard], ONE)
    assert (heard.complete or 0) == complete
    assert sum(map(len, heard.together)) == (complete < 2)  # what was complete is not trained again
    assert difference(directory, short) == ""


def test_a_finished_run_grows_by_seeds_and_by_epochs(whole, tiny, scratch, short):
    """As one command would have made it, bit for bit; what was there is not trained again."""
    shutil.copytree(short.path, scratch / "run")
    directory, before = RunDirectory(scratch / "run"), net(short, 3).result().epochs
    assert resumed(directory, tiny, seeds=2).complete == 2
    assert resumed(directory, tiny, epochs=3).complete == 4
    assert difference(directory, whole) == ""
    assert net(directory, 3).result().epochs[:2] == before  # their times too
    for seed in (3, 4):
        probes = [net(one, seed).path / "probes.npz" for one in (directory, whole)]
        assert probes[0].read_bytes() == probes[1].read_bytes()


def test_the_seeds_that_a_run_grows_by_train_side_by_side(tiny, scratch, short):
    """The finished one takes no place beside them, which would leave a device idle."""
    shutil.copytree(short.path, scratch / "run")
    heard = resumed(RunDirectory(scratch / "run"), tiny, MeshShape(seed=2), seeds=3)
    assert heard.together == [[4, 5]]


@pytest.mark.parametrize("spoil", [os.unlink, flip])
def test_a_finished_run_without_states_does_not_start_again_to_grow(copy, tiny, spoil):
    """And is left as it was: it resumes, though there is nothing to do."""
    for path in net(copy, 4).path.glob("state-*"):
        spoil(path)
    before = files(copy)
    said = refusal(resumed, copy, tiny, epochs=4)
    assert "seed 4, " in said
    assert " is finished and has no whole state" in said
    assert files(copy) == before
    heard = resumed(copy, tiny)
    assert (heard.complete, heard.together, heard.warnings) == (6, [], [])
    assert files(copy) == before


def test_a_sweep_that_is_refused_is_left_as_it_was(tiny, scratch):
    """Its first run could go on; the second has no state to go on from."""
    base = {"norm": "layer", "arch": "three-layers", "dataset": "tiny", "epochs": 1}
    rates = {"batch_size": (30,), "learning_rate": (0.01, 0.002)}
    sweep = Sweep(scratch / "s", product(study, base, rates))
    train(sweep, tiny, mesh=ONE)
    (net(sweep.directories[1], 1).path / "state-1.msgpack").unlink()
    before = files(sweep.folder)
    longer = [dataclasses.replace(config, epochs=2) for config in sweep.configs]
    longer = Sweep(scratch / "s", longer)
    assert "is finished and has no whole state" in refusal(train, longer, tiny, mesh=ONE)
    assert files(sweep.folder) == before
    again = Sweep.open(scratch / "s")
    assert again.configs == sweep.configs
    train(again, tiny, mesh=ONE)
    assert all(map(again.ended, again.nets))


def test_other_settings_are_refused(copy, tiny):
    before = files(copy)
    other = {"seed": 2, "epochs": 2, "momentum": 0.8, "seeds": 1, "norm": "group"}
    for name, value in other.items():
        said = refusal(resumed, copy, tiny, **{name: value})
        assert f"{name}=" in said
        assert " conflicts with the run" in said
    assert "not what" in refusal(resumed, copy, dataclasses.replace(tiny, fingerprint="0"))
    assert files(copy) == before


def test_a_finished_run_is_left_as_it_is_whatever_is_damaged_beside_its_results(copy, tiny):
    """A small record does not decide over large whole ones."""
    path = net(copy, 4).path
    for spoil in (
        lambda: flip(path / "state-3.msgpack"),
        lambda: flip(path / "state-2.msgpack"),
        lambda: [state.unlink() for state in path.glob("state-*")],
        lambda: flip(path / "probes.npz"),
        lambda: (path / "metrics.jsonl").write_text("rubbish"),
        lambda: (path / "metrics.jsonl").unlink(),
        lambda: (path / "lost.json").write_text("{"),
    ):
        spoil()
        before = files(copy)
        heard = resumed(copy, tiny)
        assert (heard.complete, heard.together, heard.warnings) == (6, [], [])
        assert files(copy) == before


@pytest.mark.parametrize(("damaged", "complete"), [(1, 4), (2, 3)])
def test_a_damaged_state_is_set_aside_and_the_one_before_it_counts(
    tiny, scratch, whole, damaged, complete
):
    directory = stopped(scratch / "run", tiny, 5)
    paths = [net(directory, 4).path / f"state-{number}.msgpack" for number in (2, 1)][:damaged]
    for path in paths:
        flip(path)
    contents = [path.read_bytes() for path in paths]
    heard = resumed(directory, tiny)
    assert heard.complete == complete
    assert len(heard.warnings) == damaged
    for path, content, warning in zip(paths, contents, heard.warnings, strict=True):
        aside = path.with_name(f"{path.name}.damaged-1")
        assert f"it is kept as {aside}" in warning
        assert aside.read_bytes() == content
    assert difference(directory, whole) == ""


def test_a_damaged_result_is_set_aside_and_made_again_from_the_state(copy, whole, tiny):
    path = net(copy, 4).path / "result.npz"
    wanted = path.read_bytes()
    flip(path)
    damaged = path.read_bytes()
    heard = resumed(copy, tiny)
    assert (heard.complete, heard.together) == (6, [])
    (warning,) = heard.warnings
    assert "it is kept as" in warning
    assert path.with_name("result.npz.damaged-1").read_bytes() == damaged
    assert path.read_bytes() == wanted


def test_a_run_of_other_code_resumes_with_a_warning(tiny, scratch):
    directory = stopped(scratch / "run", tiny, 5)
    info = directory.info()
    other = dataclasses.replace(info.environment, git_revision="0")
    directory.write_json("run.json", dataclasses.replace(info, environment=other))
    (warning,) = resumed(directory, tiny).warnings
    assert "other code" in warning
    assert directory.info().environment == other
    assert net(directory, 4).result().environments[-1].git_revision == info.environment.git_revision


def test_a_net_that_another_process_trains_is_left_to_it(tiny, scratch, whole, monkeypatch):
    directory = stopped(scratch / "run", tiny, 1)
    half = net(directory, 3).path / ".writing-x"  # of a process that was killed, or that writes now
    (directory.path / ".writing-x").write_text("of a report")
    half.write_text("half")
    with directory.locked("nets/layer-3"):
        assert resumed(directory, tiny).together == [[4]]
        assert half.exists()
        monkeypatch.setattr("jaxnorm.runs.runner._PATIENCE", 0)
        with directory.locked():
            assert "by another process" in refusal(resumed, directory, tiny)
    assert numbers(directory) == [(3, 1), (4, 1), (4, 2), (4, 3)]
    assert not net(directory, 3).ended(3)
    resumed(directory, tiny)
    assert difference(directory, whole) == ""
    assert not half.exists()
    assert (directory.path / ".writing-x").exists()


@pytest.mark.parametrize(("where", "step"), [("train_nets", 2), ("evaluate_nets", None)])
def test_a_loss_that_is_not_finite_keeps_what_was_good_and_others_go_on(
    tiny, scratch, whole, monkeypatch, where, step
):
    """In the second epoch of the first seed: two chunks of an epoch, or an evaluation."""
    original, calls = getattr(epochs, where), []

    def turns_nan(*arguments):
        calls.append(1)
        results = original(*arguments)
        if len(calls) != (5 if step else 2):
            return results
        if step is None:
            return results._replace(logits=results.logits * np.nan, loss=results.loss * np.nan)
        state, steps = results
        return state, steps._replace(losses=steps.losses * np.nan)

    heard = StopAfter()
    with monkeypatch.context() as patch:
        patch.setattr(epochs, where, turns_nan)
        directory = run(CONFIG, tiny, scratch / "run", [heard], ONE)
    (warning,) = heard.warnings
    assert f"layer norm, seed 3, is nan at epoch 2{', step 2' if step else ''}" in warning
    assert numbers(directory) == [(3, 1), (4, 1), (4, 2), (4, 3)]
    lost = net(directory, 3).lost()
    assert lost.epoch == 2
    assert lost.reason in warning
    before = files(directory)
    assert resumed(directory, tiny).complete == 4
    assert files(directory) == before
    (net(directory, 3).path / "lost.json").write_text("{")
    (warning,) = resumed(directory, tiny).warnings
    assert "lost.json.damaged-1, and made again" in warning
    assert difference(directory, whole) == ""  # it diverged by our own hand alone


def test_a_run_of_which_every_net_diverges_stops(tiny, scratch):
    config = dataclasses.replace(CONFIG, seeds=1, learning_rate=1e30)
    heard = StopAfter()
    for _ in range(2):  # it says so again
        with pytest.raises(ArithmeticError, match=r"seed 3.*epoch 1, step [12]"):
            run(config, tiny, scratch / "run", [heard], ONE)
    assert heard.warnings == []  # the error says it
    assert numbers(RunDirectory(scratch / "run")) == []
    assert net(RunDirectory(scratch / "run"), 3).lost().epoch == 1
