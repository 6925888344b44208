"""Run directories: written whole, read with care."""

import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnorm import records
from jaxnorm.config import Config, UserError
from jaxnorm.records import Epoch, RunDirectory, RunInfo

DATASET = {
    "name": "cifar10",
    "caption": "x",
    "fingerprint": "f",
    "source": "s",
    "verified": None,
    "class_names": ["a", "b", "c"],
    "mean": [0.5, 0.5, 0.5],
    "deviation": [0.1, 0.1, 0.1],
    "train_count": 10,
    "test_count": 2,
}
INFO = RunInfo(Config(norm="batch"), {"batch": 1}, DATASET, {"jax": "1"}, "cpu", None, "now", "run")


def epoch(number: int = 1, norm="batch", **changes) -> Epoch:
    values = Epoch(norm, 1, number, 1.5, 0.25, 1.25, 0.5, 3.0, 1.0)
    return dataclasses.replace(values, **changes)


def test_a_used_or_unwritable_path_is_refused_and_nothing_is_made(scratch):
    (scratch / "file").write_text("x")
    (scratch / "used").mkdir()
    (scratch / "used" / "y").write_text("x")
    for path in (scratch / "file", scratch / "used", scratch / "file" / "in", scratch):
        with pytest.raises(UserError, match="--out"):
            RunDirectory.create(path)
    assert sorted(each.name for each in scratch.iterdir()) == ["file", "used"]
    made = RunDirectory.create(scratch / "deep" / "new")
    assert made.path.stat().st_mode & 0o077 == 0
    RunDirectory.create(scratch / "deep" / "new")  # empty: not used yet


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
    run.write_step_losses("batch", 1, losses)
    np.testing.assert_array_equal(run.step_losses("batch", 1), losses)
    logits, labels = np.ones((2, 3), np.float32), np.array([1, 2], np.int32)
    run.write_predictions("batch", 1, logits, labels)
    np.testing.assert_array_equal(run.predictions("batch", 1)[0], logits)
    np.testing.assert_array_equal(run.predictions("batch", 1)[1], labels)


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
        lines[1].replace("0.5", '"0.5"'),
        lines[1].replace("0.5", "NaN"),
        lines[1].replace('"epoch": 2', '"epoch": 2.5'),
        lines[1].replace("batch", "weight"),
        lines[1].replace("}", ', "validation_loss": 1.5}'),
    ]
    for line in wrong:
        path.write_text(lines[0] + line + lines[2])
        with pytest.raises(UserError, match="line 2"):
            run.epochs()


@given(st.recursive(st.booleans() | st.integers(), st.lists, max_leaves=5))
def test_run_json_with_any_wrong_field_is_refused_in_one_line(tmp_path_factory, value):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.write_info(INFO)
    good = json.loads((run.path / "run.json").read_text())
    for name in good:
        right = {"deterministic": isinstance(value, bool), "resumed": value == []}
        if right.get(name):
            continue
        without = {k: v for k, v in good.items() if k != name}
        for bad in ({**good, name: value}, *([] if name in records._LATER else [without])):
            (run.path / "run.json").write_text(json.dumps(bad))
            with pytest.raises(UserError) as error:
                run.info()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", DATASET)
def test_run_json_with_a_wrong_dataset_field_is_refused(scratch, name):
    run = RunDirectory(scratch)
    for dataset in (DATASET | {name: {}}, {k: v for k, v in DATASET.items() if k != name}):
        run.write_info(dataclasses.replace(INFO, dataset=dataset))
        with pytest.raises(UserError, match="dataset"):
            run.info()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[]", b"{}", b'{"config": 1}'])
def test_a_missing_or_damaged_run_json_is_refused(scratch, content):
    if content is not None:
        (scratch / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json"):
        RunDirectory(scratch).info()


def test_damaged_arrays_are_refused_by_name(scratch):
    run = RunDirectory.create(scratch / "run")
    with pytest.raises(UserError, match="missing"):
        run.step_losses("batch", 1)
    run.write_bytes("step_losses/batch-1.npy", b"rubbish")
    run.write_bytes("predictions/batch-1.npz", b"PK rubbish")
    for read in (run.step_losses, run.predictions):
        with pytest.raises(UserError, match="damaged"):
            read("batch", 1)
    run.write_arrays("predictions/batch-1.npz", {"logits": np.ones(3)})
    with pytest.raises(UserError, match="damaged"):
        run.predictions("batch", 1)


def test_a_failed_write_leaves_the_old_file_and_no_other(scratch, monkeypatch):
    run = RunDirectory.create(scratch / "run")
    run.write_bytes("a.txt", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_bytes("a.txt", b"new")
    assert {each.name: each.read_bytes() for each in run.path.iterdir()} == {"a.txt": b"old"}


def single(path, norm, seed=1, **changes):
    run = RunDirectory.create(path)
    config = Config(norm=norm, seed=seed)
    info = dataclasses.replace(INFO, config=config, parameters={norm: 7}, command=f"{norm} {seed}")
    info = dataclasses.replace(info, **changes)
    run.write_info(info)
    for net in info.config.nets:
        run.append_epoch(epoch(1, net[0], seed=net[1]))
        run.write_step_losses(*net, np.full(2, net[1], np.float32))
        run.write_predictions(*net, np.ones((2, 3), np.float32), np.zeros(2, np.int32))
    return run


def test_runs_of_three_norms_become_one(scratch):
    runs = [single(scratch / norm, norm) for norm in ("batch", "layer", "group")]
    target = RunDirectory.create(scratch / "all")
    target.take(runs)
    assert target.info().config == Config(norm="all")
    assert target.info().parameters == {"batch": 7, "group": 7, "layer": 7}
    assert target.info().command == "batch 1; layer 1; group 1"
    assert [each.norm for each in target.epochs()] == ["batch", "group", "layer"]
    for norm in ("batch", "group", "layer"):
        assert target.step_losses(norm, 1).shape == (2,)
        assert target.predictions(norm, 1)[0].shape == (2, 3)


def test_runs_of_several_seeds_become_one(scratch):
    three = {"batch": 7, "group": 7, "layer": 7}
    pair = single(scratch / "p", "all", config=Config(seed=6, seeds=2), parameters=three)
    singles = [single(scratch / norm, norm, 5) for norm in ("group", "batch", "layer")]
    target = RunDirectory.create(scratch / "all")
    target.take([pair, *singles])
    config = target.info().config
    assert config == Config(seed=5, seeds=3)
    assert [(each.norm, each.seed) for each in target.epochs()] == config.nets
    for norm, seed in config.nets:
        np.testing.assert_array_equal(target.step_losses(norm, seed), [seed, seed])
    alone = RunDirectory.create(scratch / "batch alone")
    alone.take([singles[1], single(scratch / "next", "batch", 6)])
    assert alone.info().config == Config(norm="batch", seed=5, seeds=2)


def test_runs_that_differ_in_more_than_norm_and_seed_stay_apart(scratch):
    batch, group = single(scratch / "b", "batch"), single(scratch / "g", "group")
    others = [
        single(scratch / "a", "layer", config=Config(norm="layer", arch="matched")),
        single(scratch / "h", "layer", config=Config(norm="layer", validation=1)),
        single(scratch / "d", "layer", dataset=DATASET | {"fingerprint": "y"}),
        single(scratch / "v", "layer", versions={"jax": "2"}),
        single(scratch / "r", "layer", git_revision="abc"),
    ]
    for number, other in enumerate(others):
        with pytest.raises(UserError, match="more than the norm and the seed"):
            RunDirectory.create(scratch / str(number)).take([batch, group, other])
    for number, runs in enumerate(
        ([batch, group], [batch, single(scratch / "3", "batch", 3)], [batch, batch])
    ):
        with pytest.raises(UserError, match=r"the same seeds|in two of the runs"):
            RunDirectory.create(scratch / f"x{number}").take(runs)
