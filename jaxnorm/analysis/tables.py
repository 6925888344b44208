"""What reports and the README say in words and tables, made from records: every number a person
reads is formatted here. A new table is one more function in `TABLES`; a new number
of the results is one more row of `NUMBERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxnorm.analysis import stats
from jaxnorm.analysis.results import Run
from jaxnorm.storage.schema import Environment

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


Column = tuple[Callable[[Run], str], Callable[[Run, str], str], Callable[[Run], bool]]


def _always(run: Run) -> bool:
    return True


def _several(run: Run) -> bool:
    return run.info.config.seeds > 1


def _best(run: Run, norm: str) -> str:
    best = stats.accuracy_text(run.sample(norm, "best"))
    (net, *_) = run.summaries[norm].values()
    return best if _several(run) else f"{best} (epoch {net.best_epoch})"


NUMBERS: list[Column] = [
    (lambda run: "parameters", lambda run, norm: f"{run.info.parameters[norm]:,}", _always),
    (lambda run: "n", lambda run, norm: str(run.sample(norm).n), _several),
    (lambda run: "last test", lambda run, norm: stats.accuracy_text(run.sample(norm)), _always),
    (
        lambda run: "95% t interval",
        lambda run, norm: _interval(run.sample(norm).interval),
        _several,
    ),
    (
        lambda run: "95% bootstrap",
        lambda run, norm: _interval(run.sample(norm).bootstrap_interval),
        _several,
    ),
    (
        lambda run: "test at the best validation",
        lambda run, norm: stats.accuracy_text(run.sample(norm, "chosen")),
        lambda run: run.info.config.validation > 0,
    ),
    (
        lambda run: "last train",
        lambda run, norm: stats.accuracy_text(run.sample(norm, "train")),
        _always,
    ),
    (lambda run: f"best of {run.info.config.epochs} on test (the study's rule)", _best, _always),
    (
        lambda run: f"first epoch at {stats.TARGET:.0%}",
        lambda run, norm: stats.epochs_to_target(list(run.summaries[norm].values())),
        _always,
    ),
]
"""The numbers of the results table: the head, the text for a norm, and whether a run has it."""


def results(run: Run) -> Table:
    """A row a norm: the last epoch first, then the study's rule; and how it was measured."""
    numbers = [number for number in NUMBERS if number[2](run)]
    rows = [
        [norm, *(text(run, norm) for _, text, _ in numbers)]
        if norm in run.summaries
        else [norm, *["not trained yet"] * len(numbers)]
        for norm in run.info.config.norms
    ]
    head = ["norm", *(head(run) for head, _, _ in numbers)]
    return Table("Test accuracy", head, rows, conditions(run))


def conditions(run: Run) -> str:
    """The data, nets, epochs, seeds, device and versions of a run, in a line."""
    info, config = run.info, run.info.config
    of = ", ".join(
        f"{name} {info.environment.versions.get(name, '?')}" for name in ("jax", "flax", "optax")
    )
    finished = f"{len(run.finished)} of {len(config.nets)} nets finished, "
    held_out = f"{config.validation} training images held out, " if config.validation else ""
    spread = ", mean \N{PLUS-MINUS SIGN} standard deviation" if config.seeds > 1 else ", n = 1"
    return (
        f"{info.dataset.caption}; {config.arch} nets, {config.epochs} epochs, "
        f"{finished if len(run.finished) < len(config.nets) else ''}batch {config.batch}, "
        f"{held_out}{run.seeds_text}{spread}; {info.environment.device}; {of}."
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
        "corrected for there being several. " + _what_n_can_show(run)
    )
    return Table("Paired differences", head, rows, note)


def _what_n_can_show(run: Run) -> str:
    """What the fewest and the most pairs of a comparison can show, in words."""
    counts = sorted({each.sample.n for each in run.differences}) or [1]
    return " ".join(
        stats.what_n_can_show(n, max(1, len(run.differences))) for n in {counts[0], counts[-1]}
    )


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
    head = f"{where}, {listed(texts)} test accuracy ({n}, {run.info.dataset.caption})."
    if len(found) < 2:
        return head
    tested = [each for each in run.differences if each.sample.n > 1]
    parts = []
    for each in filter(_clear, tested):
        low, high = sorted(abs(100 * edge) for edge in each.sample.interval or (0, 0))
        up, down = (each.first, each.second)
        if each.sample.mean < 0:
            up, down = down, up
        parts.append(
            f"{up} is above {down} norm by {abs(100 * each.sample.mean):.1f} points "
            f"({low:.1f} to {high:.1f}, n = {each.sample.n}, p {each.adjusted_p:.2g} after Holm)"
        )
    unclear = [f"{each.first}/{each.second}" for each in tested if not _clear(each)]
    untested = [f"{each.first}/{each.second}" for each in run.differences if each.sample.n == 1]
    tail = f" Paired by seed, {listed(parts)}." if parts else ""
    if unclear and not parts and not untested:
        tail = (
            " No difference between norms is shown: paired by seed, the 95% interval of every "
            "difference holds zero."
        )
    elif unclear:
        tail += f" The 95% interval of the difference holds zero for {listed(unclear)}."
    if untested and tested:
        tail += f" One pair of seeds cannot tell {listed(untested)} apart."
    return f"{head}{tail} {_what_n_can_show(run)}"


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


def confusion(run: Run, norm: str) -> Table:
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

    from jaxnorm.model import summary

    norms, count = run.info.config.norms, len(run.class_names)
    nets = [summary.summarize(summary.net_of(run.info.config, norm, count)) for norm in norms]
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
    info, config, data, made = run.info, run.info.config, run.info.dataset, run.info.environment
    verified = {True: "yes, by its checksum", False: "no", None: "not known: somebody prepared it"}
    images = f"{data.train_count:,} training and {data.test_count:,} test images"
    rows = [["command", made.command]]
    rows += [[name.replace("_", " "), str(value)] for name, value in vars(config).items()]
    rows += [
        ["data", f"{data.caption}, {images}"],
        ["data from", data.source],
        ["data verified", verified[data.verified]],
        ["data SHA-256", data.fingerprint],
        ["device", made.device],
        ["mesh", made.mesh],
        ["self-check", made.self_check],
        ["repeatable", info.repeatable],
        ["started", made.started],
        ["resumed", "; ".join(_resumed(made, each) for each in info.resumed) or "never"],
        ["git revision", made.git_revision or "not from a checkout"],
        ["versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())],
    ]
    seconds = sum(
        epoch.train_seconds + epoch.test_seconds for net in run.epochs.values() for epoch in net
    )
    rows.append(["time", f"{seconds / 60:.1f} minutes of training and evaluation"])
    return Table("How it was made", ["what", "value"], rows)


def _resumed(first: Environment, again: Environment) -> str:
    """When a run was resumed, and what was not as at its start."""
    other = [
        name.replace("_", " ")
        for name in ("device", "mesh", "versions", "git_revision")
        if getattr(again, name) != getattr(first, name)
    ]
    checked = f"self-check {again.self_check}"
    return f"{again.started}, {f'other {listed(other)}, ' if other else ''}{checked}"


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
        rows.append([title, run.info.dataset.caption, *cells])
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
        rows.append([str(config.batch), f"{config.rate:g}", *cells])
    config = runs[0].info.config
    note = (
        f"Last test accuracy after {config.epochs} epochs, n = {config.seeds} each"
        + (", mean \N{PLUS-MINUS SIGN} standard deviation" if config.seeds > 1 else "")
        + f"; {config.arch} nets, {runs[0].info.dataset.caption}."
        + (" Of nets that are not counted the loss was not finite." if lost else "")
    )
    return Table("The sweep", ["batch", "learning rate", *norms], rows, note)


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, signed."""
    return f"{100 * difference:+.2f}".replace("-", MINUS)


def _interval(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "none: n = 1"
    return f"{100 * max(interval[0], 0):.2f} to {100 * min(interval[1], 1):.2f}"


def _points_interval(interval: tuple[float, float] | None) -> str:
    return f"{points(interval[0])} to {points(interval[1])}" if interval else "none: n = 1"


TABLES: list[Callable[[Run], Table]] = [results, differences, values, classes, parameters, facts]
"""The tables of a run's report, in order. A new table is one more function here."""
