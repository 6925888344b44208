"""The command that makes what a person reads from run directories: `python -m jaxnorm.report RUN`.

It draws the figures again and writes `report.md` in each run; it never trains. `--readme` writes
the tables of a README that stand between `<!-- table NAME -->` and `<!-- end -->`, where NAME is a
run directory's own name, so that no number there is typed by hand.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from jaxnorm import cli
from jaxnorm.config import UserError

app = App(
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
    data_dir
        With --merge: directory of TFDS datasets. Default: TFDS_DATA_DIR or ~/tensorflow_datasets.
    allow_unverified
        With --merge: the data came from an archive that is not an official one.
    """

    merge: Path | None = None
    readme: Path | None = None
    reference: Path | None = None
    data_dir: Path | None = None
    allow_unverified: bool = False


@app.default
def main(
    *runs: Annotated[Path, Parameter(name="RUN")],
    options: Annotated[Options, Parameter(name="*", negative_bool=())] = Options(),
) -> int:
    """Reports on each run.

    Parameters
    ----------
    runs
        Run directories.
    """
    from jaxnorm import figures
    from jaxnorm.records import RunDirectory

    if not runs:
        raise UserError("no run directory was given: python -m jaxnorm.report RUN [RUN ...]")
    directories = [RunDirectory(path) for path in runs]
    if options.merge:
        directories = [_merge(directories, options)]
    reference = _read_reference(options.reference)
    tables = {}
    for directory in directories:
        title = directory.path.absolute().name
        tables[title] = results_table(directory, reference)
        drawn, missing = figures.draw(directory)
        report = write_markdown(title, tables[title], drawn, missing)
        directory.write_bytes("report.md", report.encode())
        print(f"{directory.path / 'report.md'}: {len(drawn)} figures")
        for line in missing:
            print(f"missing: {line}", file=sys.stderr)
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


def _read_reference(path: Path | None) -> dict[str, Any]:
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


def results_table(directory: Any, reference: dict[str, Any]) -> str:
    """A Markdown table of a run: one row a norm, and what `reference` has beside it."""
    from jaxnorm import stats

    info, epochs = directory.info(), directory.epochs()
    beside = {
        source: norms for source, norms in reference.items() if info.config.arch == "original"
    }
    head = ["norm", "parameters", "best test (epoch)", "last test", "last train", "70 % at epoch"]
    for source in beside:
        head += [f"{source}: best (epoch)", "last", "ours minus it, last"]
    rows = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for norm in info.config.norms:
        own = [epoch for epoch in epochs if epoch.norm == norm]
        if not own:
            rows.append([norm, *["not trained yet"] * (len(head) - 1)])
            continue
        summary = stats.summarize(own)
        row = [norm, f"{info.parameters[norm]:,}", f"{summary.best:.2%} ({summary.best_epoch})"]
        row += [f"{summary.last:.2%}", f"{own[-1].train_accuracy:.2%}"]
        row.append(str(summary.first_at_target or "never"))
        for norms in beside.values():
            theirs = norms[norm]["test_accuracy"]
            best = max(theirs)
            row += [f"{best:.2%} ({theirs.index(best) + 1})", f"{theirs[-1]:.2%}"]
            row.append(f"{100 * (summary.last - theirs[-1]):+.2f} points")
        rows.append(row)
    finished = min(sum(epoch.norm == norm for epoch in epochs) for norm in info.config.norms)
    config = info.config
    note = (
        f"{info.dataset['caption']}; {config.arch} nets, {finished} of {config.epochs} epochs, "
        f"batch {config.batch}, seed {config.seed}, n = 1; {info.device}, jax "
        f"{info.versions['jax']}, flax {info.versions['flax']}."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}\n"


def write_markdown(title: str, table: str, figures: list[str], missing: list[str]) -> str:
    """The report: the table, every figure, and what is missing."""
    parts = [f"# {title}", table.rstrip()]
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
