"""What reports and the README say in words and tables, made from records: every number a person
reads is formatted here. A new table is one more function of `Run` that returns a `Table`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm import stats
from jaxnorm.config import Norm, UserError
from jaxnorm.records import RunInfo
from jaxnorm.results import Run

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and the others numbers, and a note that stands under it.

    Its cells are plain text: what a renderer must escape, it escapes.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """In Markdown, with the note and without the title."""
        lines = [self.head, ["---"] + ["--:"] * (len(self.head) - 1), *self.rows]
        text = "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)
        return text + (f"\n\n{escaped(self.note)}\n" if self.note else "\n")

    def plain(self) -> str:
        """For a terminal: columns in line, with the note and without the title."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )
        return text + (f"\n{self.note}" if self.note else "")


def escaped(text: str) -> str:
    """Text in which Markdown finds no mark-up, on one line."""
    for character in "\\|<>`*_[]":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def results(run: Run) -> Table:
    """A row a norm: the last epoch first, then the study's rule; and how it was measured."""
    several = run.info.config.seeds > 1
    validated = run.info.config.validation > 0
    head = ["norm", "parameters", *(["n"] if several else []), "last test"]
    head += ["95% t interval", "95% bootstrap"] if several else []
    head += ["test at the best validation"] if validated else []
    best_of = f"best of {run.info.config.epochs} on test (the study's rule)"
    head += ["last train", best_of, f"first epoch at {stats.TARGET:.0%}"]
    rows = []
    for norm in run.info.config.norms:
        if norm not in run.summaries:
            rows.append([norm, *["not trained yet"] * (len(head) - 1)])
            continue
        nets = list(run.summaries[norm].values())
        last = run.sample(norm)
        row = [norm, f"{run.info.parameters[norm]:,}", *([str(last.n)] if several else [])]
        row.append(stats.accuracy_text(last))
        if several:
            row += [_interval(last.interval), _interval(last.bootstrap_interval)]
        if validated:
            row.append(stats.accuracy_text(run.sample(norm, "chosen")))
        row.append(stats.accuracy_text(run.sample(norm, "train")))
        best = stats.accuracy_text(run.sample(norm, "best"))
        row.append(best if several else f"{best} (epoch {nets[0].best_epoch})")
        rows.append([*row, stats.epochs_to_target(nets)])
    return Table("Test accuracy", head, rows, conditions(run))


def conditions(run: Run) -> str:
    """The data, nets, epochs, seeds, device and versions of a run, in a line."""
    info, config = run.info, run.info.config
    of = ", ".join(f"{name} {info.versions.get(name, '?')}" for name in ("jax", "flax", "optax"))
    finished = f"{len(run.finished)} of {len(config.nets)} nets finished, "
    held_out = f"{config.validation} training images held out, " if config.validation else ""
    spread = ", mean \N{PLUS-MINUS SIGN} standard deviation" if config.seeds > 1 else ", n = 1"
    return (
        f"{info.dataset['caption']}; {config.arch} nets, {config.epochs} epochs, "
        f"{finished if len(run.finished) < len(config.nets) else ''}batch {config.batch}, "
        f"{held_out}{run.seeds_text}{spread}; {info.device}; {of}."
    )


def values(run: Run) -> Table:
    """Every raw value: a row a seed, the last and the best test accuracy of each norm."""
    norms = list(run.summaries)
    rows = []
    for seed in run.info.config.seed_numbers:
        nets = [run.summaries[norm].get(seed) for norm in norms]
        if any(nets):
            cells = [f"{net.last:.2%} / {net.best:.2%}" if net else "" for net in nets]
            rows.append([str(seed), *cells])
    return Table("Every net: last / best test accuracy", ["seed", *norms], rows)


def differences(run: Run) -> Table:
    """A row a pair of norms: the paired difference, its intervals and what the sign flips say."""
    head = ["difference", "pairs", "mean, points", "95% t interval", "95% bootstrap"]
    head += ["p, exact sign flips", "p after Holm"]
    rows = []
    for each in run.differences:
        sample = each.sample
        row = [f"{each.first} {MINUS} {each.second}", str(sample.n), points(sample.mean)]
        row += [_points_interval(sample.interval), _points_interval(sample.bootstrap_interval)]
        rows.append([*row, f"{each.p:.3g}", f"{each.adjusted_p:.3g}"])
    note = (
        "Differences of last test accuracies between nets of the same seed; the intervals are not "
        "corrected for there being several. "
        + stats.what_n_can_show(_pairs(run), max(1, len(run.differences)))
    )
    return Table("Paired differences", head, rows, note)


def _pairs(run: Run) -> int:
    return min((each.sample.n for each in run.differences), default=1)


def finding(run: Run) -> str:
    """What the run found, in a sentence or two with n and intervals, and what it does not show."""
    if not run.summaries:
        return "No net is finished yet, so nothing is found."
    config, found = run.info.config, run.summaries
    ranked = sorted(found, key=lambda norm: -run.sample(norm).mean)
    texts = []
    for norm in ranked:
        sample = run.sample(norm)
        text = f"{norm} norm ends at {sample.mean:.1%}" if norm == ranked[0] else norm
        text += "" if norm == ranked[0] else f" norm at {sample.mean:.1%}"
        if sample.interval:
            low, high = sample.interval
            text += f" (95% interval {100 * max(low, 0):.1f} to {100 * min(high, 1):.1f})"
        texts.append(text)
    where = (
        "With one net in which only the norm differs"
        if config.arch == "matched"
        else "With the study's own nets, which differ in more than the norm"
    )
    counts = {run.sample(norm).n for norm in found}
    n = f"n = {'/'.join(map(str, sorted(counts)))}"
    n += " seeds each" if max(counts) > 1 else ", one run of each"
    head = f"{where}, {listed(texts)} test accuracy ({n}, {run.info.dataset['caption']})."
    if len(found) < 2:
        return head
    clear = [each for each in run.differences if _clear(each)]
    tail = ""
    if _pairs(run) > 1:
        unclear = [each for each in run.differences if not _clear(each)]
        parts = []
        for each in clear:
            low, high = sorted(abs(100 * edge) for edge in each.sample.interval or (0, 0))
            up, down = (each.first, each.second)
            if each.sample.mean < 0:
                up, down = down, up
            parts.append(
                f"{up} is above {down} norm by {abs(100 * each.sample.mean):.1f} points "
                f"({low:.1f} to {high:.1f})"
            )
        if parts:
            tail = f" Paired by seed, {listed(parts)}."
        if not clear:
            tail = (
                " No difference between norms is shown: paired by seed, the 95% interval of every "
                "difference holds zero."
            )
        elif unclear:
            names = listed([f"{each.first}/{each.second}" for each in unclear])
            tail += f" The 95% interval of the difference holds zero for {names}."
    return f"{head}{tail} {stats.what_n_can_show(_pairs(run), len(run.differences))}"


def _clear(each: stats.Difference) -> bool:
    """Whether the t interval leaves zero out."""
    interval = each.sample.interval
    return interval is not None and interval[0] * interval[1] > 0


def listed(texts: Sequence[str]) -> str:
    """One, one and two, or one, two and three."""
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def classes(run: Run) -> Table:
    """The mean test accuracy of each class under each norm."""
    norms = run.norms
    means = {norm: run.class_accuracies(norm).mean(0) for norm in norms}
    rows = [
        [name, *(f"{means[norm][i]:.1%}" for norm in norms)]
        for i, name in enumerate(run.class_names)
    ]
    return Table("Test accuracy of each class", ["class", *norms], rows, run.caption + ".")


def confusion(run: Run, norm: Norm) -> Table:
    """The confusion matrix of a norm in counts, the mean of its seeds."""
    matrix = run.confusion(norm)
    rows = [
        [name, *(f"{count:.0f}" for count in matrix[i])] for i, name in enumerate(run.class_names)
    ]
    count = len(run.seeds(norm))
    mean = f", mean of {count} seeds" if count > 1 else ""
    title = f"{norm} norm: confusion matrix of {len(run.labels):,} test images{mean}"
    return Table(title, ["true class", *run.class_names], rows, "A column is a predicted class.")


def parameters(run: Run) -> Table:
    """The layers of each norm's net: output, receptive field, and parameters of kernel and norm."""
    from jaxnorm import model

    config, norms = run.info.config, run.info.config.norms
    count = len(run.class_names)
    nets = [model.summarize(model.CNN(norm, config.arch, count, config.groups)) for norm in norms]
    head = ["layer"]
    for norm in norms:
        head += [f"{norm}: output", "field", "kernel", "norm"]
    rows = []
    for layers in zip(*nets, strict=True):
        row = [layers[0].name]
        for layer in layers:
            shape = "\N{MULTIPLICATION SIGN}".join(map(str, layer.shape))
            row += [shape, str(layer.receptive_field), f"{layer.kernel:,}", f"{layer.norm:,}"]
        rows.append(row)
    total = ["total"]
    for norm in norms:
        total += ["", "", "", f"{run.info.parameters[norm]:,}"]
    return Table("Layers and parameters", head, [*rows, total])


def facts(run: Run) -> Table:
    """Settings, versions, device, data and the command: what is needed to repeat the run."""
    info, config, data = run.info, run.info.config, run.info.dataset
    verified = {True: "yes, by its checksum", False: "no", None: "not known: somebody prepared it"}
    rows = [["command", info.command]]
    rows += [[name.replace("_", " "), str(each)] for name, each in config.to_json().items()]
    rows += [
        ["data", f"{data['caption']}, {data['train_count']:,} training and "
         f"{data['test_count']:,} test images"],
        ["data from", data["source"]],
        ["data verified", verified[data["verified"]]],
        ["data SHA-256", data["fingerprint"]],
        ["device", info.device],
        ["mesh", info.mesh],
        ["self-check", info.self_check],
        ["repeatable", info.repeatable],
        ["started", info.started],
        ["resumed", "; ".join(_again(info, each) for each in info.resumed) or "never"],
        ["git revision", info.git_revision or "not from a checkout"],
        ["versions", ", ".join(f"{name} {version}" for name, version in info.versions.items())],
    ]  # fmt: skip
    seconds = sum(
        each.train_seconds + each.test_seconds for net in run.epochs.values() for each in net
    )
    rows.append(["time", f"{seconds / 60:.1f} minutes of training and evaluation"])
    return Table("How it was made", ["what", "value"], rows)


def _again(info: RunInfo, resumed: Mapping[str, Any]) -> str:
    """When a run was gone on with, and what was not as at its beginning."""
    other = [
        name.replace("_", " ")
        for name in ("device", "mesh", "versions", "git_revision")
        if resumed.get(name, info.mesh) != getattr(info, name)
    ]
    checked = f"self-check {resumed['self_check']}"
    return f"{resumed['started']}, {f'other {listed(other)}, ' if other else ''}{checked}"


def comparison(run: Run, reference: Mapping[str, Any]) -> Table:
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
    note = (
        f"Test accuracy, best / last epoch; theirs one run each, ours n = {n}: "
        f"{run.info.dataset['caption']}."
    )
    return Table("Beside others", head, rows, note)


def side_by_side(runs: Mapping[str, Run]) -> Table:
    """The last test accuracy of every norm in every run."""
    norms = dict.fromkeys(norm for run in runs.values() for norm in run.info.config.norms)
    rows = []
    for title, run in runs.items():
        cells = [
            f"{stats.accuracy_text(run.sample(norm))} (n = {run.sample(norm).n})"
            if norm in run.summaries
            else ""
            for norm in norms
        ]
        rows.append([title, run.info.dataset["caption"], *cells])
    note = "Last epoch, mean \N{PLUS-MINUS SIGN} standard deviation over n seeds."
    return Table("Last test accuracy, side by side", ["run", "data", *norms], rows, note)


def sweep(runs: Sequence[Run]) -> Table:
    """The last test accuracy of every norm at every batch size and learning rate of a sweep."""
    norms = runs[0].info.config.norms
    rows, lost = [], False
    for run in runs:
        config = run.info.config
        cells = []
        for norm in norms:
            nets = [run.epochs.get((norm, seed), []) for seed in config.seed_numbers]
            ends = [net[-1].test_accuracy for net in nets if len(net) == config.epochs]
            text = stats.accuracy_text(stats.Sample(tuple(ends))) if ends else "none"
            lost |= len(ends) < len(nets)
            cells.append(
                text + ("" if len(ends) == len(nets) else f" ({len(ends)} of {len(nets)})")
            )
        rows.append([str(config.batch), f"{config.learning_rate:g}", *cells])
    config = runs[0].info.config
    note = (
        f"Last test accuracy after {config.epochs} epochs, n = {config.seeds} each"
        + (", mean \N{PLUS-MINUS SIGN} standard deviation" if config.seeds > 1 else "")
        + f"; {config.arch} nets, {runs[0].info.dataset['caption']}."
        + (" Of nets that are not counted the loss was not finite." if lost else "")
    )
    return Table("The sweep", ["batch", "learning rate", *norms], rows, note)


def speed(values: Mapping[str, Any]) -> Table:
    """A written benchmark as a table, a row a comparison, and what it was measured on."""
    comparisons = values["comparisons"]
    against = any("ratio" in each for each in comparisons)
    together = any("jaxnorm-vmap" in each["sides"] for each in comparisons)
    head = ["net", "batch", "seeds", "ours, ms", "share of ceiling"]
    head += ["seeds in one program, ms"] if together else []
    head += ["PyTorch's best, ms", "ours is times as fast"] if against else []
    head += ["first step, cold / warm, s", "peak MB"]
    rows, rounds, versions = [], [], {}
    for each in comparisons:
        sides, ratio = each["sides"], each.get("ratio")
        ours = sides["jaxnorm"]
        rounds.append(len(ours["samples_milliseconds"]))
        for side in sides.values():
            versions |= {name: side["about"].get(name) for name in ("jax", "torch")} | {
                name: version for name, version in versions.items() if version
            }
        task = "" if each["task"] == "train" else ", evaluation of 10,000"
        row = [f"{each['arch']} {each['norm']}{task}", str(each["batch_size"]), str(each["seeds"])]
        row += [f"{ours['milliseconds']:.1f}", f"{ours['share_of_ceiling']:.0%}"]
        peak = f"{ours['peak_megabytes']:.0f}"
        if together:
            row.append(f"{sides['jaxnorm-vmap']['milliseconds']:.1f}")
        if against and ratio:
            best = sides[ratio["against"]]
            low, high = ratio["10th_and_90th_percentile"]
            row.append(f"{best['milliseconds']:.1f} ({ratio['against']})")
            row.append(f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})")
            peak += f" / {best['peak_megabytes']:.0f} PyTorch"
        start = f"{ours['first_step_seconds']:.1f} / {ours['warm_first_step_seconds']:.1f}"
        rows.append([*row, start, peak])
    machine = values["machine"]
    ceiling = machine["matrix_product_gflop_per_second"]
    note = (
        f"Medians over {min(rounds)} to {max(rounds)} rounds in turns"
        + (", the ratio within each round (10th to 90th percentile)" if against else "")
        + f"; {machine['processor']}, {machine['cores']} cores, ceiling {ceiling:.0f} GFLOP/s (a "
        f"2048 x 2048 matrix product); Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"; {machine['when'][:10]}."
    )
    return Table("Speed", head, rows, note)


def read_benchmark(path: Path) -> dict[str, Any]:
    """What jaxnorm.bench wrote; raises `UserError` for anything else."""
    try:
        values = json.loads(path.read_text())
        speed(values)
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, IndexError),
        *(ArithmeticError, RecursionError),
    ):
        raise UserError(f"--bench {path} cannot be read as what jaxnorm.bench wrote") from None
    return values


def faults(tries: Sequence[Mapping[str, Any]]) -> Table:
    """What the fault harness found: a row for each kind of fault and the part of a run it hit."""
    head = [
        "what was done to it",
        "during",
        "tries",
        "complete epochs lost",
        "same bits at the end",
    ]
    rows = []
    for kind, where in dict.fromkeys((each["kind"], each["where"]) for each in tries):
        own = [each for each in tries if (each["kind"], each["where"]) == (kind, where)]
        lost = sum(each["complete"] - each["kept"] for each in own)
        same = sum(each["same"] for each in own)
        rows.append([kind, where, str(len(own)), str(lost), f"{same} of {len(own)}"])
    return Table("Faults", head, sorted(rows))


def read_faults(path: Path) -> list[dict[str, Any]]:
    """What the fault harness wrote; raises `UserError` for anything else."""
    try:
        tries = [json.loads(line) for line in path.read_text().splitlines()]
        for each in tries:
            assert type(each["same"]) is bool
            assert type(each["complete"]) is type(each["kept"]) is int
        faults(tries)
    except (OSError, ValueError, TypeError, KeyError, AssertionError, RecursionError):
        raise UserError(f"--faults {path} cannot be read as the fault harness's tries") from None
    return tries


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, signed."""
    return f"{100 * difference:+.2f}".replace("-", MINUS)


def _interval(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "none: n = 1"
    return f"{100 * max(interval[0], 0):.2f} to {100 * min(interval[1], 1):.2f}"


def _points_interval(interval: tuple[float, float] | None) -> str:
    return f"{points(interval[0])} to {points(interval[1])}" if interval else "none: n = 1"
