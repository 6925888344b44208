"""Sweeps on disk: their runs and their folder."""

import json

import pytest

from jaxnorm.config import UserError, product, study
from jaxnorm.storage.sweep import Sweep, name_of

BASE = {"norm": "layer", "dataset": "tiny", "epochs": 2}
NAMES = [f"batch-{size}-rate-{rate}" for size in (35, 70) for rate in ("0.01", "0.002")]


def configs():
    return product(study, BASE, {"batch_size": (35, 70), "learning_rate": (0.01, 0.002)})


def test_every_combination_is_a_run():
    assert [name_of(config) for config in configs()] == NAMES
    assert {config.epochs for config in configs()} == {2}
    (default,) = product(study, {"dataset": "digits"}, {})
    assert default == study(dataset="digits")
    with pytest.raises(UserError, match="batch_size=4 and more: a value is there twice"):
        product(study, BASE, {"batch_size": (4, 4)})
    with pytest.raises(UserError, match=r"learning_rate=-1\.0"):
        product(study, BASE, {"learning_rate": (0.1, -1.0)})


def test_a_folder_is_read_back_and_checked(scratch):
    Sweep.create(scratch / "two", configs()[:2], "x")
    assert Sweep.open(scratch / "two").configs == configs()[:2]
    made = Sweep.create(scratch / "s", configs(), "x")
    again = Sweep.open(scratch / "s")
    assert again.configs == made.configs == configs()
    assert [run.path.name for run in again.directories] == NAMES
    with pytest.raises(UserError, match="already used"):
        Sweep.create(scratch / "s", configs(), "x")
    path = made.folder.path / "sweep.json"
    stored = json.loads(path.read_text())
    for wrong in (
        [],
        {},
        {"command": "x", "runs": []},
        {"command": "x", "runs": [1]},
        {"command": "x", "runs": [stored["runs"][0]] * 2},
        {"command": "x", "runs": [stored["runs"][0], {**stored["runs"][1], "epochs": 3}]},
        {"command": "x", "runs": [{**stored["runs"][0], "norm": "../x"}]},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"sweep.json cannot be read"):
            Sweep.open(scratch / "s")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Sweep.open(scratch / "s")


def test_a_sweep_that_is_locked_locks_each_of_its_runs(scratch):
    made = Sweep.create(scratch / "s", configs(), "x")
    another = Sweep.open(scratch / "s")
    with made.locked():
        for directory in (another.folder, *another.directories):
            with pytest.raises(UserError, match="by another process"), directory.locked():
                pass
    alone, refused = made.directories[2], pytest.raises(UserError, match="by another process")
    with alone.locked(), refused, another.locked():
        pass
    with another.locked():
        pass


def test_a_run_alone_is_a_sweep_of_one(scratch):
    sweep = Sweep.create(scratch / "r", configs()[:1], "x")
    assert [run.path for run in sweep.directories] == [scratch / "r"]
    assert list((scratch / "r").iterdir()) == []
    (scratch / "file").touch()
    for path in (scratch / "r", scratch / "file"):
        with pytest.raises(UserError, match="is not a run directory"):
            Sweep.open(path)
