"""The report, made from run directories alone: `report.md`, and `report.html`, one file that needs
nothing else, no network and no script.

A run that is unfinished or damaged is reported as far as it goes, with what is missing named.
"""

import base64
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from jaxnorm.analysis import findings, tables
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.tables import Table
from jaxnorm.config import UserError, named
from jaxnorm.storage.directory import RunDirectory

if TYPE_CHECKING:
    from jaxnorm.analysis.figures import Chart

MOST_LINES = 10
"""Unfinished nets that are named one by one; more of them are one line."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class RunPart:
    """The part of a page that shows one run."""

    title: str
    run: Run
    charts: list["Chart"] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    headline: str = ""
    finding: str = ""
    norms: list[str] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)

    def attempt(self, make: Callable[[], Any], otherwise: Any) -> Any:
        """Calls `make`; if a record is missing or damaged, notes it and returns `otherwise`."""
        try:
            return make()
        except (UserError, OSError) as error:
            self.note(error)
            return otherwise

    def note(self, what: object) -> None:
        """Names a record that is missing or damaged, once."""
        if (line := tables.printable(str(what))) not in self.missing:
            self.missing.append(line)

    @property
    def accuracy(self) -> list["Chart"]:
        """The figure that stands beside the finding, if it could be drawn."""
        return [chart for chart in self.charts if chart.name == "accuracy"]

    def charts_of(self, norm: str | None) -> list["Chart"]:
        """The other figures of one norm; with None those of all norms together."""
        ends = tuple(f"-{one}" for one in self.norms) if norm is None else f"-{norm}"
        others = [chart for chart in self.charts if chart not in self.accuracy]
        return [chart for chart in others if chart.name.endswith(ends) == (norm is not None)]


def write(directory: RunDirectory, title: str | None = None) -> RunPart:
    """Draws the figures of a run and writes them, its `report.md` and its `report.html`.

    Raises `UserError` if `run.json` cannot be read.
    """
    return finish(gather(Run(directory), title))


def write_first(part: RunPart) -> None:
    """Writes the page of a run whose figures are yet to be drawn, which says so."""
    path = shlex.quote(str(part.run.directory.path))
    pending = "the figures are being drawn: load this page again in a few seconds; if they do not "
    pending += f"come, python -m jaxnorm.report {path} draws them"
    first = replace(part, missing=[tables.printable(pending), *part.missing])
    part.run.directory.write_text("report.md", markdown(first))
    part.run.directory.write_text("report.html", html([first]))


def finish(part: RunPart) -> RunPart:
    """Draws the figures of a part that `gather` returned, and writes all files of its report."""
    directory = _draw(part).run.directory
    for chart in part.charts:
        directory.write_bytes(f"figures/{chart.name}.png", chart.png)
    directory.write_text("report.md", markdown(part))
    directory.write_text("report.html", html([part]))
    directory.write_text("metrics.csv", part.run.csv())
    return part


def read(directory: RunDirectory, title: str | None = None) -> RunPart:
    """Draws the figures of a run and collects what its report shows; writes nothing.

    Raises `UserError` if `run.json` cannot be read.
    """
    return _draw(gather(Run(directory), title))


def _draw(part: RunPart) -> RunPart:
    """Adds the figures to a part, and what they miss."""
    from jaxnorm.analysis import figures  # with Matplotlib, which the first page does without

    part.charts, missing = figures.draw(part.run)
    part.missing = [*dict.fromkeys([*map(tables.printable, missing), *part.missing])]
    return part


def gather(run: Run, title: str | None = None) -> RunPart:
    """Collects what the report of a run shows besides figures.

    Raises `UserError` if `run.json` cannot be read.
    """
    part = RunPart(title or run.directory.path.absolute().name, run)
    nets, last = run.info.config.nets, run.info.config.epochs
    for line in run.damaged:
        part.note(line)
    unfinished = [net for net in nets if net not in run.finished]
    if len(unfinished) > MOST_LINES:
        part.note(
            f"{len(unfinished):,} of {len(nets):,} nets are not finished, so they are left out"
        )
        unfinished = []
    for net in unfinished:
        left, diverged = last - len(run.epochs.get(net, ())), part.attempt(run.net(*net).lost, None)
        why = f": {left} of {last} epochs are missing" if left else ": its result is missing"
        if diverged is not None:
            why = f", diverged in epoch {diverged.epoch}"
        part.note(f"{named(net.norm)}, seed {net.seed}{why}, so this net is left out")
    part.norms = part.attempt(lambda: run.norms, [])
    part.headline = part.attempt(lambda: findings.headline(run), "")
    part.finding = part.attempt(lambda: findings.finding(run), "")
    for make in tables.TABLES:
        table = part.attempt(lambda make=make: make(run), None)
        if table is not None and table.rows:
            part.tables[make.__name__] = table
    return part


def markdown(part: RunPart) -> str:
    """Returns the report of one run in Markdown."""
    lines = [f"# {tables.escaped(part.title)}", tables.escaped(part.finding)]
    for table in part.tables.values():
        lines += [f"## {table.title}", table.markdown().rstrip()]
    if part.missing:
        lines += ["## Missing", *(f"- {tables.escaped(line)}" for line in part.missing)]
    lines.append("## Figures")
    lines += [f"![{tables.escaped(c.title)}](figures/{c.name}.png)" for c in part.charts]
    return CONTROL.sub(" ", "\n\n".join(line for line in lines if line) + "\n")


def html(parts: Sequence[RunPart], missing: Sequence[str] = ()) -> str:
    """Returns a page of one run, or of several side by side. Text of the records is escaped."""
    if len(parts) > 1:
        titles = distinct([part.run.directory.path for part in parts])
        parts = [replace(part, title=title) for part, title in zip(parts, titles, strict=True)]
    several = [(part.title, part.run) for part in parts] if len(parts) > 1 else []
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxnorm.analysis", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        parts=parts,
        missing=list(map(tables.printable, missing)),
        side_by_side=tables.side_by_side(several) if several else None,
        address=lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
    )
    return CONTROL.sub(" ", page)


def distinct(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each path that no other has: a folder's name, mostly."""
    whole = [path.resolve().parts for path in paths]
    names = []
    for parts in whole:
        lengths = range(1, len(parts))
        ends = (n for n in lengths if sum(other[-n:] == parts[-n:] for other in whole) == 1)
        names.append("/".join(parts[-next(ends, len(parts) - 1) :]))
    return names


def write_together(path: Path, parts: Sequence[RunPart], missing: Sequence[str]) -> None:
    """Writes one page of several runs side by side."""
    RunDirectory(path.parent).write_text(path.name, html(parts, missing))
