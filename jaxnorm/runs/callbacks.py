"""Callbacks beside the terminal's: several at once, and TensorBoard.

TensorBoard is an extra (`pip install '.[tensorboard]'`): `tensorboard --logdir RUN` shows it.
"""

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
        self.directory, self.sweep = directory, sweep
        self._writer_class, self._writers = self.writer_class(), {}

    @staticmethod
    def writer_class() -> Any:
        """tensorboardX's writer; raises `UserError` where the extra is not installed."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard=True needs an extra: pip install '.[tensorboard]' (or tensorboardX)"
            ) from None
        return SummaryWriter

    def on_epoch(self, config: Config, epoch: Epoch) -> None:
        """Writes the epoch's scalars and has them on disk."""
        name = f"{f'{name_of(config)}-' if self.sweep else ''}{epoch.norm}-{epoch.seed}"
        if name not in self._writers:
            self._writers[name] = self._writer_class(str(self.directory / name))
        for field, value in vars(epoch).items():
            if value is not None and field.endswith(("_loss", "_accuracy")):
                split, _, what = field.partition("_")
                self._writers[name].add_scalar(f"{what}/{split}", value, epoch.epoch)
        self._writers[name].flush()

    def close(self) -> None:
        """Closes every file."""
        for writer in self._writers.values():
            writer.close()


class Callbacks(Callback):
    """Calls several callbacks, in order."""

    def __init__(self, *callbacks: Callback) -> None:
        for name in (name for name in vars(Callback) if name.startswith("on_")):
            setattr(self, name, self._all([getattr(each, name) for each in callbacks]))

    @staticmethod
    def _all(methods: list[Any]) -> Any:
        def call(*arguments: Any) -> None:
            """Calls each."""
            for method in methods:
                method(*arguments)

        return call
