"""What is shown of training: on the terminal, and in TensorBoard, an extra
(`pip install '.[tensorboard]'`): `tensorboard --logdir RUN` shows it.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from jaxnorm.config import Config, Setting, SweptNet, UserError, differing, value_text
from jaxnorm.records import Epoch
from jaxnorm.runs import signals
from jaxnorm.storage.sweep import Sweep, name_of
from jaxnorm.training.fit import Callback


class Bar:
    """One progress bar at a time on standard error, for whatever is being done; in a notebook, a
    line of the cell that changes.

    There is none if `quiet` is asked for or standard error is no terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self._disable = True if quiet else None  # None: tqdm looks whether it writes to a terminal
        self._what: str | None = None
        self._bar: Any = None
        self._cell: Any = None
        if not quiet and "ipykernel" in sys.modules:
            from IPython.display import DisplayHandle

            self._cell = DisplayHandle()
            self._show = self._cell.display

    def at(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` is reached, and stops if a signal was received."""
        signals.check()
        if what != self._what:
            self.close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, leave=False, disable=self._disable)
        self._bar.n = done
        self._bar.refresh()
        if self._cell is not None:
            self._show({"text/plain": f"{what}: {done} of {total}"}, raw=True)
            self._show = self._cell.update

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            if self._cell is not None:
                self._show({"text/plain": ""}, raw=True)
        self._what = self._bar = None


class Terminal(Callback):
    """Shows a bar inside the epoch and a line after it, with the time that is left, and stops if a
    signal was received. `nets` are trained in all; `shown` says settings as flags.
    """

    def __init__(
        self, configs: Sequence[Config], nets: int, quiet: bool, shown: Callable[[str], str] = str
    ) -> None:
        self.swept, self.total = differing(configs), nets * configs[0].epochs
        self.quiet, self.shown, self.bar = quiet, shown, Bar(quiet)
        self.what, self.steps, self.epochs = "", 0, configs[0].epochs
        self.before, self.done, self.clock = 0, 0, time.monotonic()

    def on_start(self, norm: str, seeds: list[int], steps: int) -> None:
        """Remembers what the bar is of."""
        last = f" to {seeds[-1]}" if len(seeds) > 1 else ""
        self.what, self.steps = f"{norm} norm, seed {seeds[0]}{last}", steps

    def on_steps(self, epoch: int, done: int) -> None:
        """Moves the bar."""
        self.bar.at(f"{self.what}, epoch {epoch} of {self.epochs}", done, self.steps)

    def on_measuring(self, done: int, total: int) -> None:
        """Moves a bar of its own."""
        self.bar.at("measuring inside the net", done, total)
        if done == total:
            self.bar.close()

    def on_resume(self, complete: int) -> None:
        """Says from where a run resumes."""
        self.before = complete
        if not self.quiet:
            print(f"resuming after {complete} of {self.total} epochs")

    def on_warning(self, text: str) -> None:
        """Prints it on standard error."""
        line = "".join(c if c.isprintable() else " " for c in self.shown(text))
        print(f"warning: {line}", file=sys.stderr)

    def on_epoch(self, config: Config, epoch: Any) -> None:
        """Prints the epoch's line in the bar's place."""
        self.bar.close()
        self.done += 1
        left = self.total - self.before - self.done
        seconds = (time.monotonic() - self.clock) / self.done * left
        if not self.quiet:
            print(_epoch_line(epoch, config, self.swept) + _time_left(seconds), flush=True)


def _time_left(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return ", under a minute left" if seconds else ""
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f", about {hours}{minutes % 60} min left"


def _epoch_line(epoch: Any, config: Config, swept: Sequence[str]) -> str:
    parts = [f"{epoch.norm:>8}"]
    for name in swept:
        value = config.rate(epoch.norm) if name == "learning_rate" else getattr(config, name)
        parts.append(f"{name.replace('_', ' ')} {value_text(value):<6}")
    if config.seeds > 1:
        parts.append(f"seed {epoch.seed}")
    parts.append(f"epoch {epoch.epoch:>2}/{config.epochs}")
    parts.append(f"train loss {epoch.train_loss:.4f}  accuracy {epoch.train_accuracy:6.2%}")
    if epoch.validation_accuracy is not None:
        parts.append(f"validation accuracy {epoch.validation_accuracy:6.2%}")
    parts.append(f"test loss {epoch.test_loss:.4f}  accuracy {epoch.test_accuracy:6.2%}")
    return "  ".join([*parts, f"{epoch.train_seconds + epoch.test_seconds:.1f} s"])


def require_tensorboard() -> None:
    """Raises `UserError` if the extra is not installed."""
    if not importlib.util.find_spec("tensorboardX"):
        raise UserError(
            Setting("tensorboard", True),
            " needs an extra: pip install '.[tensorboard]' (or tensorboardX)",
        )


class TensorBoard(Callback):
    """Writes each epoch's losses and accuracies under the folder `tensorboard` of a run or sweep,
    one folder for each net, by names that lay the norms over each other. In a sweep the folder
    names the run too.
    """

    def __init__(self, sweep: Sweep, nets: Sequence[SweptNet]) -> None:
        from tensorboardX import SummaryWriter

        self.sweep, self.nets, self.directory = sweep, nets, sweep.folder.path_of("tensorboard")
        self._make_writer, self._writers = SummaryWriter, {}

    def on_resume(self, complete: int) -> None:
        """Writes the epochs of nets that were trained without it."""
        before = {path.name for path in self.directory.glob("*")}
        for net in self.nets:
            config, epochs = self.sweep.configs[net.run], []
            with contextlib.suppress(UserError):  # damaged: it is set aside, and trained again
                epochs = self.sweep.net(net).epochs()
            for epoch in epochs:
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
