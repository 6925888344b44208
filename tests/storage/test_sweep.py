"""Sweeps on disk: their runs and their folder."""

import dataclasses
import json

from helpers import refusal

from jaxnorm.config import Config, product, study
from jaxnorm.runs.callbacks import TensorBoard
from jaxnorm.storage.sweep import Sweep, SweepInfo, names_of

BASE = {"norm": "layer", "dataset": "tiny", "epochs": 2}
NAMES = [f"batch-{size}-rate-{rate}" for size in (35, 70) for rate in ("0.01", "0.002")]


def configs():
    return product(study, BASE, {"batch_size": (35, 70), "learning_rate": (0.01, 0.002)})


def test_every_combination_is_a_run():
    assert names_of(configs()) == NAMES
    of_norms = product(study, {"groups": 8}, {"norm_momentum": (0.0, 0.9)})
    wanted = [f"batch-128-rate-0.01-norm_momentum-{momentum}" for momentum in ("0", "0.9")]
    assert names_of(of_norms) == wanted
    assert names_of([Config(groups=8, alpha=0.25)]) == ["batch-128-rate-0.01"]
    assert {config.epochs for config in configs()} == {2}
    (default,) = product(study, {"dataset": "digits"}, {})
    assert default == study(dataset="digits")
    twice = {"batch_size": (4, 4)}
    assert "batch_size=4 and more: a value is there twice" in refusal(product, study, BASE, twice)
    assert "learning_rate=-1.0" in refusal(product, study, BASE, {"learning_rate": (0.1, -1.0)})


def made(path, configs):
    """A sweep of which nothing but its `sweep.json` is there."""
    sweep = Sweep(path, configs)
    sweep.write_info(sweep.info("x"))
    return sweep


def test_a_folder_is_read_back_and_checked(scratch):
    made(scratch / "two", configs()[:2])
    assert Sweep.open(scratch / "two").configs == configs()[:2]
    made(scratch / "s", configs())
    again = Sweep.open(scratch / "s" / "sweep.json")
    assert again.configs == configs()
    assert again.exists()
    assert [run.path.name for run in again.directories] == NAMES
    assert again.net(again.nets[3]).path == scratch / "s" / NAMES[3] / "nets" / "layer-1"
    longer = [dataclasses.replace(config, epochs=3) for config in configs()]
    assert Sweep(scratch / "s", longer).info("y") == SweepInfo("x", longer)  # it grows
    other = Sweep(scratch / "s", configs()[:2])
    assert "is a sweep of other runs" in refusal(other.info, "x")


def test_a_damaged_or_forged_record_is_refused_in_one_line(scratch):
    path = made(scratch / "s", configs()).folder.path / "sweep.json"
    first, second, *_ = json.loads(path.read_text())["runs"]
    forged = (
        [],
        [1],
        [first, first],
        [first, {**second, "epochs": 3}],
        [{**first, "norm": "../x"}],
    )
    texts = [json.dumps({"command": "x", "runs": runs}) for runs in forged]
    for text in (*texts, "", "{", "[]", "{}", '{"command": "x"}', "\xff"):
        path.write_text(text, encoding="latin-1")
        said = refusal(Sweep.open, scratch / "s")
        assert "sweep.json cannot be read" in said or "sweep.json is of another version" in said


def test_links_are_refused(scratch, tmp_path_factory):
    """A run directory of a sweep, its folder of nets, its record and TensorBoard's folder."""
    outside = tmp_path_factory.mktemp("outside")
    sweep = made(scratch / "s", configs())
    for name in (NAMES[1], "tensorboard"):
        (sweep.folder.path / name).symlink_to(outside)
    assert "is a link" in refusal(Sweep.open, scratch / "s")
    assert "is a link" in refusal(TensorBoard, sweep, [])
    alone = Sweep(scratch / "r", configs()[:1])
    alone.folder.path.mkdir()
    for name in ("run.json", "nets"):
        (alone.folder.path / name).symlink_to(outside / "x")
    for act in (alone.exists, alone.net(alone.nets[0]).epoch, lambda: Sweep.open(scratch / "r")):
        assert "is a link" in refusal(act)
    assert list(outside.iterdir()) == []


def test_a_run_alone_is_a_sweep_of_one(scratch):
    sweep = Sweep(scratch / "r", configs()[:1])
    assert sweep.info("x") is None
    assert [run.path for run in sweep.directories] == [scratch / "r"]
    assert not sweep.exists()
    assert not (scratch / "r").exists()
    (scratch / "file").touch()
    for path in (scratch / "r", scratch / "file"):
        assert "is not a run directory" in refusal(Sweep.open, path)
