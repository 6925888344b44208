"""Words and tables from records: the numbers are those of the made-up sweep, worked out by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from helpers import cells, probes_of, rewrite_net

from jaxnorm.analysis import figures, findings, page, stats, tables
from jaxnorm.analysis.results import Run
from jaxnorm.config import ALL


def resumed(run, *changes):
    """The run, after its first net was trained on in environments that differ in these fields."""
    first = run.info.environment
    environments = [first, *(dataclasses.replace(first, **fields) for fields in changes)]
    text = json.dumps([dataclasses.asdict(one) for one in environments])
    rewrite_net(run.directory, run.info.config.nets[0], environments=text)
    return Run(run.directory)


def test_results_say_which_norms_activate(sweep):
    def run_of(*norms):
        accuracies = dict.fromkeys(norms, ((11, 16),))
        return Run(sweep("-".join(norms), accuracies, norm=",".join(norms), seeds=1))

    for norms, what in (
        (("layer", "frn"), "Norm and activation differ: frn has an activation of its own."),
        (("frn", "evonorm-s0"), "Norm and activation differ: frn and evonorm-s0 have activations"),
        (("layer", "dyt"), None),
    ):
        run = run_of(*norms)
        text = tables.results(run).note + findings.finding(run)
        assert what in text if what else "activation differ" not in text
        only = "only the norm and the activation of some differ," if what else "only the norm diff"
        assert only in text


def test_results_give_n_mean_deviation_and_intervals(made_up):
    table = tables.results(made_up)
    batch = cells(table, "batch")
    # 16, 18, 14 of 22: mean 16, deviation 2; t 4.302653 x 2 / sqrt 3 = 4.968276 of 22 = 22.58 %
    assert batch["n"] == "3"
    assert batch["last test"] == "72.73% \N{PLUS-MINUS SIGN} 9.09"
    assert batch["95% t interval"] == "50.14 to 95.31"
    assert batch["95% bootstrap"] == "63.64 to 81.82"
    assert batch["last train"] == "68.18% \N{PLUS-MINUS SIGN} 9.09"
    assert batch["first epoch at 70%"] == "2, never in 1 of 3"
    assert "tiny; matched nets, 2 epochs, batch 16, n = 3 seeds (1 to 3)" in table.note


def test_one_seed_has_no_interval_and_names_the_best_epoch(sweep):
    run = Run(sweep(seeds=1))
    table = tables.results(run)
    best = "best of 2 on test (the study's rule)"
    assert table.head[:4] == ["norm", "parameters", "last test", "last train"]
    assert table.head[4:] == [best, "first epoch at 70%"]
    assert cells(table, "batch")[best] == "72.73% (epoch 2)"
    assert "seed 1, n = 1" in table.note
    for text in (findings.finding(run), findings.headline(run)):
        assert "n = 1, one run of each" in text
        assert "No difference between" not in text
        assert "no telling a difference" in text


def test_results_say_how_many_images_were_held_out(sweep):
    run = Run(sweep(validation=4, norm="batch", seeds=1))
    assert ", 4 training images held out," in tables.conditions(run)


def test_two_seeds_have_a_deviation_and_an_interval_ends_where_accuracies_do(sweep):
    rows = dict.fromkeys(("batch", "group", "layer"), ((1, 22), (1, 20)))
    table = tables.results(Run(sweep(accuracies=rows, seeds=2)))
    # 22, 20 of 22: mean 21, deviation sqrt 2; t 12.706205 x sqrt 2 / sqrt 2 = 57.755 % on each side
    assert cells(table, "batch")["95% t interval"] == "37.70 to 100.00"
    assert "n = 2 seeds (1 to 2), mean \N{PLUS-MINUS SIGN} standard deviation;" in table.note


def test_of_many_norms_the_differences_from_the_first_and_those_with_a_verdict_are_shown():
    others = [f"{number}" for number in range(3)]
    for norms in ([*ALL, *others], [*ALL, *others, "seventh"]):
        table = tables.paired(stats.differences({norm: {1: 0.5} for norm in norms}, 10))
        pairs = list(itertools.combinations(norms, 2))
        if len(norms) == 7:
            pairs = [*(pair for pair in pairs if "batch" in pair), ("group", "layer")]
        names = [f"{one} \N{MINUS SIGN} {other}" for one, other in pairs]
        assert [row[0] for row in table.rows] == names
        left_out = "14 differences between other norms than batch are left out" in table.note
        assert left_out == (len(norms) == 7)


def test_results_name_every_device_and_version_that_trained_them(sweep):
    run = Run(sweep())
    first = run.info.environment
    later = {"device": "gpu x8", "versions": {**first.versions, "flax": "9.9"}}
    note = tables.results(resumed(run, {}, later)).note
    versions = {name: first.versions[name] for name in ("jax", "flax", "optax")}
    assert f"; {first.device} and gpu x8; jax {versions['jax']}, " in note
    assert note.endswith(f"flax {versions['flax']} and 9.9, optax {versions['optax']}.")


def test_differences_by_hand(made_up):
    table = tables.differences(made_up)
    row = cells(table, "group \N{MINUS SIGN} layer")
    # 3, 5, 2 of 22: mean 10/3, deviation sqrt(7/3); x 4.302653 / sqrt 3 = 3.794591
    assert row["mean, points"] == "+15.15"
    assert row["95% t interval"] == "\N{MINUS SIGN}2.10 to +32.40"
    assert row["95% bootstrap"] == "+9.09 to +22.73"
    assert row["p, exact sign flips"] == "0.25"
    assert row["p after Holm"] == "0.75"
    assert "no p-value under 0.25 exists" in table.note


def test_differences_over_images_are_of_the_predictions(sweep):
    run = Run(sweep())
    right = [
        np.array([(run.predictions[norm, seed].predicted == run.labels) for seed in (1, 2, 3)])
        for norm in ("group", "layer")
    ]
    both = stats.crossed(right[0].astype(np.int8) - right[1])
    row = cells(tables.differences(run), "group \N{MINUS SIGN} layer")
    assert row["95% over seeds and images"] == " to ".join(map(tables.points, both.interval))
    assert row["p, equivalent within 0.5"] == f"{both.equivalence_p:.3g}"
    assert row["equivalence after Holm"] == "1"
    # Mean 10/3 of deviation sqrt(7/3) sqrt(1 + 1/3): 1.890; t of 2 degrees of freedom: 90 %
    assert row["next net above"] == "90%"
    text = findings.finding(run)
    low, high = map(tables.points, both.interval)
    assert f"group minus layer norm is +15.15 points ({low} to {high})." in text
    assert "and 90% that group norm beats layer norm." in text
    assert "By two one-sided tests no two norms are found to be equivalent within 0.5" in text


def test_without_predictions_the_differences_are_of_seeds_alone(sweep):
    directory = sweep()
    rewrite_net(directory, ("layer", 1), logits=None, labels=None)
    run = Run(directory)
    row = cells(tables.differences(run), "batch \N{MINUS SIGN} group")
    assert row["95% over seeds and images"] == row["p, equivalent within 0.5"] == "not known"
    assert row["equivalence after Holm"] == "not known"
    assert not tables.spreads(run).rows
    text = findings.finding(run)
    assert "that batch norm beats group norm" in text
    assert not [
        word for word in ("other test images", "one-sided", "deviation over") if word in text
    ]


def test_a_probability_is_0_or_100_percent_only_if_it_is():
    texts = [tables.chance(p) for p in (None, 0.0, 0.004, 0.006, 0.994, 0.996, 1.0)]
    assert texts == ["none: n = 1", "0%", "<1%", "1%", "99%", ">99%", "100%"]


def test_the_spread_over_seeds_is_in_points(sweep):
    run = Run(sweep())
    table = tables.spreads(run)
    # 16, 18, 14 of 22: deviation 2 of 22
    spread = stats.spread(np.array(list(run.correct["batch"].values())))
    batch = cells(table, "batch")
    assert (batch["n"], batch["deviation, points"]) == ("3", "9.09")
    assert batch["if errors were independent"] == f"{100 * spread.independent:.2f}"
    lefts = [row[-1] for row in table.rows]
    assert "nothing" in lefts  # 1.2 of 22 under layer norm, of which most images are wrong at times
    text = findings.finding(run)
    assert "The deviation over seeds is, in points, 9.09 for batch norm, " in text
    assert text.split("which leaves ")[1].startswith(f"{lefts[0]}, {lefts[1]} and {lefts[2]}.")
    assert not tables.spreads(Run(sweep("one", seeds=1))).rows


def test_the_seeds_needed_by_the_deviation_of_each_pair(sweep):
    differences = Run(sweep()).differences
    found = tables.deviations([*differences])
    assert list(found.values()) == [pair.sample.deviation for pair in differences]
    minus = "\N{MINUS SIGN}"
    assert list(found) == [f"batch {minus} group", f"batch {minus} layer", f"group {minus} layer"]
    table = tables.seeds_needed(0.005, {"a": 0.01, "b": None, "c": 0.0, "d": 0.99})
    assert table.head[2:] == [
        *("t test, p < 0.05", "sign flips, p < 0.05"),
        *("t test, p < 0.017", "sign flips, p < 0.017"),
    ]
    assert cells(table, "a")["t test, p < 0.05"] == "34"
    assert [row[1] for row in table.rows] == ["1.00", "none: n = 1", "0.00", "99.00"]
    assert table.rows[1][2:] == table.rows[2][2:] == ["not known"] * 4
    assert table.rows[3][2:] == ["over 1,000"] * 4
    assert "find a difference of 0.5 points with a probability of 80%" in table.note


def test_values_hold_every_net(made_up):
    table = tables.values(made_up)
    assert table.rows[1] == ["2", "81.82% / 81.82%", "72.73% / 72.73%", "50.00% / 50.00%"]


def test_runs_stand_side_by_side(made_up, sweep):
    runs = [("a", made_up), ("b", Run(sweep("b", norm="group", seeds=1)))]
    table = tables.side_by_side(runs)
    assert cells(table, "a")["group"] == "69.70% \N{PLUS-MINUS SIGN} 2.62 (n = 3)"
    assert cells(table, "b")["group"] == "68.18% (n = 1)"
    assert cells(table, "b")["batch"] == ""


def test_facts_are_all_that_is_needed_to_repeat_it(made_up):
    values = {row[0]: row[1] for row in tables.facts(made_up).rows}
    assert values["command"] == "python -m x"
    assert values["seeds"] == "3"
    assert values["data SHA-256"] == made_up.info.dataset.fingerprint
    assert values["data verified"] == "yes, by its checksum"
    assert values["time"].startswith("0.9 minutes")  # 18 epochs of 3 s


def test_facts_say_what_was_not_as_at_the_start_when_it_was_resumed(sweep):
    noon = {"started": "noon", "self_check": "passed"}
    night = {"started": "night", "device": "gpu x8", "git_revision": "0"}
    values = {row[0]: row[1] for row in tables.facts(resumed(Run(sweep()), noon, night)).rows}
    same, other = values["resumed"].split("; ")
    assert same == "noon, self-check passed"
    assert other == "night, other device and git revision, self-check not made"


def test_parameters_are_the_layers_of_every_norm(made_up):
    table = tables.parameters(made_up)
    size = "30\N{MULTIPLICATION SIGN}30\N{MULTIPLICATION SIGN}16"
    assert table.rows[0][:5] == ["C1", size, "3", "432", "32"]
    assert table.rows[-1][0] == "total"
    assert table.rows[-1].count("45,584") == 3


def test_no_module_that_a_run_names_is_imported(sweep, scratch, monkeypatch):
    """A run may come from anybody. If it records no layers of a norm, there is no table of them."""
    (scratch / "named_by_the_run.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(scratch)
    run, norm = Run(sweep()), "named_by_the_run:Norm"
    config = dataclasses.replace(run.info.config, norm=f"group,{norm}")
    parameters = {**run.info.parameters, norm: 1_234_567}
    info = dataclasses.replace(
        run.info, config=config, parameters=parameters, layers={**run.info.layers, norm: []}
    )
    run.directory.write_json("run.json", info)
    monkeypatch.setattr(figures, "FIGURES", ())
    part = page.read(run.directory)
    assert len(part.missing) == 3
    for seed, line in enumerate(part.missing, 1):
        assert line.startswith(f"{norm} norm, seed {seed}: 2 of 2 epochs are missing")
    assert "results" in part.tables
    assert "parameters" not in part.tables
    layers = {**info.layers, norm: info.layers["layer"]}
    run.directory.write_json("run.json", dataclasses.replace(info, layers=layers))
    first, *_, total = tables.parameters(Run(run.directory)).rows
    assert first[5:] == [*first[1:3], "432", "32"]
    assert total[4::4] == ["45,584", "1,234,567"]


@pytest.mark.parametrize("name", ["a|b", "a\nb", "<b>", "`c`", "[x](y)", "*", "_i_", "\\"])
def test_text_cannot_break_out_of_a_markdown_table(name):
    text = tables.Table("t", ["x", name], [[name, "1"]], name).markdown()
    lines = text.splitlines()
    assert len(lines) == 5
    for line in lines[:3]:
        assert line.replace("\\\\", "").replace("\\|", "").count("|") == 3
    assert "<b>" not in text.replace("\\<b\\>", "")


def test_evaluation_by_other_statistics_is_of_the_norms_that_have_any(sweep):
    directory = sweep()
    anew = {row[0]: row[3] for row in tables.evaluation(Run(directory)).rows}
    assert anew == {"batch": "60.00%", "group": "not computed", "layer": "not computed"}
    same = {"batch_accuracy": np.full(2, 0.5, "f4"), "precise_accuracy": np.float32(0.5)}
    for norm in ("group", "layer"):
        rewrite_net(directory, (norm, 1), "probes", **same)
    table = tables.evaluation(Run(directory))
    ((norm, n, running, precise, *by_size),) = table.rows
    assert (norm, n, running, precise) == ("batch", "1", "50.00%", "60.00%")
    measured = probes_of(directory, ("batch", 1))["batch_accuracy"]
    assert by_size == [f"{accuracy:.2%}" for accuracy in measured]
    assert table.head[4:] == ["batches of 4", "batches of 16"]


def test_a_class_without_test_images_has_no_accuracy(sweep, tiny):
    names = (*tiny.class_names, "never drawn")
    run = Run(sweep())
    info = dataclasses.replace(run.info.dataset, class_names=list(names))
    for net, made in run.predictions.items():
        wider = np.pad(made.logits, ((0, 0), (0, 1)), constant_values=-100)
        rewrite_net(run.directory, net, logits=wider)
    run.directory.write_json("run.json", dataclasses.replace(run.info, dataset=info))
    *rows, empty = tables.classes(Run(run.directory)).rows
    wanted = tables.classes(Run(sweep("other"))).rows
    assert rows == wanted
    assert empty == ["never drawn", "none", "none", "none"]


def test_calibration_is_of_every_seed(made_up):
    batch = cells(tables.calibration(made_up), "batch")
    made = [stats.probabilities(made_up.predictions["batch", seed].logits) for seed in (1, 2, 3)]
    errors = [stats.calibration_error(probabilities, made_up.labels) for probabilities in made]
    assert batch["n"] == "3"
    assert batch["calibration error"] == stats.accuracy_text(stats.Sample(tuple(errors)))


def test_accuracy_on_corrupted_images_is_of_every_measured_seed(sweep):
    directory = sweep()
    first = probes_of(directory, ("group", 1))
    second = {**first, "corrupted_accuracy": first["corrupted_accuracy"] / 2}
    directory.write_arrays("nets/group-2/probes.npz", **second)
    group = cells(tables.corruptions(Run(directory)), "group")
    assert (group["n"], group["none"]) == ("2", "50.00% \N{PLUS-MINUS SIGN} 0.00")
    assert group["noise"].startswith(f"{0.75 * first['corrupted_accuracy'][0]:.2%}")
    assert group["blur"].startswith(f"{0.75 * first['corrupted_accuracy'][1]:.2%}")


@pytest.mark.parametrize(("counts", "shown"), [((3, 5), [5]), ((3, 7), [3, 7]), ((7, 7), [7])])
def test_what_the_most_pairs_cannot_show_is_not_said_of_fewer(counts, shown):
    seeds = [dict.fromkeys(range(n), 0.5) for n in counts]
    values = {"batch": seeds[1], "group": seeds[1], "layer": seeds[0]}
    note = tables.paired(stats.differences(values, 10)).note
    assert [n for n in range(1, 9) if f"With {n} paired" in note] == shown
