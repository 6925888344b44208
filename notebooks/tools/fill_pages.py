"""Fills README.md and the pages from the results, so that no number is typed by hand.

    python notebooks/tools/fill_pages.py

Writes what stands between `<!-- table NAME -->` and `<!-- end -->`. NAME is a run's own name in
`results/`, that and "finding" or a table's name, "other norms" and that with "differences" or
"values", "tuning winners" or "tuning trials", the name of a sweep, or the name of a file that a
benchmark or a script beside this one wrote; "answer", "answer caption", "all norms", "learning
rates", "batch-size changes" and the findings of the last two are of `answer.py`, "mirror" is of
other people's runs, "faults" is what the fault harness wrote, "seeds needed" is of the tuned run.
It also draws the pictures of several runs: the front page's three, the curves of every norm,
accuracy against learning rate, and the two of the tunings.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import end_to_end
import interval_coverage
import profile_step
import running_averages
import search
from answer import RESULTS, Answer, runs_of

from jaxnorm.analysis import drawing, findings, sweeps, tables
from jaxnorm.analysis.results import Run, differences
from jaxnorm.analysis.tables import MINUS, Table, points
from jaxnorm.storage.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks" / "pages").glob("*.md"))]
RUNS = ("original", "matched", "tuned")
"""The runs that have tables and figures of their own."""
SWEEPS = ("batch-size",)
SHOWN = (tables.differences, tables.values, tables.evaluation, tables.calibration)
SHOWN += (tables.corruptions, tables.spreads)
DETECTED = 0.003
"""The difference for which the pages say how many seeds it takes."""
BENCHMARKS = ("speed", "scaling")
MARKED = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def texts() -> dict[str, str]:
    """What the pages can hold, by the name between the marks."""
    by_name, reference = {}, json.loads((RESULTS / "reference.json").read_text())
    for name in RUNS:
        run = Run(RunDirectory(RESULTS / name))
        by_name[name] = tables.results(run).markdown()
        by_name[f"{name} finding"] = tables.escaped(findings.finding(run)) + "\n"
        for make in SHOWN:
            by_name[f"{name} {make.__name__}"] = make(run).markdown()
        by_name[f"{name} beside others"] = beside_others(run, reference).markdown()
    answer = Answer()
    by_name["other norms"] = joined([tables.results(run) for run in answer.others]).markdown()
    by_name["other norms values"] = by_seed(answer.others).markdown()
    apart = differences([answer.tuned, *answer.others])
    by_name["other norms differences"] = tables.paired(apart).markdown()
    deviations = tables.deviations(answer.tuned.differences)
    by_name["seeds needed"] = tables.seeds_needed(DETECTED, deviations).markdown()
    by_name["mirror"] = mirror(reference).markdown()
    by_name["answer"], by_name["answer caption"] = answer.finding(), answer.caption()
    by_name["all norms"] = answer.all_norms().markdown()
    by_name["learning rates"] = sweeps.every_trial(answer.rates).markdown()
    by_name["learning rates finding"] = answer.by_learning_rate() + "\n"
    by_name["batch-size changes"] = answer.table().markdown()
    by_name["batch-size finding"] = answer.by_batch_size() + "\n"
    for name in SWEEPS:
        by_name[name] = sweeps.results(runs_of(name)).markdown()
    by_name["tuning winners"] = sweeps.tuning(answer.tunings).markdown()
    by_name["tuning trials"] = sweeps.every_trial(answer.tunings).markdown()
    for name in BENCHMARKS:
        by_name[name] = speed(json.loads((RESULTS / f"{name}.json").read_text())).markdown()
    scripts = {"end-to-end": end_to_end, "profile": profile_step}
    scripts |= {"running-averages": running_averages, "coverage": interval_coverage}
    for name, script in scripts.items():
        by_name[name] = script.table(json.loads((RESULTS / f"{name}.json").read_text())).markdown()
    for name, make in (("faults", faults), ("search", search.table)):
        lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
        by_name[name] = make([json.loads(line) for line in lines]).markdown()
    return by_name


def fill(page: str, values: Mapping[str, str]) -> str:
    """A page with every marked place filled."""
    return MARKED.sub(lambda match: f"{match[1]}\n{values[match[2]]}\n{match[3]}", page)


def joined(parts: Sequence[Table]) -> Table:
    """The rows of tables with the same columns, and every note once."""
    rows = [row for part in parts for row in part.rows]
    notes = dict.fromkeys(part.note for part in parts)
    return Table(parts[0].title, parts[0].head, rows, " ".join(notes))


def by_seed(runs: Sequence[Run]) -> Table:
    """The last test accuracy of every net of these runs, a row a seed."""
    nets_of = {norm: nets for run in runs for norm, nets in run.summaries.items()}
    rows = []
    for seed in sorted({seed for nets in nets_of.values() for seed in nets}):
        cells = [f"{nets[seed].last:.2%}" if seed in nets else "" for nets in nets_of.values()]
        rows.append([str(seed), *cells])
    return Table("Every net: last test accuracy", ["seed", *nets_of], rows)


def beside_others(run: Run, reference: Mapping[str, Any]) -> Table:
    """A run of the study's own nets beside others' runs of them: best / last test accuracy."""
    head = ["norm", "ours"]
    for source in reference:
        head += [source, "ours minus it, points"]
    rows = []
    for norm in run.summaries:
        ours = (run.sample(norm, "best").mean, run.sample(norm).mean)
        row = [norm, f"{ours[0]:.2%} / {ours[1]:.2%}"]
        for norms in reference.values():
            if norm not in norms:
                row += ["none", ""]
                continue
            accuracies = norms[norm]["test_accuracy"]
            theirs = (max(accuracies), accuracies[-1])
            apart = (points(a - b) for a, b in zip(ours, theirs, strict=True))
            row += [f"{theirs[0]:.2%} / {theirs[1]:.2%}", " / ".join(apart)]
        rows.append(row)
    n = max((run.sample(norm).n for norm in run.summaries), default=0)
    note = f"Test accuracy, best / last epoch; theirs one run each, ours n = {n}: {run.data}."
    return Table("Beside others", head, rows, note)


def mirror(reference: Mapping[str, Any]) -> Table:
    """How far the one run of each net on the mirror ends below the one on official pixels."""
    (official, theirs), (jpeg, ours) = reference.items()
    rows = []
    for norm in theirs:
        runs = [source[norm]["test_accuracy"] for source in (theirs, ours)]
        apart = (points(pick(runs[1]) - pick(runs[0])) for pick in (max, lambda run: run[-1]))
        rows.append([norm, " / ".join(apart)])
    head = ["norm", f"{jpeg} {MINUS} {official}, points"]
    return Table("The mirror", head, rows, "Best / last test accuracy; one run each, n = 1.")


def speed(values: Mapping[str, Any]) -> Table:
    """A written benchmark as a table, a row a comparison, and what it was measured on."""
    comparisons = values["comparisons"]
    against = any("ratio" in comparison for comparison in comparisons)
    head = ["net", "batch", "ours, ms", "share of ceiling"]
    head += ["PyTorch's best, ms", "ours is times as fast"] if against else []
    head += ["first step, cold / warm, s", "peak MB"]
    rows, rounds, versions = [], [], {}
    for comparison in comparisons:
        sides, ratio = comparison["sides"], comparison.get("ratio")
        ours = sides["jaxnorm"]
        rounds.append(len(ours["samples_milliseconds"]))
        for side in sides.values():
            versions |= {name: side["about"].get(name) for name in ("jax", "torch")} | {
                name: version for name, version in versions.items() if version
            }
        task = "" if comparison["task"] == "train" else ", evaluation of 10,000"
        row = [
            f"{comparison['arch']} {comparison['norm']}{task}",
            str(comparison["batch_size"]),
        ]
        row += [f"{ours['milliseconds']:.1f}", f"{ours['share_of_ceiling']:.0%}"]
        peak = f"{ours['peak_megabytes']:.0f}"
        if against and ratio:
            best = sides[ratio["against"]]
            each = zip(best["samples_milliseconds"], ours["samples_milliseconds"], strict=True)
            ratios = [theirs / our for theirs, our in each]
            low, high = min(ratios), max(ratios)
            row.append(f"{best['milliseconds']:.1f} ({ratio['against']})")
            row.append(f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})")
            peak += f" / {best['peak_megabytes']:.0f} PyTorch"
        start = f"{ours['first_step_seconds']:.1f} / {ours['warm_first_step_seconds']:.1f}"
        rows.append([*row, start, peak])
    machine = values["machine"]
    ceiling = machine["matrix_product_gflop_per_second"]
    cores = "" if "cores" in machine["processor"] else f", {machine['cores']} cores"
    note = (
        f"Medians over {' to '.join(map(str, sorted({min(rounds), max(rounds)})))} rounds in turns"
        + (", the ratio within each round (lowest to highest)" if against else "")
        + f"; {machine['processor']}{cores}, ceiling {ceiling:.0f} GFLOP/s (a "
        f"2048 x 2048 matrix product); Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"; {machine['when'][:10]}."
    )
    return Table("Speed", head, rows, note)


def faults(tries: Sequence[Mapping[str, Any]]) -> Table:
    """What the fault harness found: a row for each kind of fault and the part of a run, or the file
    of it, that was hit.
    """
    head = ["what was done to it", "when, or in what", "tries", "complete epochs lost"]
    head, rows = [*head, "same bits at the end"], []
    for kind, where in dict.fromkeys((one["kind"], one["where"]) for one in tries):
        same_kind = [one for one in tries if (one["kind"], one["where"]) == (kind, where)]
        lost = sum(one["complete"] - one["kept"] for one in same_kind)
        same = sum(one["same"] for one in same_kind)
        rows.append([kind, where, str(len(same_kind)), str(lost), f"{same} of {len(same_kind)}"])
    return Table("Faults", head, sorted(rows))


if __name__ == "__main__":
    values = texts()
    for path in PAGES:
        path.write_text(fill(path.read_text(), values))
    answer = Answer()
    for name, figure in answer.figures().items():
        (RESULTS / f"{name}.png").write_bytes(drawing.png(figure))
    for name, figure in sweeps.draw_tuning(answer.tunings):
        (RESULTS / "tuning" / f"{name}.png").write_bytes(drawing.png(figure))
