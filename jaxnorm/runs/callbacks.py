"""What is shown of training: on the terminal, and in TensorBoard, an extra
(`pip install '.[tensorboard]'`): `tensorboard --logdir RUN` shows it.
"""

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from jaxnorm.config import Config, Setting, SweptNet, UserError, differing, named, value_text
from jaxnorm.records import Epoch
from jaxnorm.runs import signals
from jaxnorm.runs.remaining import Remaining
from jaxnorm.storage.sweep import Sweep, names_of
from jaxnorm.training.fit import Callback


class Bar:
    """Shows on standard error what is being done, one thing at a time: a progress bar on a
    terminal, in a notebook a line of the cell that changes, elsewhere a line every `SECONDS`.

    Nothing is shown if `quiet` is asked for.
    """

    SECONDS = 5.0
    _spoken = _shown = -SECONDS  # when any bar wrote the last such line; when the last was closed

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._what: str | None = None
        self._bar: Any = None
        self._cell: Any = None
        self._lock, self._closed = threading.RLock(), threading.Event()
        if not quiet and "ipykernel" in sys.modules:
            from IPython.display import DisplayHandle

            self._cell = DisplayHandle()
            self._show = self._cell.display

    def at(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` is reached, and stops if a signal was received."""
        signals.check()
        self.show(what, done, total)

    def show(self, what: str, done: int = 0, total: int = 0) -> None:
        """Shows what is being done and, unless `total` is 0, that `done` of it is reached."""
        with self._lock:
            if what != self._what:
                self.close()
                self._open(what, total)
            self._bar.n = done
            self._bar.refresh()
        if self._cell is not None:
            text = f"{what}: {done} of {total}" if total else what
            self._show({"text/plain": text}, raw=True)
            self._show = self._cell.update

    def close(self) -> None:
        """Takes the bar away."""
        with self._lock:
            self._closed.set()
            if self._bar is not None:
                self._bar.close()
                if self._cell is not None:
                    self._show({"text/plain": ""}, raw=True)
                Bar._shown = time.monotonic()
            self._what = self._bar = None

    def said(self) -> None:
        """Notes that a line was printed: the next one is due `SECONDS` later."""
        Bar._spoken = time.monotonic()

    def _open(self, what: str, total: int) -> None:
        layout = None if total else "{desc} ({elapsed_s:.0f} s)"
        disable = True if self._quiet else None  # None: tqdm looks whether it writes to a terminal
        self._bar = tqdm(desc=what, total=total, leave=False, disable=disable, bar_format=layout)
        self._what, self._closed = what, threading.Event()
        if time.monotonic() - max(Bar._spoken, Bar._shown) > self.SECONDS:  # nothing went on before
            self.said()
        if not self._quiet and self._cell is None:
            at = self._closed, time.monotonic(), not self._bar.disable
            threading.Thread(target=self._tick, args=at, daemon=True).start()

    def _tick(self, closed: threading.Event, since: float, terminal: bool) -> None:
        """Shows every second, or writes a line every `SECONDS`, that it still goes on."""
        while True:
            wait = 1.0 if terminal else Bar._spoken + self.SECONDS - time.monotonic()
            if closed.wait(max(wait, 0.05)):
                return
            with self._lock, contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                if closed.is_set():
                    return
                if terminal:
                    self._bar.refresh()
                elif time.monotonic() - Bar._spoken >= self.SECONDS:
                    self.said()
                    done, total = self._bar.n, self._bar.total
                    count = f": {done:,} of {total:,}" if total else ""
                    text = f"{self._what}{count} ({Bar._spoken - since:.0f} s)"
                    print(text, file=sys.stderr, flush=True)


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
        self.started: set[tuple[str, int]] = set()
        programs = {(norm, config.batch_size) for config in configs for norm in config.norms}
        self.remaining = Remaining(len(programs), nets, self.epochs)
        self.bar.show("preparing the nets")

    def on_start(self, norm: str, seeds: list[int], steps: int) -> None:
        """Says what starts; a program of another norm or other batches is compiled first."""
        last = f" to {seeds[-1]}" if len(seeds) > 1 else ""
        self.what, self.steps = f"{named(norm)}, seed {seeds[0]}{last}", steps
        self.remaining.start((norm, steps), len(seeds), steps)
        first = (norm, steps) not in self.started
        self.bar.show(f"compiling the training step of {named(norm)}" if first else self.what)
        self.started.add((norm, steps))

    def on_steps(self, epoch: int, done: int) -> None:
        """Moves the bar."""
        self.remaining.steps(done)
        what = f"{self.what}, epoch {epoch} of {self.epochs}"
        self.bar.at(what, done, self.steps)
        if done == self.steps:
            self.bar.show(f"{what}: evaluating")

    def on_measuring(self, done: int, total: int) -> None:
        """Moves a bar of its own."""
        self.bar.at("measuring inside the net", done, total)
        if done == total:
            self.bar.show("writing what was measured")

    def on_resume(self, complete: int) -> None:
        """Says from where a run resumes."""
        self.remaining.resume(complete)
        if not self.quiet:
            self.bar.close()
            print(f"resuming after {complete} of {self.total} epochs")

    def on_warning(self, text: str) -> None:
        """Prints it on standard error."""
        self.bar.close()
        line = "".join(c if c.isprintable() else " " for c in self.shown(text))
        print(f"warning: {line}", file=sys.stderr)
        self.bar.show(self.what or "preparing the nets")

    def on_epoch(self, config: Config, epoch: Any) -> None:
        """Prints the epoch's line in the bar's place."""
        self.bar.close()
        seconds = self.remaining.epoch(epoch.epoch)
        if not self.quiet:
            print(_epoch_line(epoch, config, self.swept) + _time_left(seconds), flush=True)
            self.bar.said()
        ended = epoch.epoch == self.epochs
        self.bar.show("after the last epoch" if ended else self.what)

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()


def _time_left(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return ", under a minute left"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f", about {hours}{minutes % 60} min left"


def _epoch_line(epoch: Any, config: Config, swept: Sequence[str]) -> str:
    parts = [f"{epoch.norm:>{max(8, *map(len, config.norms))}}"]
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
        configs = self.sweep.configs
        of_run = f"{names_of(configs)[configs.index(config)]}-" if len(configs) > 1 else ""
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
