"""What several runs say together, by made-up sweeps."""

import dataclasses

import pytest

from jaxnorm.analysis import sweeps
from jaxnorm.analysis.results import Run


def validated(run: Run) -> Run:
    """The run, as if its nets had been tested on held-out images alone."""
    for nets in run.summaries.values():
        for seed, net in nets.items():
            nets[seed] = dataclasses.replace(net, validation=net.last)
    return run


def test_an_optimum_on_the_edge_is_said(sweep):
    runs = []
    for rate, accuracy in ((0.01, 5), (0.02, 9), (0.04, 20)):
        values = {"norm": "group", "epochs": 1, "seeds": 1, "learning_rate": rate}
        directory = sweep(f"r{rate}", accuracies={"group": ((accuracy,),)}, **values)
        runs.append(validated(Run(directory)))
    ((_, best, accuracy, half, failed),) = sweeps.tuning(runs).rows
    assert (best, accuracy, failed) == ("0.04 (the highest)", "90.91%", "0")
    assert half == f"{(5 + 9 + 20) / 66:.2%}"


def test_a_trial_is_the_mean_of_its_seeds(sweep):
    values = {"norm": "group", "epochs": 1, "seeds": 2, "learning_rate": 0.02}
    run = validated(Run(sweep(accuracies={"group": ((5,), (9,))}, **values)))
    ((rate, accuracy),) = sweeps.trials([run])["group"]
    assert (rate, accuracy) == (0.02, pytest.approx(7 / 22))


def test_a_sweep_says_which_settings_differ(sweep):
    values = {"norm": "group", "seeds": 2, "accuracies": {"group": ((5, 9), (5, 9))}}
    runs = [Run(sweep(f"{decay}", weight_decay=decay, **values)) for decay in (0.0, 0.001)]
    table = sweeps.results(runs)
    assert table.head == ["batch", "learning rate", "weight decay", "group"]
    assert [row[:3] for row in table.rows] == [["16", "0.01", "0"], ["16", "0.01", "0.001"]]
    assert sweeps.results(runs[:1]).head == ["batch", "learning rate", "group"]


def test_a_sweep_says_how_many_nets_it_counts(sweep):
    """The second net of group norm stopped after its first epoch."""
    run = Run(sweep(accuracies={"group": ((5, 9), (5,))}, norm="group", seeds=2))
    table = sweeps.results([run, Run(sweep("whole", norm="group", seeds=2))])
    assert [row[2] for row in table.rows] == ["40.91% (1 of 2)", "70.45% \N{PLUS-MINUS SIGN} 3.21"]
    assert table.note.endswith(" Of nets that are not counted the loss was not finite.")
