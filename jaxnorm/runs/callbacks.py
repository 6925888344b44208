"""TensorBoard, an extra (`pip install '.[tensorboard]'`): `tensorboard --logdir RUN` shows it."""

from pathlib import Path
from typing import Any

from jaxnorm.config import Config, UserError
from jaxnorm.storage.schema import Epoch
from jaxnorm.storage.sweep import name_of
from jaxnorm.training.trainer import Callback


class TensorBoard(Callback):
    """Writes each epoch's losses and accuracies under `directory`, one folder for each net, by
    names that lay the norms over each other. In a sweep the folder names the run too.

    Raises `UserError` where the extra is not installed.
    """

    def __init__(self, directory: Path, sweep: bool = False) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard=True needs an extra: pip install '.[tensorboard]' (or tensorboardX)"
            ) from None
        self.directory, self.sweep = directory, sweep
        self._make_writer, self._writers = SummaryWriter, {}

    def on_epoch(self, config: Config, epoch: Epoch) -> None:
        """Writes the epoch's scalars and has them on disk."""
        name = f"{f'{name_of(config)}-' if self.sweep else ''}{epoch.norm}-{epoch.seed}"
        if name not in self._writers:
            self._writers[name] = self._make_writer(str(self.directory / name))
        writer: Any = self._writers[name]
        for field, value in vars(epoch).items():
            if value is not None and field.endswith(("_loss", "_accuracy")):
                split, _, what = field.partition("_")
                writer.add_scalar(f"{what}/{split}", value, epoch.epoch)
        writer.flush()

    def close(self) -> None:
        """Closes every file."""
        for writer in self._writers.values():
            writer.close()
