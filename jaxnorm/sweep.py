"""A sweep: runs that differ in batch size and learning rate alone, trained as one job.

On disk it is a folder with `sweep.json` and a run directory for each of them, each a run like any
other. What a net is worth does not depend on the sweep that it is part of.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxnorm.config import SWEPT, Config, UserError
from jaxnorm.records import RunDirectory

_FILE = "sweep.json"


def name_of(config: Config) -> str:
    """The folder of a sweep's run."""
    return f"batch-{config.batch}-rate-{config.learning_rate:g}"


def check(configs: Sequence[Config]) -> None:
    """Raises `UserError` where these are not the runs of one sweep."""
    first = {name: getattr(configs[0], name) for name in SWEPT}
    same = all(dataclasses.replace(each, **first) == configs[0] for each in configs)
    if not same or len({name_of(each) for each in configs}) < len(configs):
        raise UserError("these are not the runs of one sweep")


class SweepDirectory:
    """The folder of a sweep."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._home = RunDirectory(path)

    @staticmethod
    def is_one(path: Path | str) -> bool:
        """Whether a folder holds a sweep, and not a run."""
        return (Path(path) / _FILE).exists()

    @classmethod
    def create(cls, path: Path, configs: Sequence[Config], command: str) -> "SweepDirectory":
        """Makes the folder of a new sweep, private to the user. Raises `UserError`."""
        check(configs)
        home = RunDirectory.create(path)
        values = {"command": command, "runs": [config.to_json() for config in configs]}
        home.write_bytes(_FILE, (json.dumps(values, indent=2) + "\n").encode())
        return cls(path)

    def configs(self) -> list[Config]:
        """The settings of its runs; raises `UserError` where they are missing or wrong."""
        path = self.path / _FILE
        try:
            values = json.loads(path.read_text())
            configs = [Config.from_json(each) for each in values["runs"]]
            check(configs)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__})") from None
        return configs

    def runs(self) -> list[RunDirectory]:
        """The directories of its runs, whether they are begun or not."""
        return [RunDirectory(self.path / name_of(config)) for config in self.configs()]

    def write_summary(self, text: str) -> None:
        """Writes `sweep.md`."""
        self._home.write_bytes("sweep.md", text.encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training it (see `RunDirectory.locked`)."""
        with self._home.locked():
            for run in self.runs():
                run.path.mkdir(mode=0o700, exist_ok=True)
            yield
