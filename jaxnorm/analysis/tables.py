"""Tables of reports and of the README, made from records: every number that they show is
formatted here. A new table is one more function in `TABLES`; a new number of the results is one
more row of `NUMBERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.analysis.results import Run
from jaxnorm.config import ALL, NetId, UserError, activating, counted, valid_text
from jaxnorm.records import Environment, Layer

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
EVALUATED = {"sizes": "iu S", "batch_accuracy": "f S", "running_accuracy": "f"}
EVALUATED |= {"precise_accuracy": "f", "tested": "iu"}
CORRUPTED = {"corruptions": "U C", "corrupted_accuracy": "f C", "running_accuracy": "f"}
CORRUPTED |= {"tested": "iu"}
MIRRORED = {"mirrored_accuracy": "f"}
"""The arrays of a probe that these tables show (see `probes.measure`)."""
VERSIONS = ("jax", "flax", "optax")
"""The packages that results name."""
MEAN = ", mean \N{PLUS-MINUS SIGN} standard deviation"
MARGIN = f"{100 * stats.MARGIN:g}"
"""The margin of equivalence, in points."""


@dataclass(frozen=True, repr=False)
class Table:
    """A table whose first column is text and the others numbers, and a note that stands under it.

    Its cells are plain text: what a renderer must escape, it escapes.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Returns it in Markdown, with the note and without the title."""
        lines = [self.head, ["---"] + ["--:"] * (len(self.head) - 1), *self.rows]
        text = "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)
        return text + (f"\n\n{escaped(self.note)}\n" if self.note else "\n")

    def _repr_markdown_(self) -> str:
        return f"**{escaped(self.title)}**\n\n{self.markdown()}"

    def __repr__(self) -> str:
        return self.plain()

    def plain(self) -> str:
        """Returns it for a terminal: columns in line, with the note and without the title."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[f"{c:>{w}}" for c, w in zip(line, widths, strict=True)] for line in lines]
        return "\n".join(["  ".join(line) for line in padded] + [self.note] * bool(self.note))


def escaped(text: str) -> str:
    """Returns text in which Markdown finds no mark-up, on one line."""
    for character in "\\|<>`*_[]":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


class Number(NamedTuple):
    """A column of the results: its head, its text for a norm, and whether a run has it."""

    head: Callable[[Run], str]
    text: Callable[[Run, str], str]
    shown: Callable[[Run], bool] = lambda run: True


def _several(run: Run) -> bool:
    return len(run.seed_numbers) > 1


def _accuracy(head: str, field: str, shown: Callable[[Run], bool] = lambda run: True) -> Number:
    """The accuracy of a field of `stats.Summary`."""

    def text(run: Run, norm: str) -> str:
        return stats.accuracy_text(run.sample(norm, field))

    return Number(lambda run: head, text, shown)


def _interval(head: str, field: str) -> Number:
    """An interval of the last test accuracy, cut to what an accuracy can be."""

    def text(run: Run, norm: str) -> str:
        interval = getattr(run.sample(norm), field)
        if interval is None:
            return "none: n = 1"
        return f"{100 * max(interval[0], 0):.2f} to {100 * min(interval[1], 1):.2f}"

    return Number(lambda run: head, text, _several)


def _best(run: Run, norm: str) -> str:
    best = stats.accuracy_text(run.sample(norm, "best"))
    (net, *_) = run.summaries[norm].values()
    return best if _several(run) else f"{best} (epoch {net.best_epoch})"


def _first(run: Run, norm: str) -> str:
    return stats.epochs_to_target(list(run.summaries[norm].values()))


NUMBERS = [
    Number(lambda run: "parameters", lambda run, norm: f"{run.info.parameters[norm]:,}"),
    Number(lambda run: "n", lambda run, norm: str(run.sample(norm).n), _several),
    _accuracy("last test", "last"),
    _interval("95% t interval", "interval"),
    _interval("95% bootstrap", "bootstrap_interval"),
    _accuracy("test at the best validation", "chosen", lambda run: run.info.config.validation > 0),
    _accuracy("last train", "train"),
    Number(lambda run: f"best of {run.info.config.epochs} on test (the study's rule)", _best),
    Number(lambda run: f"first epoch at {stats.TARGET:.0%}", _first),
]
"""The numbers of the results table, in order."""


def results(run: Run) -> Table:
    """A row for each norm: the last epoch first, then the study's rule; and how it was measured."""
    numbers, rows = [number for number in NUMBERS if number.shown(run)], []
    for norm in run.info.config.norms:
        cells = ["no finished net"] * len(numbers)
        if norm in run.summaries:
            cells = [number.text(run, norm) for number in numbers]
        rows.append([norm, *cells])
    head = ["norm", *(number.head(run) for number in numbers)]
    note = [conditions(run), *filter(None, [_activation(run)])]
    return Table("Test accuracy", head, rows, " ".join(note))


def _activation(run: Run) -> str:
    """Says in a sentence which norms are an activation too."""
    own = activating(run.info.config.norms)
    if not own:
        return ""
    whose = "has an activation of its" if len(own) == 1 else "have activations of their"
    return f"Norm and activation differ: {listed(own)} {whose} own."


def conditions(run: Run) -> str:
    """The data, nets, epochs, seeds, devices and versions of a run, in a line."""
    config = run.info.config
    parts = [f"{run.data}; {config.arch} nets", counted(config.epochs, "epoch")]
    parts.append(f"batch {config.batch_size}")
    if config.validation:
        parts.append(f"{config.validation} training images held out")
    text = ", ".join([*parts, run.seeds_text]) + (MEAN if _several(run) else ", n = 1")
    environments = run.environments
    versions_of = {name: [e.versions.get(name, "?") for e in environments] for name in VERSIONS}
    versions = ", ".join(f"{name} {_different(version)}" for name, version in versions_of.items())
    return f"{text}; {_different([e.device for e in environments])}; {versions}."


def _different(texts: Sequence[str]) -> str:
    """Lists the texts without repetition."""
    return listed(list(dict.fromkeys(texts)))


def values(run: Run) -> Table:
    """Every raw value: a row for each seed, the last and the best test accuracy of each norm."""
    rows = []
    for seed in run.info.config.seed_numbers:
        nets = [nets.get(seed) for nets in run.summaries.values()]
        if any(nets):
            cells = [f"{net.last:.2%} / {net.best:.2%}" if net else "" for net in nets]
            rows.append([str(seed), *cells])
    head = ["seed", *run.summaries]
    return Table("Every net: last / best test accuracy", head, rows)


def differences(run: Run) -> Table:
    """A row for each pair of norms: the paired difference, its intervals, and p."""
    return paired(run.differences)


def paired(differences: Sequence[stats.Difference]) -> Table:
    """Returns the table of `differences`, also of norms that were trained in several runs: a row
    for each that `stats.selected` selects.
    """
    head = ["difference", "pairs", "mean, points", "95% t interval", "95% over seeds and images"]
    head += ["95% bootstrap", "p, exact sign flips", "p after Holm"]
    head += [f"p, equivalent within {MARGIN}", "equivalence after Holm", "next net above"]
    rows, selected = [], stats.selected(differences)
    for pair in selected:
        sample = pair.sample
        row = [f"{pair.first} {MINUS} {pair.second}", str(sample.n), points(sample.mean)]
        both, unknown = pair.crossed, "none: n = 1" if sample.n == 1 else "not known"
        for interval in (sample.interval, both and both.interval, sample.bootstrap_interval):
            row.append(" to ".join(map(points, interval)) if interval else unknown)
        row += [f"{pair.p:.3g}", _after_holm(pair.adjusted_p)]
        row += [f"{both.equivalence_p:.3g}" if both else unknown]
        judged = both or pair.adjusted_p is None
        row += [_after_holm(pair.equivalence_p) if judged else unknown]
        rows.append([*row, chance(sample.next_above_zero)])
    note = (
        "Differences of last test accuracies between nets of the same seed; the intervals are not "
        "corrected for there being several. The t interval is over seeds alone, on these images. "
        f"Equivalent within {MARGIN} points: two one-sided t tests over seeds and images; the "
        f"margin was fixed on {stats.MARGIN_SINCE}, so for runs begun earlier not beforehand. Next "
        "net above: the probability that under one more seed the first norm's net ends above the "
        "second's. "
    )
    if others := len(differences) - len(selected):
        first = differences[0].first
        note += f"{others} differences between other norms than {first} are left out. "
    return Table("Paired differences", head, rows, note + what_pairs_can_show(differences))


def _after_holm(p: float | None) -> str:
    return "no verdict" if p is None else f"{p:.3g}"


def chance(probability: float | None) -> str:
    """A probability as a percentage that is 0 or 100 only if the probability is 0 or 1."""
    if probability is None:
        return "none: n = 1"
    if 0 < probability < 0.005 or 0.995 <= probability < 1:
        return "<1%" if probability < 0.5 else ">99%"
    return f"{probability:.0%}"


def what_pairs_can_show(differences: Sequence[stats.Difference]) -> str:
    """Says what the fewest and the most pairs of the family's comparisons can show; what the most
    cannot, the fewest cannot either. And that other comparisons show nothing.
    """
    counts = [pair.sample.n for pair in differences if pair.adjusted_p is not None]
    ends = {max(counts)} if counts else set()
    if ends and max(counts) >= stats.fewest_pairs(len(stats.FAMILY)):
        ends.add(min(counts))
    sentences = [stats.what_n_can_show(n) for n in sorted(ends)]
    if len(counts) < len(differences):
        sentences.append(
            f"The tests were fixed beforehand for {listed(ALL)} norm alone: other comparisons have "
            "intervals and no verdict."
        )
    return " ".join(sentences)


def printable(text: str) -> str:
    """Returns text on one line, with a space for each character that cannot be printed."""
    return "".join(c if c.isprintable() else " " for c in valid_text(" ".join(text.split())))


def listed(texts: Sequence[str], last: str = "and") -> str:
    """Returns one, one and two, or one, two and three; with another word before the `last`."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def evaluation(run: Run) -> Table:
    """Returns the accuracy by the statistics that batch norm is evaluated with: a row for each norm
    that keeps any. Empty if that was not measured.
    """
    head, rows, tested = ["norm", "n", "running averages", "averages computed anew"], [], 0
    for norm, by_seed in run.probes(EVALUATED).items():
        nets = list(by_seed.values())
        running, precise = (
            [float(n[f"{k}_accuracy"]) for n in nets] for k in ("running", "precise")
        )
        by_size = np.array([net["batch_accuracy"] for net in nets])
        if (by_size == np.array(running)[:, None]).all():
            continue
        tested, sizes = int(nets[0]["tested"]), nets[0]["sizes"]
        samples = [stats.Sample(tuple(map(float, x))) for x in (running, precise, *by_size.T)]
        cells = list(map(stats.accuracy_text, samples))
        if norm != "batch":  # see `probes.measure`
            cells[1] = "not computed"
        rows.append([norm, str(len(nets)), *cells])
        head[4:] = [f"batches of {size}" for size in sizes]
    note = (
        f"Accuracy on {tested:,} test images{MEAN if _several(run) else ''}; the same "
        "nets, normalized by running averages, by statistics of all training images, and by those "
        "of each batch of test images."
    )
    return Table("Batch norm by the statistics it is evaluated with", head, rows, note)


def calibration(run: Run) -> Table:
    """Returns the calibration error of each norm's nets, as they are and with a temperature."""
    rows = []
    for norm in run.norms:
        nets = [stats.calibration(run.predictions[NetId(norm, seed)]) for seed in run.seeds(norm)]
        errors, tempered, temperatures = zip(*nets, strict=True)
        samples = [stats.accuracy_text(stats.Sample(values)) for values in (errors, tempered)]
        rows.append([norm, str(len(nets)), *samples, f"{np.mean(temperatures):.2f}"])
    head = ["norm", "n", "calibration error", "with a temperature", "temperature"]
    note = (
        f"Expected calibration error over 15 bins, {run.info.dataset.test_count:,} test images"
        f"{MEAN if rows and _several(run) else ''}; each half of the images is divided "
        "by the temperature of the other half."
    )
    return Table("Calibration", head, rows, note)


def corruptions(run: Run) -> Table:
    """The accuracy of each norm's nets on corrupted images. Empty if that was not measured."""
    head, rows, tested = ["norm", "n", "none"], [], 0
    for norm, by_seed in run.probes(CORRUPTED).items():
        nets = list(by_seed.values())
        head[3:], tested = map(str, nets[0]["corruptions"]), int(nets[0]["tested"])
        accuracies = [[net["running_accuracy"], *net["corrupted_accuracy"]] for net in nets]
        samples = [stats.Sample(tuple(map(float, x))) for x in zip(*accuracies, strict=True)]
        rows.append([norm, str(len(nets)), *map(stats.accuracy_text, samples)])
    note = f"Accuracy on {tested:,} test images{MEAN if _several(run) else ''}."
    return Table("Test accuracy on corrupted images", head, rows, note)


def mirrored(run: Run) -> Table:
    """Returns the accuracy by the mean of the logits of each test image and of its mirror image.
    Empty if no net was trained on mirrored images.
    """
    rows = []
    for norm, by_seed in run.probes(MIRRORED).items():
        both = {seed: float(net["mirrored_accuracy"]) for seed, net in by_seed.items()}
        one = {seed: run.summaries[norm][seed].last for seed in both}
        gains = stats.Sample(tuple(both[seed] - one[seed] for seed in both))
        samples = [stats.Sample(tuple(of_seed.values())) for of_seed in (one, both)]
        rows.append([norm, str(len(both)), *map(stats.accuracy_text, samples), points(gains.mean)])
    note = (
        "Last test accuracy of an image's own logits, and of their mean with those of its mirror "
        f"image{MEAN if _several(run) else ''}; gain in points. All other tables have the first."
    )
    head = ["norm", "n", "test", "with mirror images", "gain"]
    return Table("Test accuracy with mirror images", head, rows, note)


def spreads_of(run: Run) -> dict[str, stats.Spread]:
    """Returns the parts of the deviation over seeds of each norm that has several seeds; none if
    predictions are missing.
    """
    try:
        correct = {norm: np.array(list(nets.values())) for norm, nets in run.correct.items()}
    except (UserError, OSError):  # the tables of predictions name it
        return {}
    spreads = {norm: stats.spread(right) for norm, right in correct.items()}
    return {norm: spread for norm, spread in spreads.items() if spread}


def spreads(run: Run) -> Table:
    """Returns the part of each norm's spread over seeds that is test-set noise, in points."""
    rows = []
    for norm, spread in spreads_of(run).items():
        low, high = spread.interval
        row = [norm, str(run.sample(norm).n), f"{100 * spread.seen:.2f}"]
        row += [f"{100 * low:.2f} to {100 * high:.2f}", f"{100 * spread.independent:.2f}"]
        rows.append([*row, f"{100 * spread.left:.2f}" if spread.left else "nothing"])
    head = ["norm", "n", "deviation, points", "95% interval", "if errors were independent", "left"]
    note = (
        "Standard deviations of the last test accuracy over seeds. If the errors of a net on "
        "different test images were independent, given how often each image is right, seeds would "
        "still differ on so few images; what is left is between nets, on any images (Jordan, "
        "arXiv 2304.01910). If the interval holds the third deviation, nothing may be left."
    )
    return Table("Spread over seeds", head, rows, note)


def deviations(differences: Sequence[stats.Difference]) -> dict[str, float | None]:
    """Returns the standard deviation of each pair's differences, by what it is called."""
    return {f"{p.first} {MINUS} {p.second}": p.sample.deviation for p in differences}


def seeds_needed(difference: float, deviations: Mapping[str, float | None]) -> Table:
    """Returns how many seeds it takes to find a difference, from the deviation of each pair's
    differences; both are fractions.
    """
    levels, rows = (stats.LEVEL, stats.LEVEL / len(stats.FAMILY)), []
    for name, deviation in deviations.items():
        row = [name, "none: n = 1" if deviation is None else f"{100 * deviation:.2f}"]
        for level in levels:
            if not deviation:
                row += ["not known", "not known"]
                continue
            needed = stats.seeds_needed(difference / deviation, level)
            row += [str(n or f"over {stats.MOST_SEEDS:,}") for n in needed]
        rows.append(row)
    head = ["difference", "deviation, points"]
    for level in levels:
        head += [f"t test, p < {level:.2g}", f"sign flips, p < {level:.2g}"]
    note = (
        f"The fewest seeds that find a difference of {100 * difference:g} points with a "
        f"probability of {stats.POWER:.0%}, if paired differences are normally distributed with "
        f"this deviation. Paired t test: noncentral t; exact sign flips: {stats.DRAWS:,} simulated "
        f"runs, by {2 ** (stats.ALL_FLIPS - 1):,} random flips with over {stats.ALL_FLIPS} seeds, "
        f"and the t test's with over {stats.ALIKE}. p < {levels[1]:.2g} is enough to be shown, "
        f"whatever p the other comparisons of {listed(ALL)} norm have."
    )
    return Table("Seeds needed", head, rows, note)


def classes(run: Run) -> Table:
    """The mean test accuracy of each class under each norm; "none" if it has no test images."""
    means = [run.class_accuracies(norm).mean(0) for norm in run.norms]
    cells = [["none" if np.isnan(mean) else f"{mean:.1%}" for mean in net] for net in means]
    names = run.shown_classes if cells else ()
    rows = [[name, *(net[i] for net in cells)] for i, name in enumerate(names)]
    return Table("Test accuracy of each class", ["class", *run.norms], rows, run.caption + ".")


def parameters(run: Run) -> Table:
    """The layers of each norm's net, as the run recorded them. Empty if they do not lie side by
    side.
    """
    nets = {norm: run.info.layers.get(norm, []) for norm in run.info.config.norms}
    if len({tuple(layer.name for layer in net) for net in nets.values()}) > 1:
        return layers({}, {})
    return layers(nets, run.info.parameters)


def layers(nets: Mapping[str, Sequence[Layer]], totals: Mapping[str, int]) -> Table:
    """The layers of each norm's net: output, receptive field, parameters of kernel and norm; and
    its parameters in all.
    """
    head, total, rows = ["layer"], ["total"], []
    for norm in nets:
        head += [f"{norm}: output", "field", "kernel", "norm"]
        total += ["", "", "", f"{totals[norm]:,}"]
    for same in zip(*nets.values(), strict=True):
        row = [same[0].name]
        for layer in same:
            row += [TIMES.join(map(str, layer.shape)), str(layer.receptive_field)]
            row += [f"{layer.kernel:,}", f"{layer.norm:,}"]
        rows.append(row)
    return Table("Layers and parameters", head, [*rows, total] if rows else [])


def facts(run: Run) -> Table:
    """Settings, versions, device, data and the command: what is needed to repeat the run."""
    config, data, began = run.info.config, run.info.dataset, run.info.environment
    verified = {True: "yes, by its checksum", False: "no", None: "not known"}
    images = f"{data.train_count:,} training and {data.test_count:,} test images"
    spent = [epoch for net in run.epochs.values() for epoch in net]
    seconds = sum(epoch.train_seconds + epoch.test_seconds for epoch in spent)
    rows = {
        "command": began.command,
        **{name.replace("_", " "): str(value) for name, value in vars(config).items()},
        "data": f"{run.data}, {images}",
        "data from": data.source,
        "data verified": verified[data.verified],
        "data SHA-256": data.fingerprint,
        "device": began.device,
        "mesh": began.mesh,
        "self-check": began.self_check,
        "repeatable": began.repeatable,
        "started": began.started,
        "resumed": "; ".join(_resumed(began, again) for again in _later(run)) or "never",
        "git revision": began.git_revision or "not from a checkout",
        "versions": ", ".join(f"{name} {version}" for name, version in began.versions.items()),
        "time": f"{seconds / 60:.1f} minutes of training and evaluation",
    }
    return Table("How it was made", ["what", "value"], [list(row) for row in rows.items()])


def _later(run: Run) -> list[Environment]:
    """Returns the environments of processes that trained nets after the one that began the run."""
    first = run.info.environment
    return [one for one in run.environments if one.started != first.started]


def _resumed(first: Environment, again: Environment) -> str:
    """Says when a run was resumed, and what was not as at its start."""
    names = ("device", "mesh", "versions", "git_revision")
    other = [n.replace("_", " ") for n in names if getattr(again, n) != getattr(first, n)]
    checked = f"self-check {again.self_check}"
    return f"{again.started}, {f'other {listed(other)}, ' if other else ''}{checked}"


def side_by_side(runs: Sequence[tuple[str, Run]]) -> Table:
    """The last test accuracy of every norm in every run, each with its title."""
    norms = dict.fromkeys(norm for _, run in runs for norm in run.info.config.norms)
    rows = []
    for title, run in runs:
        samples = [run.sample(norm) if norm in run.summaries else None for norm in norms]
        cells = [f"{stats.accuracy_text(s)} (n = {s.n})" if s else "" for s in samples]
        rows.append([title, run.data, *cells])
    head, note = ["run", "data", *norms], f"Last epoch{MEAN} over n seeds."
    return Table("Last test accuracy, side by side", head, rows, note)


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, signed."""
    return f"{100 * difference:+.2f}".replace("-", MINUS)


TABLES: list[Callable[[Run], Table]] = [
    results,
    differences,
    values,
    evaluation,
    calibration,
    corruptions,
    mirrored,
    spreads,
    classes,
    parameters,
    facts,
]
"""The tables of a run's report, in order."""
