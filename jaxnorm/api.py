"""The study from Python: train to disk, and ask a run what it found."""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxnorm import job
from jaxnorm.analysis import figures, findings, results, tables
from jaxnorm.analysis.figures import Chart
from jaxnorm.analysis.tables import Table
from jaxnorm.config import Config
from jaxnorm.data import datasets
from jaxnorm.data.datasets import Dataset
from jaxnorm.runs import callbacks, environment, runner
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep, folder_of
from jaxnorm.training import fit
from jaxnorm.training import mesh as meshes
from jaxnorm.training.experiment import Experiment


class Markdown(str):
    """Text that a notebook shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return tables.escaped(self)


class Run:
    """A run on disk, and what one asks of it: `Run(path).finding`, `.results`, `.differences`,
    `.values`, `.figures["accuracy"]`, `.metrics`, `.predict("layer", 1)`.

    Raises `UserError` if there is no run, or if its records are damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.records = results.Run(RunDirectory(folder_of(path).absolute()))
        self.config = self.records.info.config
        self.path = self.records.directory.path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_markdown_(self) -> str:
        return f"{tables.escaped(self.finding)}\n\n{self.results.markdown()}"

    @cached_property
    def finding(self) -> Markdown:
        """The finding of the run, in words."""
        return Markdown(findings.finding(self.records))

    @cached_property
    def results(self) -> Table:
        """The last test accuracy of every norm, and when it was reached."""
        return tables.results(self.records)

    @cached_property
    def differences(self) -> Table:
        """Every two norms compared by seed: intervals over seeds and over test images too, p-values
        of a difference and of equivalence, and the probability that the next net of one is above.
        """
        return tables.differences(self.records)

    @cached_property
    def values(self) -> Table:
        """The last and the best test accuracy of every net."""
        return tables.values(self.records)

    @cached_property
    def figures(self) -> Mapping[str, Chart]:
        """The figures by name, each drawn when it is first asked for."""
        return _Figures(self.records)

    @cached_property
    def metrics(self) -> Any:
        """The epochs of every net: a pandas DataFrame if pandas is installed, else a list of dicts,
        with those columns of `jaxnorm.records.Epoch` that were measured.
        """
        rows = [epoch.values for epochs in self.records.epochs.values() for epoch in epochs]
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def predict(self, norm: str, seed: int) -> Any:
        """Returns the trained net of a norm and seed: a function from images u8[N, 32, 32, 3] to
        probabilities f32[N, classes]. Raises `UserError` if its state was not kept.
        """
        return runner.load_model(self.path, norm, seed)


class _Figures(Mapping[str, Chart]):
    """The figures of a run by name."""

    def __init__(self, run: results.Run) -> None:
        self._drawn: dict[str, Chart] = {}
        self._undrawn = figures.charts(run)

    def __getitem__(self, name: str) -> Chart:
        while name not in self._drawn:
            chart = next(self._undrawn, None)
            if chart is None:
                raise KeyError(f"{name!r} is none of {', '.join(self._drawn)}")
            self._drawn[chart.name] = chart
        return self._drawn[name]

    def __iter__(self) -> Iterator[str]:
        self._drawn |= {chart.name: chart for chart in self._undrawn}
        return iter(self._drawn)

    def __len__(self) -> int:
        return len(list(iter(self)))


def train(
    config: Config,
    dataset: Dataset | None = None,
    out: Path | str | None = None,
    quiet: bool = False,
) -> Run:
    """Trains every net of `config` to disk, after a check of this installation's arithmetic.

    `dataset` is loaded if it is not given. `out` is a new folder, `runs/<time>-...` by default; if
    it holds this very run already, the run goes on, or has ended. Shows a line an epoch, and a bar
    unless `quiet`. Raises `UserError`, and `ArithmeticError` if the loss of every net diverged.
    """
    meshes.use_all_cores()
    # A JAX that was imported before logs two errors for each program that a CPU loads.
    if jax.default_backend() != "cpu" or os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "3":
        job.keep_compiled()
    if dataset is None:
        dataset = datasets.load(config.dataset, test_split=config.test_split)
    fit.check_dataset(config, dataset)
    dataset.check_unchanged()
    sweep = Sweep(out or job.unused_out(config), [config])
    resumes = sweep.folder.exists()
    before = [sweep.folder.info().environment.mesh] if resumes else []
    experiment = Experiment([config], dataset, before=before)
    if not resumes:
        RunDirectory.create(sweep.folder.path)
    checked = "not made"
    if not all(map(sweep.ended, sweep.nets)):
        checked = job.check_arithmetic(experiment, sweep.folder.path, quiet)
    now = environment.environment("jaxnorm.train", checked)
    with contextlib.closing(callbacks.Terminal([config], len(sweep.nets), quiet)) as terminal:
        try:
            runner.run(sweep, experiment, now, [terminal], may_exist=resumes)
        except KeyboardInterrupt as error:
            error.add_note(f"complete epochs are kept: out={str(sweep.folder.path)!r} goes on")
            raise
    run = Run(sweep.folder.path)
    results.save_examples(run.records, dataset)
    return run
