"""Sentences from records: the numbers are those of the made-up sweep, worked out by hand."""

import dataclasses

import numpy as np
import pytest
from helpers import cells

from jaxnorm.analysis import findings, stats, tables
from jaxnorm.analysis.results import Run
from jaxnorm.config import ALL

ALIKE = {"batch": tuple((5, 10 + seed % 4 * 3) for seed in range(8)), "group": ((5, 16),) * 8}


@pytest.mark.parametrize(
    ("started", "later"),
    [("2026-11-28T23", ", a margin fixed after the run"), ("2027-01-01T00", "")],
)
def test_equivalence_says_if_its_margin_was_not_fixed_beforehand(
    sweep, monkeypatch, started, later
):
    monkeypatch.setattr(stats, "MARGIN", 0.5)
    directory = sweep(accuracies=ALIKE, seeds=8, norm="batch,group")
    info = directory.info()
    environment = dataclasses.replace(info.environment, started=started)
    directory.write_json("run.json", dataclasses.replace(info, environment=environment))
    run = Run(directory)
    (p,) = [pair.equivalence_p for pair in run.differences if pair.equivalent]
    told = f"batch and group norm (p {p:.2g} after Holm) are equivalent within 0.5 points{later}."
    assert findings.headline(run).endswith(f"; {told}")
    assert f" By two one-sided tests {told}" in findings.finding(run)


def test_the_finding_says_what_so_many_seeds_would_show(sweep):
    assert "n = 3 would show" not in findings.finding(Run(sweep()))
    text = findings.finding(Run(sweep("eight", accuracies=ALIKE, seeds=8, norm="batch,group")))
    # -6, -3, 0, 3 of 22, twice: their squares about the mean add up to 90, the variance is 90/7
    smallest = 100 * stats.smallest_effect(8, stats.LEVEL / 3) * (90 / 7) ** 0.5 / 22
    assert f"n = 8 would show a difference of, in points, {smallest:.2f} between batch" in text


def test_the_finding_says_n_and_intervals_and_what_it_does_not_show(made_up, sweep):
    text = findings.finding(made_up)
    assert text.startswith(
        "With one net in which only the norm differs, batch norm ends at 72.7% (95% interval 50.1 "
        "to 95.3), group norm at 69.7%"
    )
    assert "(n = 3 seeds each, tiny)" in text
    # batch - group: 1, 2, -1 of 22: mean 2/3, deviation sqrt(7/3): half 3.794591
    minus = "\N{MINUS SIGN}"
    wanted = f"its 95% interval is {minus}14.22 to +20.28 points (n = 3, too few to show any)."
    assert wanted in text
    assert text.count("No difference between") == 3
    assert "no p-value under 0.25" in text
    residual = findings.finding(Run(sweep("residual", arch="residual", seeds=1)))
    assert residual.startswith("With one net in which only the norm differs, ")


def test_the_finding_names_the_differences_that_are_shown(sweep):
    """Layer norm 5 of 22 above batch norm in every one of seven seeds: p = 2/128, thrice that after
    Holm; of group and batch norm, 1 or 0 of 22.
    """
    ten = [(5, 10 + seed % 2) for seed in range(7)]
    rows = {"batch": ten, "group": [(5, 10)] * 7, "layer": [(5, n + 5) for _, n in ten]}
    run = Run(sweep(accuracies=rows, seeds=7, arch="original"))
    text = findings.finding(run)
    assert text.startswith("With the study's own nets, which differ in more than the norm, ")
    wanted = "layer norm is above batch norm by 22.7 points (22.7 to 22.7, n = 7, p 0.047 after"
    assert wanted in text
    assert "layer norm is above group norm by 24.7 points (22.4 to 26.9, n = 7" in text
    first, second = findings.headline(run).split(". Paired by seed, ")
    assert text.startswith(first)
    assert second.startswith("layer norm is above batch norm by 22.7 points (22.7 to 22.7, n = 7,")
    assert second.endswith("; no difference between batch and group norm is shown (n = 7).")
    assert "No difference between batch and group norm is shown" in text
    assert "enough to show a difference, which takes a p-value under 0.05." in text


@pytest.mark.parametrize("seeds", [2, 3])
def test_few_seeds_show_nothing_however_equal_their_differences_are(sweep, seeds):
    rows = {norm: ((5, right),) * seeds for norm, right in (("batch", 16), ("group", 15))}
    text = findings.finding(Run(sweep(accuracies=rows, seeds=seeds, norm="batch,group")))
    assert "is above" not in text
    assert f"+4.55 to +4.55 points (n = {seeds}, too few to show any)" in text
    assert "no difference can be shown" in text


def test_norms_outside_of_the_family_have_intervals_and_no_verdict(sweep):
    rows = {"batch": ((5, 16),) * 8, "pixel": tuple((5, 11 + seed % 2) for seed in range(8))}
    run = Run(sweep(accuracies=rows, seeds=8, norm="batch,pixel"))
    text = findings.finding(run)
    assert "batch norm minus pixel norm is +20.45 points (95% interval +18.42 to +22.49" in text
    assert "is above" not in text
    assert "shown" not in text
    assert "other comparisons have intervals and no verdict." in text
    table = tables.differences(run)
    row = cells(table, "batch \N{MINUS SIGN} pixel")
    assert [row["p, exact sign flips"], row["p after Holm"]] == ["0.00781", "no verdict"]
    assert row["equivalence after Holm"] == "no verdict"
    assert "equivalent" not in text
    assert table.note.endswith("other comparisons have intervals and no verdict.")


@pytest.mark.parametrize(
    ("norms", "runs"), [(ALL, 400), ((*ALL, "pixel", "instance", "rms", "none"), 60)]
)
def test_what_is_not_there_is_rarely_said_to_be_above(norms, runs):
    """Of runs in which all norms are alike: at most 5 %, and three deviations of that."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(runs):
        accuracies = rng.normal(7_000, 60, (len(norms), 8)).round() / 10_000
        values = {norm: dict(enumerate(of)) for norm, of in zip(norms, accuracies, strict=True)}
        sentences = findings.compared(stats.differences(values, 10_000))
        wrong += any("is above" in sentence for sentence in sentences)
    assert wrong <= runs * 0.05 + 3 * (runs * 0.05 * 0.95) ** 0.5


def test_the_finding_says_which_learning_rates_were_not_tuned(sweep):
    own = ("own_norm:OwnNorm", "own_norm:InheritedNorm")
    rows = dict.fromkeys(("batch", *own), ((5, 9),))
    settings = {"accuracies": rows, "seeds": 1, "recipe": "tuned", "arch": "residual"}
    text = findings.finding(Run(sweep("a", norm=f"batch,{own[0]}", **settings)))
    assert text.startswith("With one net in which only the norm and its learning rate differ, ")
    not_tuned = "own_norm:OwnNorm norm 0.1 (not tuned)"
    assert f"Learning rates: batch norm 0.123 (tuned) and {not_tuned}." in text
    text = findings.finding(Run(sweep("b", norm=",".join(own), **settings)))
    assert text.startswith("With one net in which only the norm differs, ")
    assert f"{not_tuned} and own_norm:InheritedNorm norm 0.1 (not tuned)" in text
    same = Run(sweep("c", norm=f"batch,{own[0]}", learning_rate=0.1, **settings))
    assert "tuned" not in findings.finding(same)


def test_the_finding_says_how_many_nets_are_left_out(sweep):
    rows = {"batch": ((5, 9), (5, 9)), "group": ((5,), (5, 9))}
    text = findings.finding(Run(sweep(accuracies=rows, norm="batch,group", seeds=2)))
    assert "(n = 1/2 seeds each, 3 of 4 nets finished, tiny)" in text


def test_a_shown_difference_is_told_whatever_other_norms_lack(sweep):
    """Eight seeds of batch and group norm, and one of layer norm."""
    rows = {"batch": [(5, 18)] * 8, "group": [(5, 15 + seed % 2) for seed in range(8)]}
    rows["layer"] = [(5, 10), *[(5,)] * 7]
    text = findings.finding(Run(sweep(accuracies=rows, seeds=8)))
    assert "batch norm is above group norm by 11.4 points" in text
    assert "n = 8, p 0.023 after Holm" in text
    assert "With one seed there is no telling" in text
    assert "above layer" not in text


def test_an_unfinished_norm_says_so(sweep):
    run = Run(sweep(epochs=3))
    assert set(tables.results(run).rows[0][1:]) == {"no finished net"}
    for words in (findings.finding, findings.headline):
        assert words(run).startswith("No net is finished")


def test_nets_without_a_norm_are_called_so(sweep):
    rows = {"batch": ALIKE["batch"], "none": ALIKE["group"]}
    text = findings.finding(Run(sweep(accuracies=rows, norm="batch,none", seeds=8)))
    assert "none norm" not in text
    for words in (
        "no norm ends at",
        "batch norm minus no norm",
        "batch minus no norm",
        "for no norm",
    ):
        assert words in text
