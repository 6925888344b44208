"""The command that makes what a person reads from run directories: `python -m jaxnorm.report RUN`.

It draws the figures again and writes `report.md` in each run; it never trains. `--readme` writes
the tables of a README that stand between `<!-- table NAME -->` and `<!-- end -->`, where NAME is a
run directory's own name, that and "beside others", or the name of a benchmark's file, so that no
number there is typed by hand.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from jaxnorm import bench, cli
from jaxnorm.config import UserError

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.report",
    help="Draw the figures of run directories and write their reports; nothing is trained.",
    version_flags=[],
    help_format="plaintext",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to write, and where.

    Parameters
    ----------
    merge
        Put runs of batch, group and layer norm that were made apart together in this new directory
        first, and report on that. The data is read again, for the pictures.
    readme
        Write the tables of this file anew.
    reference
        JSON of others' results on the same nets, to stand beside ours in the tables.
    bench
        JSON files that jaxnorm.bench wrote, each for the README's table of its name.
    data_dir
        With --merge: directory of TFDS datasets. Default: TFDS_DATA_DIR or ~/tensorflow_datasets.
    allow_unverified
        With --merge: the data came from an archive that is not an official one.
    """

    merge: Path | None = None
    readme: Path | None = None
    reference: Path | None = None
    bench: tuple[Path, ...] = ()
    data_dir: Path | None = None
    allow_unverified: bool = False


@app.default
def main(
    *runs: Annotated[Path, Parameter(name="RUN")],
    options: Annotated[
        Options, Parameter(name="*", negative_bool=(), negative_iterable=(), consume_multiple=True)
    ] = Options(),
) -> int:
    """Reports on each run.

    Parameters
    ----------
    runs
        Run directories.
    """
    from jaxnorm import figures
    from jaxnorm.records import RunDirectory

    if not runs and not options.bench:
        raise UserError("no run directory was given: python -m jaxnorm.report RUN [RUN ...]")
    directories = [RunDirectory(path) for path in runs]
    if options.merge:
        directories = [_merge(directories, options)]
    reference = read_reference(options.reference)
    tables = {}
    for directory in directories:
        title = directory.path.absolute().name
        own = {title: results_table(directory)}
        if reference and directory.info().config.arch == "original":
            own[f"{title} beside others"] = comparison_table(directory, reference)
        tables |= own
        drawn, missing = figures.draw(directory)
        report = write_markdown(title, list(own.values()), drawn, missing)
        directory.write_bytes("report.md", report.encode())
        print(f"{directory.path / 'report.md'}: {len(drawn)} figures")
        for line in missing:
            print(f"missing: {line}", file=sys.stderr)
    for path in options.bench:
        tables[path.stem] = bench.table(bench.read(path))
    if options.readme:
        fill_readme(options.readme, tables)
    return 0


def _merge(sources: list[Any], options: Options) -> Any:
    from jaxnorm import data, figures
    from jaxnorm.records import RunDirectory

    assert options.merge is not None
    info = sources[0].info()
    RunDirectory.check_unused(options.merge)
    dataset = data.load(
        info.config.dataset, options.data_dir, allow_unverified=options.allow_unverified
    )
    if dataset.fingerprint != info.dataset["fingerprint"]:
        raise UserError(f"the data found is not what {sources[0].path} was trained on")
    directory = RunDirectory.create(options.merge)
    directory.take(sources)
    figures.save_examples(directory, dataset)
    return directory


def read_reference(path: Path | None) -> dict[str, Any]:
    """{source: {norm: {"test_accuracy": [...]}}}, fractions by epoch; empty without a path."""
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text())
        for norms in values.values():
            for norm in norms.values():
                assert all(0 <= each <= 1 for each in norm["test_accuracy"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError):
        raise UserError(f"--reference {path} cannot be read as others' results") from None
    return values


def results_table(directory: Any) -> str:
    """A run's results in Markdown, a row a norm, and under it what they were measured with."""
    from jaxnorm import stats

    info, epochs = directory.info(), directory.epochs()
    config = info.config
    head = ["norm", "parameters", "best test (epoch)", "last test", "last train", "first at 70 %"]
    rows = []
    for norm in config.norms:
        if own := [epoch for epoch in epochs if epoch.norm == norm]:
            summary = stats.summarize(own)
            best = f"{summary.best:.2%} ({summary.best_epoch})"
            last = [f"{summary.last:.2%}", f"{own[-1].train_accuracy:.2%}"]
            first = f"epoch {summary.first_at_target}" if summary.first_at_target else "never"
            rows.append([norm, f"{info.parameters[norm]:,}", best, *last, first])
        else:
            rows.append([norm, *["not trained yet"] * (len(head) - 1)])
    finished = min(sum(epoch.norm == norm for epoch in epochs) for norm in config.norms)
    note = (
        f"{info.dataset['caption']}; {config.arch} nets, {finished} of {config.epochs} epochs, "
        f"batch {config.batch}, seed {config.seed}, n = 1; {info.device}; "
        + ", ".join(f"{name} {info.versions[name]}" for name in ("jax", "flax", "optax"))
        + "."
    )
    return f"{bench.markdown(head, rows)}\n\n{note}\n"


def comparison_table(directory: Any, reference: dict[str, Any]) -> str:
    """A run of the study's own nets beside others' runs of them: best / last test accuracy."""
    from jaxnorm import stats

    epochs = directory.epochs()
    head = ["norm", "ours"]
    for source in reference:
        head += [source, "ours minus it, points"]
    rows = []
    for norm in directory.info().config.norms:
        own = [epoch for epoch in epochs if epoch.norm == norm]
        if not own:
            continue
        summary = stats.summarize(own)
        ours = (summary.best, summary.last)
        row = [norm, f"{ours[0]:.2%} / {ours[1]:.2%}"]
        for norms in reference.values():
            accuracies = norms[norm]["test_accuracy"]
            theirs = (max(accuracies), accuracies[-1])
            differences = (100 * (a - b) for a, b in zip(ours, theirs, strict=True))
            row.append(f"{theirs[0]:.2%} / {theirs[1]:.2%}")
            row.append(" / ".join(f"{difference:+.2f}" for difference in differences))
        rows.append(row)
    caption = directory.info().dataset["caption"]
    note = f"Test accuracy, best / last epoch, n = 1 each; ours: {caption}."
    return f"{bench.markdown(head, rows)}\n\n{note}\n"


def write_markdown(title: str, tables: list[str], figures: list[str], missing: list[str]) -> str:
    """The report: the tables, what is missing, and every figure."""
    parts = [f"# {title}", *(table.rstrip() for table in tables)]
    parts += [f"Missing: {line}" for line in missing]
    parts += [f"![{Path(name).stem.replace('-', ' ')}](figures/{name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def fill_readme(path: Path, tables: dict[str, str]) -> None:
    """Puts each table between its marks; raises `UserError` where a mark is missing."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"--readme {path} cannot be read: {error.strerror}") from None
    for name, table in tables.items():
        marked = re.compile(f"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise UserError(f"--readme {path} has no <!-- table {name} --> ... <!-- end -->")
        text = marked.sub(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(cli.run(app))
