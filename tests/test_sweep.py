"""Sweeps: their runs, their folder, going on with one, and the command."""

import dataclasses
import json

import numpy as np
import pytest
from runs import difference
from test_run import call

from jaxnorm import data, experiment
from jaxnorm.config import Config, UserError, product
from jaxnorm.observers import Observer
from jaxnorm.records import RunDirectory
from jaxnorm.sweep import SweepDirectory, name_of

FLAGS = ("--norm", "layer", "--dataset", "tiny", "--epochs", "2", "--skip-self-check")
SWEPT = ("--batch-size", "35", "70", "--learning-rate", "0.01", "0.002")
BASE = {"norm": "layer", "dataset": "tiny", "epochs": 2}
"""70 images: no batch is ragged, and fewer programs are compiled."""
NAMES = [f"batch-{size}-rate-{rate}" for size in (35, 70) for rate in ("0.01", "0.002")]


@pytest.fixture
def inside(scratch, monkeypatch, tiny):
    monkeypatch.chdir(scratch)
    monkeypatch.setattr(data, "load", lambda *_, **__: tiny)
    return scratch


def configs():
    return product(BASE, {"batch_size": (35, 70), "learning_rate": (0.01, 0.002)})


def test_every_combination_is_a_run():
    assert [name_of(config) for config in configs()] == NAMES
    assert {config.epochs for config in configs()} == {2}
    (default,) = product({"dataset": "digits"}, {"batch_size": (None,), "learning_rate": (0.01,)})
    assert default == Config(dataset="digits")
    with pytest.raises(UserError, match="--batch-size has a value twice"):
        product(BASE, {"batch_size": (4, 4)})
    with pytest.raises(UserError, match=r"--learning-rate is -1\.0"):
        product(BASE, {"learning_rate": (0.1, -1.0)})


def test_a_folder_is_read_back_and_checked(scratch):
    made = SweepDirectory.create(scratch / "s", configs(), "x")
    assert SweepDirectory.is_one(scratch / "s")
    assert not SweepDirectory.is_one(scratch)
    assert made.configs() == configs()
    assert [run.path.name for run in made.runs()] == NAMES
    with pytest.raises(UserError, match="already used"):
        SweepDirectory.create(scratch / "s", configs(), "x")
    stored = json.loads((made.path / "sweep.json").read_text())
    for wrong in (
        [],
        {},
        {"runs": []},
        {"runs": [1]},
        {"runs": [stored["runs"][0]] * 2},
        {"runs": [stored["runs"][0], {**stored["runs"][1], "epochs": 3}]},
        {"runs": [{**stored["runs"][0], "norm": "../x"}]},
    ):
        (made.path / "sweep.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"sweep.json"):
            made.runs()
    (made.path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        made.runs()


class Stopped(BaseException):
    pass


class StopAfter(Observer):
    def __init__(self, epochs):
        self.left, self.heard, self.run = epochs, [], None

    def on_run(self, number, config):
        self.run = config

    def on_epoch(self, epoch):
        self.heard.append((name_of(self.run), epoch.epoch))
        self.left -= 1
        if not self.left:
            raise Stopped


def test_a_sweep_stopped_twice_trains_nothing_twice(tiny, scratch):
    """And each of its runs is the run alone, bit for bit."""
    sweep = SweepDirectory.create(scratch / "s", configs(), "x")
    heard, lines = [], {}
    for stop in (3, 2, 99):
        with sweep.locked():
            observer = StopAfter(stop)
            try:
                experiment.train_runs(configs(), tiny, sweep.runs(), "x", observer)
            except Stopped:
                assert stop < 99
        heard += observer.heard
        for directory in sweep.runs():
            for epoch in directory.epochs():
                key = directory.path.name, epoch.epoch
                assert lines.setdefault(key, epoch) == epoch  # its times too
    assert sorted(heard) == sorted((name, epoch) for name in NAMES for epoch in (1, 2))
    assert len(lines) == 8
    alone = RunDirectory.create(scratch / "alone")
    experiment.run(configs()[1], tiny, alone, "x")
    # Alone, the two devices share its batches of 35 in no way: they cannot be halved.
    assert difference(sweep.runs()[1], alone) == ""
    rates = [run.info().config.learning_rate for run in sweep.runs()]
    assert rates == [0.01, 0.002, 0.01, 0.002]
    losses = [run.step_losses("layer", 1) for run in sweep.runs()]
    assert losses[0][0] == losses[1][0]
    assert (losses[0][1:] != losses[1][1:]).all()


def test_the_command_plans_trains_and_goes_on(inside, capsys, monkeypatch):
    right = experiment._write
    calls = []

    def fails_once(directory, *rest):
        if directory.path.parent.name == "s":  # and not the plan's own
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        right(directory, *rest)

    monkeypatch.setattr(experiment, "_write", fails_once)
    assert call(*FLAGS, *SWEPT, "--out", "s") == 130
    captured = capsys.readouterr()
    assert "planning 4 nets" in captured.out
    assert "layer     35     2        2  seed=2,batch=1" in captured.out
    assert "4 nets on 2 devices: about" in captured.out
    assert "go on with: python -m jaxnorm.run --resume s" in captured.err
    assert call("--resume", "s", "--batch-size", "35") == 2
    assert "--batch-size 35 conflicts with the run to resume, which has 35 70" in (
        capsys.readouterr().err
    )
    assert call("--resume", "s", "--skip-self-check", "--batch-size", "35", "70") == 0
    captured = capsys.readouterr()
    assert "going on after 2 of 8 epochs" in captured.out
    assert "planning" not in captured.out
    assert "batch  35  rate 0.002 " in captured.out
    table = (inside / "s" / "sweep.md").read_text()
    for directory in SweepDirectory("s").runs():
        config, last = directory.info().config, directory.epochs()[-1]
        row = f"| {config.batch} | {config.learning_rate:g} | {last.test_accuracy:.2%} |"
        assert row in table
    assert len(calls) == 9


def test_a_net_whose_loss_is_not_finite_is_left_and_the_others_go_on(inside, capsys):
    rates = ("--learning-rate", "0.01", "1e30", "--batch-size", "35", "--momentum", "0")
    assert call(*FLAGS, *rates, "--out", "s") == 0
    warning = capsys.readouterr().err
    assert "warning: batch size 35, learning rate 1e+30: the training loss of layer norm" in warning
    assert "the sweep goes on without this net" in warning
    good, bad = SweepDirectory("s").runs()
    assert (len(good.epochs()), len(bad.epochs())) == (2, 0)
    alone = RunDirectory.create(inside / "alone")
    experiment.run(good.info().config, data.load("tiny"), alone, "x")
    assert difference(good, alone) == ""
    table = (inside / "s" / "sweep.md").read_text()
    assert "| 35 | 1e+30 | none (0 of 1) |" in table
    assert "the loss was not finite" in table
    assert call("--resume", "s", "--skip-self-check") == 0


def test_a_plan_alone_trains_nothing(inside, capsys):
    assert call(*FLAGS, *SWEPT, "--seeds", "2", "--plan", "--mesh", "seed=1,batch=1") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.split()[0] == "layer"]
    assert [row[:5] for row in rows] == [
        ["layer", "35", "4", "1", "seed=1,batch=1"],
        ["layer", "70", "4", "1", "seed=1,batch=1"],
    ]
    assert [row[5:8] for row in rows] == [["4", "x", "4"], ["4", "x", "2"]]
    for row in rows:
        assert min(map(float, row[8:11])) > 0  # milliseconds
        assert int(row[11].replace(",", "")) > 0  # megabytes
    assert list(inside.iterdir()) == []


def test_bfloat16_trains_near_float32_and_is_recorded(tiny, scratch):
    config = Config("layer", "original", "tiny", 1, 35)
    low = dataclasses.replace(config, precision="bfloat16")
    directory = RunDirectory.create(scratch / "run")
    experiment.self_check(low, tiny)
    experiment.run(low, tiny, directory, "x")
    assert directory.info().config.precision == "bfloat16"
    losses = directory.step_losses("layer", 1)
    wanted = experiment.fit(config, tiny)["layer", 1].step_losses
    assert (losses != wanted).all()
    np.testing.assert_allclose(losses, wanted, rtol=0.02)
    _, state = experiment.load_state(directory.path, "layer", 1)
    assert state.params["C1"]["kernel"].dtype == np.float32
    with pytest.raises(UserError, match="--precision tf32 needs an NVIDIA GPU"):
        experiment.check(dataclasses.replace(config, precision="tf32"), tiny)
