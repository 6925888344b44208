"""The command that makes what a person reads from run directories: `python -m jaxnorm.report RUN`.

It draws the figures again and writes `report.md` and `report.html` in each run, and one page of
several runs side by side; it never trains. `--readme` writes what stands in a README between
`<!-- table NAME -->` and `<!-- end -->`, so that no number there is typed by hand. NAME is a run
directory's own name, that and "finding", "differences", "values" or "beside others", or the name of
a benchmark's file; "faults" is the fault harness's.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from jaxnorm import cli
from jaxnorm.config import UserError

if TYPE_CHECKING:
    from jaxnorm.page import RunPart
    from jaxnorm.records import RunDirectory

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.report",
    help=(
        "Write the reports of run directories, report.md and report.html; nothing is trained. "
        "Several runs are put side by side in one more page."
    ),
    version_flags=[],
    help_format="plaintext",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to write, and where.

    Parameters
    ----------
    out
        With several runs: the page of all of them. Default: side-by-side.html in the folder that
        the first run lies in.
    merge
        Put runs that differ in nothing but their norms and seeds together in this new directory
        first, and report on that. The data is read again, for the pictures.
    readme
        Write the tables of this file anew.
    reference
        JSON of others' results on the same nets, to stand beside ours in the README's tables.
    bench
        JSON files that jaxnorm.bench wrote, each for the README's table of its name.
    faults
        Lines that the fault harness wrote, for the README's table "faults".
    data_dir
        With --merge: directory of TFDS datasets. Default: TFDS_DATA_DIR or ~/tensorflow_datasets.
    allow_unverified
        With --merge: the data came from an archive that is not an official one.
    """

    out: Path | None = None
    merge: Path | None = None
    readme: Path | None = None
    reference: Path | None = None
    bench: tuple[Path, ...] = ()
    faults: Path | None = None
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
        Run directories; of a sweep's folder, all of its runs.
    """
    from jaxnorm import page, tables
    from jaxnorm.records import RunDirectory
    from jaxnorm.sweep import SweepDirectory

    if not runs and (options.merge or not (options.bench or options.faults)):
        raise UserError("no run directory was given: python -m jaxnorm.report RUN [RUN ...]")
    directories = [
        directory
        for path in runs
        for directory in (
            SweepDirectory(path).runs() if SweepDirectory.is_one(path) else [RunDirectory(path)]
        )
    ]
    if options.merge:
        directories = [_merge(directories, options)]
    reference = read_reference(options.reference)
    benchmarks = {path.stem: tables.read_benchmark(path) for path in options.bench}
    tries = tables.read_faults(options.faults) if options.faults else None
    parts, unread = [], []
    for directory in directories:
        try:
            part = page.write(directory)
        except UserError as error:
            unread.append(str(error))
            continue
        parts.append(part)
        print(f"{directory.path / 'report.html'}: {len(part.pictures)} figures")
        for line in part.missing:
            print(f"missing: {line}", file=sys.stderr)
    if unread and not parts:
        raise UserError(unread[0])
    for line in unread:
        print(f"missing: {line}", file=sys.stderr)
    if len(directories) > 1:
        together = options.out or directories[0].path.absolute().parent / "side-by-side.html"
        page.write_together(together, parts, unread)
        print(f"{together}: {len(parts)} runs side by side")
    if options.readme:
        texts = {name: tables.speed(values).markdown() for name, values in benchmarks.items()}
        if tries is not None:
            texts["faults"] = tables.faults(tries).markdown()
        for part in parts:
            texts |= readme_texts(part, reference)
        fill_readme(options.readme, texts)
    return 0


def readme_texts(part: "RunPart", reference: Mapping[str, Any]) -> dict[str, str]:
    """What a README can hold of a run, by the name between its marks."""
    from jaxnorm import tables

    texts = {}
    if "results" in part.tables:  # not where the metrics are damaged
        texts[part.title] = part.tables["results"].markdown()
    texts[f"{part.title} finding"] = tables.escaped(part.finding) + "\n"
    for name in ("differences", "values"):
        if name in part.tables:
            texts[f"{part.title} {name}"] = part.tables[name].markdown()
    if reference and part.run.info.config.arch == "original":
        beside = tables.comparison(part.run, reference)
        texts[f"{part.title} beside others"] = beside.markdown()
    return texts


def _merge(sources: "list[RunDirectory]", options: Options) -> "RunDirectory":
    from jaxnorm import data, effects, figures
    from jaxnorm.records import RunDirectory
    from jaxnorm.results import Run

    assert options.merge is not None
    info = sources[0].info()
    RunDirectory.check_unused(options.merge)
    dataset = data.load(
        info.config.dataset, options.data_dir, allow_unverified=options.allow_unverified
    )
    if dataset.fingerprint != info.dataset["fingerprint"]:
        raise UserError(f"the data found is not what {sources[0].path} was trained on")
    directory = RunDirectory.create(options.merge)
    homes = directory.take(sources)
    effects.record(directory, dataset, homes)
    figures.save_examples(Run(directory), dataset)
    return directory


def read_reference(path: Path | None) -> dict[str, Any]:
    """{source: {norm: {"test_accuracy": [...]}}}, fractions by epoch; empty without a path."""
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text())
        for norms in values.values():
            for norm in norms.values():
                accuracies = norm["test_accuracy"]
                assert isinstance(accuracies, list)
                assert accuracies
                assert all(0 <= each <= 1 for each in accuracies)
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError),
        RecursionError,
    ):
        raise UserError(f"--reference {path} cannot be read as others' results") from None
    return values


def fill_readme(path: Path, texts: Mapping[str, str]) -> None:
    """Puts each text between its marks.

    Raises `UserError` where there are no marks, or marks of what was not given.
    """
    try:
        old = path.read_text()
    except OSError as error:
        raise UserError(f"--readme {path} cannot be read: {error.strerror}") from None
    marked = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    names = [found[2] for found in marked.finditer(old)]
    if not names:
        raise UserError(
            f"--readme {path} has no <!-- table {next(iter(texts))} --> ... <!-- end -->"
        )
    if unknown := [name for name in names if name not in texts]:
        raise UserError(
            f"--readme {path} has a table {unknown[0]!r}, which none of the given runs and "
            f"benchmarks makes: they make {', '.join(texts)}"
        )
    path.write_text(marked.sub(lambda found: f"{found[1]}\n{texts[found[2]]}\n{found[3]}", old))


if __name__ == "__main__":
    cli.leave(cli.run(app))
