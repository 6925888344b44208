"""TensorBoard, an extra (`pip install '.[tensorboard]'`): `tensorboard --logdir RUN` shows it."""

import importlib.util
from typing import Any

from jaxnorm.config import Config, UserError
from jaxnorm.records import Epoch
from jaxnorm.storage.sweep import Sweep, name_of
from jaxnorm.training.fit import Callback


def require_tensorboard() -> None:
    """Raises `UserError` if the extra is not installed."""
    if not importlib.util.find_spec("tensorboardX"):
        raise UserError(
            "tensorboard=True needs an extra: pip install '.[tensorboard]' (or tensorboardX)"
        )


class TensorBoard(Callback):
    """Writes each epoch's losses and accuracies under the folder `tensorboard` of a run or sweep,
    one folder for each net, by names that lay the norms over each other. In a sweep the folder
    names the run too.
    """

    def __init__(self, sweep: Sweep) -> None:
        from tensorboardX import SummaryWriter

        self.sweep, self.directory = sweep, sweep.folder.path / "tensorboard"
        self._make_writer, self._writers = SummaryWriter, {}

    def on_resume(self, complete: int) -> None:
        """Writes the epochs of nets that were trained without it."""
        before = {path.name for path in self.directory.glob("*")}
        for config, directory in zip(self.sweep.configs, self.sweep.directories, strict=True):
            for epoch in directory.epochs():
                if self._name(config, epoch) not in before:
                    self.on_epoch(config, epoch)

    def _name(self, config: Config, epoch: Epoch) -> str:
        of_run = f"{name_of(config)}-" if len(self.sweep.configs) > 1 else ""
        return f"{of_run}{epoch.norm}-{epoch.seed}"

    def on_epoch(self, config: Config, epoch: Epoch) -> None:
        """Writes the epoch's scalars and has them on disk."""
        name = self._name(config, epoch)
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
