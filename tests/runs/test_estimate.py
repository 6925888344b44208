"""The plan: by a clock on which everything takes two seconds, and by hand."""

import itertools
from types import SimpleNamespace

import pytest

from jaxnorm.config import Config
from jaxnorm.runs import estimate
from jaxnorm.training.mesh import MeshShape

CONFIG = Config("layer", "three-layers", "tiny", 3, 14, seeds=4)


def test_rounds_steps_and_epochs_multiply(tiny, monkeypatch):
    """Four nets on two devices are two rounds of three epochs of five steps; each of the two nets
    of a round is written by itself.
    """
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    shown = []
    arguments = [CONFIG], tiny, MeshShape(2), lambda *at: shown.append(at)
    (plan,) = estimate.estimate(*arguments)
    row = dict(zip(estimate.COLUMNS, plan.row, strict=True))
    assert int(row.pop("memory, MB").replace(",", "")) > 0
    assert list(row.values()) == [
        *("layer", "14", "4", "2", "seed=2,batch=1", "2 x 15", "2000.0", "2000.0", "4000.0"),
        *("60 s", "36 s"),
    ]
    assert (plan.training, plan.rest) == (2 * 15 * 2, 2 * 3 * (2 + 2 * 2))
    assert shown == [("planning", done, 12) for done in range(12)]
    (left,) = estimate.estimate(*arguments, finished={(0, "layer", 1), (0, "layer", 2)})
    assert (left.training, left.rest) == (30, 18)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (130, "2 min"), (6000, "1.7 h")]
)
def test_a_length_of_time_is_for_a_person(seconds, text):
    assert estimate.duration(seconds) == text
