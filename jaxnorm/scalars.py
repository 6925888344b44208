"""TensorBoard's view of a run: the scalars of every epoch, for `tensorboard --logdir RUN`.

An extra (`pip install '.[tensorboard]'`): nothing else needs it.
"""

from pathlib import Path
from typing import Any

from jaxnorm.config import Config, UserError
from jaxnorm.observers import Observer
from jaxnorm.records import Epoch
from jaxnorm.sweep import name_of


class Scalars(Observer):
    """Writes each epoch's losses and accuracies under `directory`, one folder for each norm and
    seed (in a sweep for each run's), by names that lay the norms over each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._writers, self._run = directory, {}, ""

    @staticmethod
    def check() -> None:
        """Raises `UserError` where the extra is not installed."""
        _writer_class()

    def on_run(self, number: int, config: Config) -> None:
        """Names the run that the next epochs are of."""
        self._run = f"{name_of(config)}-"

    def on_epoch(self, epoch: Epoch) -> None:
        """Writes the epoch's scalars and has them on disk."""
        name = f"{self._run}{epoch.norm}-{epoch.seed}"
        if name not in self._writers:
            self._writers[name] = _writer_class()(str(self.directory / name))
        writer = self._writers[name]
        for field, value in epoch.to_json().items():
            if field.endswith(("_loss", "_accuracy")):
                split, _, what = field.partition("_")
                writer.add_scalar(f"{what}/{split}", value, epoch.epoch)
        writer.flush()

    def close(self) -> None:
        """Closes every file."""
        for writer in self._writers.values():
            writer.close()


def _writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs an extra: pip install '.[tensorboard]' (or tensorboardX)"
        ) from None
    return SummaryWriter
