"""A sweep: the runs of one command, which differ in the settings of `SWEPT` alone.

On disk it is a folder with `sweep.json` and a run directory for each run, each a run like any
other. A run alone is a sweep of one, whose folder is the run directory itself.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxnorm.config import (
    OF_NORMS,
    SWEPT,
    Config,
    NetId,
    SweptNet,
    UserError,
    differing,
    local_path,
    swept_nets,
    typed,
    value_text,
)
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import NetFolder

_FILE = "sweep.json"
_SHORT = {"batch_size": "batch", "learning_rate": "rate", "weight_decay": "decay"}


@typed
class SweepInfo:
    """`sweep.json`; raises `UserError` if these are not the runs of one sweep."""

    command: str
    runs: list[Config]

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("it holds no runs")
        first = {name: getattr(self.runs[0], name) for name in SWEPT}
        same = all(dataclasses.replace(run, **first) == self.runs[0] for run in self.runs)
        if not same or len(set(names_of(self.runs))) < len(self.runs):
            raise UserError("these are not the runs of one sweep")


def names_of(configs: Sequence[Config]) -> list[str]:
    """Returns the folder of each run of a sweep: its batch size, learning rate and weight decay,
    unless that is 0, and each setting of the norms that differs between the runs.
    """
    shown = [name for name in SWEPT if name not in OF_NORMS or name in differing(configs)]
    names = []
    for config in configs:
        values = {name: getattr(config, name) for name in shown}
        values["learning_rate"] = config.rate_text
        if not config.weight_decay:
            del values["weight_decay"]
        parts = (f"{_SHORT.get(name, name)}-{value_text(v)}" for name, v in values.items())
        names.append("-".join(parts))
    return names


def folder_of(path: Path | str) -> Path:
    """Returns the folder of a run or sweep, or of its `run.json`, `sweep.json` or `nets`."""
    path, records = local_path(path), ("run.json", _FILE)
    if any((path / name).exists() for name in records):
        return path
    return path.parent if path.name in (*records, "nets") else path


class Sweep:
    """The runs in a folder: `directories[i]` holds the run of `configs[i]`."""

    def __init__(self, path: Path | str, configs: Sequence[Config]) -> None:
        self.folder, self.configs = RunDirectory(path), list(configs)
        self.directories = [self.folder]
        if len(configs) > 1:
            names = map(self.folder.path_of, names_of(configs))
            self.directories = [RunDirectory(path) for path in names]

    @classmethod
    def open(cls, path: Path | str) -> "Sweep":
        """Opens a sweep, or a run; raises `UserError` if it is neither."""
        folder = RunDirectory(folder_of(path))
        if folder.path_of(_FILE).exists():
            return cls(folder.path, folder.read_json(_FILE, SweepInfo).runs)
        return cls(folder.path, [folder.info().config])

    def exists(self) -> bool:
        """Returns whether it has begun."""
        return self.folder.path_of(_FILE).exists() or self.folder.exists()

    def net(self, net: SweptNet) -> NetFolder:
        """Returns the folder of a net."""
        return NetFolder(self.directories[net.run], NetId(net.norm, net.seed))

    @property
    def nets(self) -> list[SweptNet]:
        """Every net of every run, in order."""
        return swept_nets(self.configs)

    def ended(self, net: SweptNet) -> bool:
        """Returns whether a net has been trained to its last epoch, or diverged."""
        return self.net(net).ended(self.configs[net.run].epochs)

    def trained(self, net: SweptNet) -> bool:
        """Returns whether a net has been trained to its last epoch."""
        return self.net(net).trained(self.configs[net.run].epochs)

    def info(self, command: str) -> SweepInfo | None:
        """Returns the `sweep.json` to write, if there are several runs: it says which, before any
        of them begins or grows, so that a sweep that is killed meanwhile resumes.

        Raises `UserError` if there is one of other runs.
        """
        alone = len(self.configs) == 1
        if self.exists() and alone != self.folder.exists():
            raise UserError(f"{self.folder.path} holds {'a sweep' if alone else 'one run'}")
        if alone:
            return None
        if self.folder.path_of(_FILE).exists():
            info = self.folder.read_json(_FILE, SweepInfo)
            command = info.command
            if names_of(info.runs) != names_of(self.configs):
                raise UserError(f"{self.folder.path} is a sweep of other runs")
        return SweepInfo(command, self.configs)

    def write_info(self, info: SweepInfo | None) -> None:
        """Writes `sweep.json`."""
        if info is not None:
            self.folder.write_json(_FILE, info)
