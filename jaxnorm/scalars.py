"""TensorBoard's view of a run: the scalars of every epoch, for `tensorboard --logdir RUN`.

An extra (`pip install '.[tensorboard]'`): nothing else needs it.
"""

from pathlib import Path
from typing import Any

from jaxnorm.config import UserError
from jaxnorm.experiment import Observer
from jaxnorm.records import Epoch


class Scalars(Observer):
    """Writes each epoch's losses and accuracies under `directory`, one folder for each norm and
    seed, by names that lay the norms over each other.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._writers = directory, {}

    @staticmethod
    def check() -> None:
        """Raises `UserError` where the extra is not installed."""
        _writer_class()

    def on_epoch(self, epoch: Epoch) -> None:
        """Writes the epoch's scalars and has them on disk."""
        name = f"{epoch.norm}-{epoch.seed}"
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
