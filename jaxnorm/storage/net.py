"""A net of a run on disk: a folder, in which one file commits each epoch.

`RUN/nets/<norm>-<seed>/` holds

* `state-<epoch>.msgpack`, which commits an epoch: a SHA-256, and then all that belongs to it; the
  newest two stay, the older one in case that the newer is damaged;
* `metrics.jsonl`, a copy of its lines for people, which nothing reads;
* `probes.npz`, what was measured inside the net after its last epoch;
* `result.npz`, its lines, losses and predictions, which is written last: the net has ended;
* `lost.json` instead, if the net diverged.

Whoever writes here holds the folder's lock. Nothing is repaired from a copy: a file that is damaged
is set aside, and the epoch before it counts.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from jaxnorm.config import NetId, UserError, from_json
from jaxnorm.records import Environment, Epoch, Lost, Predictions, from_lines, to_lines
from jaxnorm.storage.directory import RunDirectory, Shapes

KEPT = 2
_NAME = re.compile(r"state-([1-9]\d*)\.msgpack")
_LARGEST = 2**30
_ENVIRONMENTS = TypeAdapter(list[Environment])


class Damaged(Exception):
    """A state that does not hold what was written; says which and why."""


class Saved(NamedTuple):
    """All that belongs to an epoch of a net: its lines up to then, where they were trained, its
    state, the loss of every step so far, and the logits of the test images.
    """

    epochs: Sequence[Epoch]
    environments: Sequence[Environment]
    state: Any
    losses: np.ndarray  # f32[steps so far]
    logits: np.ndarray  # f32[N, classes]
    labels: np.ndarray  # i32[N]


class Result(NamedTuple):
    """What a net came to: its lines, where they were trained, and the loss of every step."""

    epochs: list[Epoch]
    environments: list[Environment]
    losses: np.ndarray  # f32[epochs * steps]


class NetFolder:
    """Reads and writes the folder of one net."""

    def __init__(self, run: RunDirectory, net: NetId) -> None:
        self.run, self.net, self.name = run, net, f"nets/{net.norm}-{net.seed}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Locks the net, if no other process has; yields whether it could."""
        with self.run.locked(self.name) as free:
            if free:
                self.run.remove_half_written(self.name)
            yield free

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.run.path_of(self.name)

    def ended(self, last: int) -> bool:
        """Returns whether its result is that of the epoch `last`, or the net diverged."""
        if self.trained(last):
            return True
        try:
            return self.lost() is not None
        except UserError:
            return False

    def trained(self, last: int) -> bool:
        """Returns whether it has a whole result, which is that of the epoch `last`."""
        try:
            return len(self.result().epochs) == last
        except UserError:
            return False

    def epoch(self) -> int:
        """Returns the number of its newest state's epoch, whole or not; 0 if it has none."""
        return max(self._states(), default=0)

    def complete(self, last: int) -> int:
        """Returns after which epoch it resumes: `last` if it is trained, or that of its newest
        whole state; 0 if it has none.
        """
        if self.trained(last):
            return last
        for epoch in reversed(self._states()):
            with contextlib.suppress(Damaged):
                return len(self._lines(epoch))
        return 0

    def set_aside_damaged(self, warn: Callable[[str], None]) -> None:
        """Sets a damaged result, or a damaged record that the net diverged, aside, and warns."""
        for name, read in (("result.npz", self.result), ("lost.json", self.lost)):
            if self.run.path_of(f"{self.name}/{name}").exists():
                try:
                    read()
                except UserError as error:
                    aside = self.run.set_aside(f"{self.name}/{name}")
                    warn(f"{error}; it is kept as {aside}, and made again")

    # an epoch

    def commit(self, saved: Saved) -> None:
        """Writes an epoch, and then removes all states but the newest ones. Raises OSError."""
        import flax.serialization as serialization  # with JAX, which a report does without

        values = saved._asdict() | {
            "epochs": to_lines(saved.epochs),
            "environments": _to_json(saved.environments),
            "state": serialization.to_state_dict(saved.state),
        }
        content = serialization.msgpack_serialize(values)
        epoch = len(saved.epochs)
        digest = hashlib.sha256(content).digest()
        self.run.write_bytes(self._state(epoch), digest + content)
        self.run.write_text(f"{self.name}/metrics.jsonl", to_lines(saved.epochs))
        for old in self._states():
            if not epoch - KEPT < old <= epoch:
                self.run.path_of(self._state(old)).unlink()

    def newest(self, shapes: Saved, warn: Callable[[str], None]) -> Saved | None:
        """Reads its newest whole state, None if it has none; sets damaged ones aside, and warns.

        `shapes` holds what arrays are compared with: of other ones the losses alone may be.
        """
        for epoch in reversed(self._states()):
            try:
                return self.read(epoch, shapes)
            except Damaged as error:
                aside = self.run.set_aside(self._state(epoch))
                warn(f"{error}; it is kept as {aside}, and the epoch before it counts")
        return None

    def read(self, epoch: int, shapes: Saved) -> Saved:
        """Reads the state of an epoch. Raises `Damaged`, and OSError if it cannot be read."""
        import flax.serialization as serialization
        import jax

        values, path = self._values(epoch), self.run.path_of(self._state(epoch))
        try:
            read = {
                "epochs": from_lines(values["epochs"], self.net),
                "environments": _from_json(values["environments"]),
                "state": serialization.from_state_dict(shapes.state, values["state"]),
            }
            saved = Saved(**values | read)
            losses = np.resize(saved.losses, 0)  # of any length
            got = jax.tree.map(_shape, (saved.state, losses, saved.logits, saved.labels))
            wanted = jax.tree.map(
                _shape, (shapes.state, shapes.losses, shapes.logits, shapes.labels)
            )
            fits = got == wanted and len(saved.epochs) == epoch and bool(saved.environments)
            fits &= saved.losses.ndim == 1 and len(saved.losses) % epoch == 0
            fits &= bool(np.isfinite(saved.losses).all())
        except Exception as error:  # whatever a file that passes its checksum may hold
            raise Damaged(f"{path} cannot be read ({type(error).__name__})") from None
        if not fits:
            raise Damaged(f"{path} holds another net")
        return saved

    def _values(self, epoch: int) -> dict[str, Any]:
        from flax.serialization import msgpack_restore

        path = self.run.path_of(self._state(epoch))
        content = self.run.read_bytes(self._state(epoch), _LARGEST)
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise Damaged(f"{path} is damaged: its checksum does not fit")
        try:
            return dict(msgpack_restore(content[32:]))
        except Exception as error:  # whatever a file that passes its checksum may hold
            raise Damaged(f"{path} cannot be read ({type(error).__name__})") from None

    def _lines(self, epoch: int) -> list[Epoch]:
        values = self._values(epoch)
        try:
            return from_lines(str(values["epochs"]), self.net)
        except (KeyError, UserError) as error:
            raise Damaged(f"{self.run.path_of(self._state(epoch))}: {error}") from None

    def _state(self, epoch: int) -> str:
        return f"{self.name}/state-{epoch}.msgpack"

    def _states(self) -> list[int]:
        folder = self.run.path_of(self.name)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    # the end

    def finish(self, saved: Saved, probes: dict[str, Any] | None) -> None:
        """Writes what was measured inside the net, if it was, and its result: the net has ended."""
        if probes is None:  # those of an earlier epoch are not its own
            self.run.path_of(self._file("probes")).unlink(missing_ok=True)
        else:
            self.run.write_arrays(self._file("probes"), **probes)
        self.run.write_arrays(
            self._file("result"),
            epochs=to_lines(saved.epochs),
            environments=_to_json(saved.environments),
            losses=saved.losses,
            logits=saved.logits,
            labels=saved.labels,
        )

    def lose(self, epoch: int, reason: str) -> None:
        """Writes that the net diverged, and in which epoch."""
        self.run.write_json(f"{self.name}/lost.json", Lost(epoch, reason))

    def lost(self) -> Lost | None:
        """Reads whether the net diverged."""
        name = f"{self.name}/lost.json"
        return self.run.read_json(name, Lost) if self.run.path_of(name).exists() else None

    def has_result(self) -> bool:
        """Returns whether there is a result."""
        return self.run.path_of(self._file("result")).exists()

    def result(self) -> Result:
        """Reads what the net came to; raises `UserError`."""
        shapes = {"epochs": "U", "environments": "U", "losses": "f S"}
        arrays = self.run.arrays(self._file("result"), shapes)
        path = self.run.path_of(self._file("result"))
        try:
            epochs = from_lines(str(arrays["epochs"]), self.net)
            environments = _from_json(str(arrays["environments"]))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if not epochs or not environments or len(arrays["losses"]) % len(epochs):
            raise UserError(f"{path} is damaged: its losses and lines do not fit")
        return Result(epochs, environments, arrays["losses"])

    def epochs(self) -> list[Epoch]:
        """Reads its lines, from its result or its newest whole state; raises `UserError`."""
        if self.has_result():
            epochs = self.result().epochs
            if self.epoch() <= len(epochs):  # else it has trained on since
                return epochs
        damage = None
        for epoch in reversed(self._states()):
            try:
                return self._lines(epoch)
            except Damaged as error:
                damage = damage or error
        if damage is not None:
            raise UserError(str(damage))
        return []

    def predictions(self, count: int, classes: int) -> Predictions:
        """Reads what the net says of the `count` test images; raises `UserError`, also if that is
        not what the newest line tells of.
        """
        name, labels = self._file("result"), {"labels": f"iu {count}"}
        path = self.run.path_of(name)
        wanted = labels | {"logits": f"f {count} {classes}"}
        if arrays := self.run.arrays(name, wanted, optional=True):
            _check_classes(path, classes, arrays["labels"])
            predictions = Predictions.of(arrays["logits"], arrays["labels"])
        else:
            reduced = labels | {"predicted": f"iu {count}", "calibration": "f 3"}
            reduced |= {"log_probabilities": f"f {count} 2"}
            arrays = self.run.arrays(name, reduced, optional=True)
            if not arrays:
                raise UserError(f"{path} holds no predictions of {count:,} test images")
            _check_classes(path, classes, arrays["labels"], arrays["predicted"])
            predictions = Predictions(**arrays)
        last = self.result().epochs[-1]
        if not predictions.belong_to(last):
            raise UserError(f"{path} is damaged: its predictions are not those of its last line")
        return predictions

    def probes(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """Reads what was measured inside the net (see `training.probes`): arrays of `shapes`; none
        if an earlier version measured less. Raises `UserError`.
        """
        return self.run.arrays(self._file("probes"), shapes, optional=True)

    def measured(self) -> bool:
        """Returns whether it was measured inside."""
        return self.run.path_of(self._file("probes")).exists()

    def _file(self, kind: str) -> str:
        return f"{self.name}/{kind}.npz"


def _check_classes(path: Path, classes: int, *numbers: np.ndarray) -> None:
    if any(not len(n) or n.min() < 0 or n.max() >= classes for n in numbers):
        raise UserError(f"{path} is damaged: it has labels of no class")


def _shape(array: Any) -> tuple:
    return array.shape, array.dtype


def _to_json(environments: Sequence[Environment]) -> str:
    return _ENVIRONMENTS.dump_json(list(environments)).decode()


def _from_json(text: str) -> list[Environment]:
    return from_json(list[Environment], text)
