"""What several runs say together, by made-up sweeps."""

import dataclasses

import numpy as np
import pytest

from jaxnorm.analysis import sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.config import NORMS


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
    ((_, best, accuracy, half, near, failed),) = sweeps.tuning(runs).rows
    assert (best, accuracy, near, failed) == ("0.04 (the highest)", "90.91%", "1 of 3", "0 of 3")
    assert half == f"{(5 + 9 + 20) / 66:.2%}"


def test_a_trial_is_the_mean_of_its_seeds(sweep):
    values = {"norm": "group", "epochs": 1, "seeds": 2, "learning_rate": 0.02}
    run = validated(Run(sweep(accuracies={"group": ((5,), (9,))}, **values)))
    (trial,) = sweeps.trials([run])["group"]
    assert trial == (0.02, pytest.approx(7 / 22), 2, 2)


def test_a_rate_does_not_win_by_its_survivors(sweep):
    """Of three nets at 0.9 two were lost and one is the best of all."""
    settings = {"norm": "group", "seeds": 3}
    whole = sweep("a", {"group": ((5, 9),) * 3}, learning_rate=0.1, **settings)
    lost = sweep("b", {"group": ((5,), (5, 20), (5,))}, learning_rate=0.9, **settings)
    runs = [validated(Run(directory)) for directory in (lost, whole)]
    (row,) = sweeps.tuning(runs).rows
    assert row == ["group", "0.1 (the lowest)", "40.91%", "20.45%", "1 of 2", "1 of 2"]
    trials = sweeps.every_trial(runs).rows
    assert trials == [["0.1", "40.91%"], ["0.9", "none (1 of 3 finished)"]]
    _, figure = next(sweeps.draw_tuning(runs))
    ((rate, accuracy), (_, gap)) = figure.axes[0].lines[0].get_xydata()
    assert (rate, accuracy) == (0.1, pytest.approx(9 / 22))
    assert np.isnan(gap)
    assert figure.get_supxlabel().endswith("n = 3 seeds (1 to 3), 4 of 6 nets finished")
    (row,) = sweeps.tuning(runs[:1]).rows
    assert row == ["group", "none", "none (1 of 3 finished)", "0.00%", "0 of 1", "1 of 1"]


def test_the_highest_trials_have_a_panel_of_their_own_if_another_ends_far_below(sweep):
    settings = {"norm": "group", "epochs": 1, "seeds": 1}
    for low, count in ((18, 1), (5, 2)):
        ends = {0.1: 20, 0.9: low}
        runs = [
            validated(Run(sweep(f"{low}-{r}", {"group": ((end,),)}, learning_rate=r, **settings)))
            for r, end in ends.items()
        ]
        _, figure = next(sweeps.draw_tuning(runs))
        assert len(figure.axes) == count
        for axes in figure.axes:
            np.testing.assert_allclose(axes.lines[0].get_ydata(), [20 / 22, low / 22])
        last = figure.axes[-1]
        assert last.get_legend() is not None
        assert (last.get_ylim()[0] > low / 22) == (count == 2)
        assert last.get_ylim()[1] > 20 / 22


def test_trials_of_many_norms_have_a_row_for_each_norm(sweep):
    norms = [*NORMS][:7]
    ends = {norm: ((9 + number,),) for number, norm in enumerate(norms)}
    settings = {"norm": ",".join(norms), "epochs": 1, "seeds": 1, "learning_rate": 0.1}
    table = sweeps.every_trial([validated(Run(sweep("many", ends, **settings)))])
    assert table.head == ["norm, learning rate", "0.1"]
    assert table.rows == [[norm, f"{(9 + number) / 22:.2%}"] for number, norm in enumerate(norms)]


def test_a_tuning_with_linear_scaling_names_the_rates_that_a_command_takes(sweep):
    settings = {"learning_rate": 0.1, "linear_scaling": True, "batch_size": 64}
    run = validated(Run(sweep(**settings)))
    assert sweeps.every_trial([run]).rows[0][0] == "0.1"
    assert "before they are multiplied by batch / 128" in sweeps.tuning([run]).note


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
    assert "n = 2 each unless the table says otherwise, mean" in table.note
    assert table.note.endswith(" Nets that are not counted diverged, or did not finish.")
