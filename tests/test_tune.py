"""The command that tunes: the same drawn trials for each norm, judged on held-out images."""

from functools import partial

import helpers
import numpy as np
import pytest
from helpers import error_of

from jaxnorm import tune
from jaxnorm.analysis import sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.storage.sweep import Sweep
from jaxnorm.tune import Trials

call = partial(helpers.call, app=tune.app)
FLAGS = ("--dataset", "tiny", "--arch", "three-layers", "--epochs", "1", "--batch-size", "25")
FLAGS += ("--norm", "batch,layer", "--validation", "20", "--trials", "3")
FLAGS += ("--skip-self-check", "--quiet")


def test_trials_are_drawn_by_the_seed_one_in_each_part_of_the_range():
    rates = Trials(12, 0.01, 1.0).draw(3)
    assert rates == Trials(12, 0.01, 1.0).draw(3) != Trials(12, 0.01, 1.0).draw(4)
    parts = np.floor(12 * np.log(np.array(rates) / 0.01) / np.log(100))
    assert parts.tolist() == list(range(12))


def test_every_norm_has_the_same_trials_and_the_best_on_held_out_images_wins(
    scratch, tiny_by_name, capsys
):
    out = scratch / "t"
    assert call(*FLAGS, "--highest", "0.1", "--out", out) == 0
    runs = [Run(directory) for directory in Sweep.open(out).directories]
    assert [run.info.config.learning_rate for run in runs] == Trials(3, 0.01, 0.1).draw(1)
    table = sweeps.tuning(runs)
    assert [row[0] for row in table.rows] == ["batch", "layer"]
    for row in table.rows:
        last = [run.epochs[row[0], 1][-1].validation_accuracy for run in runs]
        assert row[2] == f"{max(last):.2%}"
        best = runs[int(np.argmax(last))].info.config.learning_rate
        assert row[1].split(" (")[0] == f"{best:g}"
    every = sweeps.every_trial(runs)
    for run, row in zip(runs, every.rows, strict=True):
        ends = [run.epochs[norm, 1][-1].validation_accuracy for norm in run.info.config.norms]
        assert row == [run.info.config.rate_text, *(f"{end:.2%}" for end in ends)]
    assert (out / "tuning.md").read_text() == f"{table.markdown()}\n{every.markdown()}"
    for name in ("learning-rate", "best-of-k"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert all((run.directory.path / "examples.npz").exists() for run in runs)
    assert call("--resume", out, "--quiet") == 0
    assert table.plain() in capsys.readouterr().out


def test_summary_prints_the_layer_tables_and_trains_nothing(scratch, capsys):
    assert call("--summary", "--norm", "layer", "--out", scratch / "t") == 0
    assert capsys.readouterr().out.split()[-2:] == ["total", "46,412"]
    assert not (scratch / "t").exists()


@pytest.mark.parametrize(
    ("flags", "count"), [((), 5_000), (("--dataset", "digits"), 144), (("--validation", "7"), 7)]
)
def test_a_tenth_of_the_training_images_is_held_out(flags, count, monkeypatch):
    begun = []
    monkeypatch.setattr(tune.run, "start", lambda configs, *_, tunes: begun.extend(configs) or 0)
    assert call(*flags) == 0
    assert {config.validation for config in begun} == {count}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trials", "0"), "--trials 0 is wrong"),
        (("--lowest", "2"), "--lowest 2"),
        (("--seed", "-1"), "--seed -1 is wrong"),
        (("--learning-rate", "0.1"), "--learning-rate"),
        (("--weight-decay", "0", "0.001"), "--weight-decay 0.0 0.001: a tuning takes one value"),
        (("--resume", "t", "--trials=12"), "--trials conflicts with --resume"),
        (("--trials", "1000"), "--trials 1000 has 847 different learning rates of three digits"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert call(*arguments) == 2
    assert message in error_of(capsys)
