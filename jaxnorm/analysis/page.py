"""The report that a person reads, made from run directories alone: `report.md`, and `report.html`,
one file that needs nothing else, no network and no script.

A run that is unfinished or damaged is reported as far as it goes, with what is missing named.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from jaxnorm.analysis import figures, tables
from jaxnorm.analysis.results import Grid, Run
from jaxnorm.analysis.tables import Table
from jaxnorm.config import UserError
from jaxnorm.storage.directory import RunDirectory


@dataclass(frozen=True)
class Chart:
    """A figure as the page holds it."""

    stem: str
    title: str
    address: str


@dataclass
class RunPart:
    """What the page shows of one run."""

    title: str
    run: Run
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    finding: str = ""
    tables: dict[str, Table] = field(default_factory=dict)
    confusion: dict[str, Table] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)

    def attempt(self, make: Callable[[], Any]) -> Any:
        """What `make` gives, or None where a record of it is missing or damaged, which is noted."""
        try:
            return make()
        except (UserError, OSError) as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return None

    def charts_of(self, norm: str) -> list[Chart]:
        """The figures of one norm; its mistakes and confusion are shown as tiles and tables."""
        return [chart for chart in self.charts if chart.stem == f"curves-{norm}"]

    @property
    def common_charts(self) -> list[Chart]:
        """The figures of all norms together."""
        own = ("curves-", "mistakes-", "confusion-", "training-images")
        return [chart for chart in self.charts if not chart.stem.startswith(own)]

    @property
    def photos(self) -> list[Chart]:
        """The figure of training images."""
        return [chart for chart in self.charts if chart.stem == "training-images"]


def write(directory: RunDirectory, title: str | None = None) -> RunPart:
    """Draws the figures of a run anew, and writes its `report.md` and `report.html`.

    Raises `UserError` where `run.json` cannot be read.
    """
    part = read(directory, title)
    directory.write_bytes("report.md", markdown(part).encode())
    directory.write_bytes("report.html", html([part]).encode())
    return part


def read(directory: RunDirectory, title: str | None = None) -> RunPart:
    """Draws the figures of a run anew, and collects what its report shows.

    Raises `UserError` where `run.json` cannot be read.
    """
    run = Run(directory)
    part = RunPart(title or directory.path.absolute().name, run)
    config = run.info.config
    drawn, part.missing = figures.draw(run)
    for name, caption in drawn.items():
        content = (directory.path / "figures" / name).read_bytes()
        part.charts.append(Chart(Path(name).stem, caption, _address(content)))
    for norm, seed in config.nets:
        done = len(part.attempt(lambda n=(norm, seed): run.epochs.get(n, [])) or [])
        if done < config.epochs:
            part.missing.append(
                f"{norm} norm, seed {seed}: {config.epochs - done} of {config.epochs} epochs "
                "are missing"
            )
    part.finding = part.attempt(lambda: tables.finding(run)) or ""
    for make in tables.TABLES:
        table = part.attempt(lambda make=make: make(run))
        if table is not None and table.rows:
            part.tables[make.__name__] = table
    for norm in part.attempt(lambda: run.norms) or []:
        table = part.attempt(lambda norm=norm: tables.confusion(run, norm))
        if table is not None:
            part.confusion[norm] = table
    part.grids = part.attempt(lambda: run.mistakes) or []
    return part


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _address(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def markdown(part: RunPart) -> str:
    """The report of one run in Markdown."""
    lines = [f"# {tables.escaped(part.title)}", tables.escaped(part.finding)]
    for table in part.tables.values():
        lines += [f"## {table.title}", table.markdown().rstrip()]
    if part.missing:
        lines += ["## Missing", *(f"- {tables.escaped(line)}" for line in part.missing)]
    lines.append("## Figures")
    lines += [
        f"![{tables.escaped(chart.title)}](figures/{chart.stem}.png)" for chart in part.charts
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def html(
    parts: Sequence[RunPart], missing: Sequence[str] = (), charts: Sequence[Chart] = ()
) -> str:
    """One page of one run, or of several side by side. Text of the records is escaped."""
    several = {part.title: part.run for part in parts} if len(parts) > 1 else {}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxnorm.analysis", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        parts=parts,
        missing=list(missing),
        charts=list(charts),
        side_by_side=tables.side_by_side(several) if several else None,
        shade=_shade,
        address=lambda image: _address(_png(image)),
        alternative=_alternative,
    )


def _alternative(chart: Chart) -> str:
    """What stands for a picture where it is not seen."""
    if chart.stem == "training-images":
        return f"{chart.title}, drawn by the seed, each with its class."
    return f"Chart: {chart.title}."


def _shade(count: str, row: Sequence[str]) -> int:
    """How large a share of its row of a confusion matrix a cell is, in steps of a tenth."""
    total = sum(float(each) for each in row[1:])
    return round(10 * float(count) / total) if total else 0


def write_together(path: Path, parts: Sequence[RunPart], missing: Sequence[str]) -> None:
    """Writes one page of several runs side by side; where they differ in their batch size alone,
    with a figure of its effect.
    """
    charts = []
    effect = batch_size_effect([part.run for part in parts])
    if effect:
        _, figure = figures.batch_sizes(effect, parts[0].run.info.dataset.caption)
        charts.append(Chart("batch-sizes", figures.title_of(figure), _address(figures.png(figure))))
    RunDirectory(path.parent).write_bytes(path.name, html(parts, missing, charts).encode())


def batch_size_effect(runs: Sequence[Run]) -> Mapping[str, Mapping[int, Sequence[float]]]:
    """{norm: {batch size: the last test accuracy of each seed}} of runs that differ in nothing but
    their norms, seeds and batch sizes; empty where they do not, or have only one size.
    """

    def rest(run: Run) -> tuple:
        """All but what may differ."""
        values = vars(run.info.config)
        kept = {k: v for k, v in values.items() if k not in ("norm", "seed", "seeds", "batch_size")}
        return (run.info.dataset.fingerprint, *sorted(kept.items()))

    sizes = {run.info.config.batch for run in runs}
    if len(sizes) < 2 or len({rest(run) for run in runs}) > 1:
        return {}
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for norm in run.summaries:
            by_size = found.setdefault(norm, {})
            by_size.setdefault(run.info.config.batch, []).extend(run.sample(norm).values)
    return found
