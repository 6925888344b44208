"""A sweep: the runs of one command, which differ in the settings of `SWEPT` alone.

On disk it is a folder with `sweep.json` and a run directory for each run, each a run like any
other. A run alone is a sweep of one, whose folder is the run directory itself.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxnorm.config import SWEPT, Config, UserError, local_path, typed, value_text
from jaxnorm.storage.directory import RunDirectory

_FILE = "sweep.json"
_SHORT = {"batch_size": "batch", "learning_rate": "rate", "weight_decay": "decay"}


@typed
class SweepInfo:
    """`sweep.json`; raises `UserError` where these are not the runs of one sweep."""

    command: str
    runs: list[Config]

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("it holds no runs")
        first = {name: getattr(self.runs[0], name) for name in SWEPT}
        same = all(dataclasses.replace(run, **first) == self.runs[0] for run in self.runs)
        if not same or len({name_of(run) for run in self.runs}) < len(self.runs):
            raise UserError("these are not the runs of one sweep")


def name_of(config: Config) -> str:
    """The folder of a run of a sweep: its settings of `SWEPT` that are not zero."""
    values = {_SHORT.get(name, name): getattr(config, name) for name in SWEPT}
    values["rate"] = config.rate_text
    return "-".join(f"{name}-{value_text(value)}" for name, value in values.items() if value)


def folder_of(path: Path | str) -> Path:
    """The folder of a run or sweep; its `run.json`, `sweep.json` or `checkpoints` stands for it."""
    path, records = local_path(path), ("run.json", _FILE)
    if any((path / name).exists() for name in records):
        return path
    return path.parent if path.name in (*records, "checkpoints") else path


class Sweep:
    """The runs in a folder: `directories[i]` holds the run of `configs[i]`."""

    def __init__(self, path: Path | str, configs: Sequence[Config]) -> None:
        self.folder, self.configs = RunDirectory(path), list(configs)
        self.directories = [self.folder]
        if len(configs) > 1:
            self.directories = [RunDirectory(self.folder.path / name_of(c)) for c in configs]

    @classmethod
    def create(cls, path: Path, configs: Sequence[Config], command: str) -> "Sweep":
        """Makes the folder, private to the user. Raises `UserError`."""
        info, folder = SweepInfo(command, list(configs)), RunDirectory.create(path)
        if len(configs) > 1:
            folder.write_json(_FILE, info)
        return cls(path, configs)

    @classmethod
    def open(cls, path: Path | str) -> "Sweep":
        """Opens a sweep, or a run; raises `UserError` where it is neither."""
        folder = RunDirectory(folder_of(path))
        if folder.path_of(_FILE).exists():
            return cls(folder.path, folder.read_json(_FILE, SweepInfo).runs)
        return cls(folder.path, [folder.info().config])

    def finished(self) -> set[tuple[int, str, int]]:
        """The nets that are at their last epoch: the number of their run, their norm and seed."""
        nets = set()
        for i, (config, directory) in enumerate(zip(self.configs, self.directories, strict=True)):
            lines, _ = directory.read_epochs()
            last = {line.net for line in lines if line.epoch == config.epochs}
            nets |= {(i, *net) for net in last.intersection(config.nets)}
        return nets

    def record_growth(self) -> None:
        """Writes to `sweep.json` how far its runs will grow, before any of them does, so that a
        sweep that is killed meanwhile resumes. To be called under the lock.
        """
        if self.folder.path_of(_FILE).exists():
            info = self.folder.read_json(_FILE, SweepInfo)
            if info.runs != self.configs:
                self.folder.write_json(_FILE, dataclasses.replace(info, runs=self.configs))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training it (see `RunDirectory.locked`)."""
        with contextlib.ExitStack() as stack:
            for directory in dict.fromkeys((self.folder, *self.directories)):
                directory.path.mkdir(mode=0o700, exist_ok=True)
                stack.enter_context(directory.locked())
            yield
