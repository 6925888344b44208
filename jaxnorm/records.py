"""A run directory: what its files are called, how they are written, and how they are read back.

Every file but `metrics.jsonl` is written to a temporary name and renamed; `metrics.jsonl` gains one
line an epoch, and a half line at its end (a killed process) is dropped, never guessed at. Nothing
here trains or draws.
"""

import dataclasses
import io
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxnorm.config import Config, Norm, UserError


@dataclass(frozen=True)
class Epoch:
    """One line of `metrics.jsonl`. Accuracies are fractions; epochs count from 1; the first epoch's
    time holds compilation.

    `train_loss` and `train_accuracy` are over the epoch's batches as they were trained on, with
    dropout, while the net changes.
    """

    norm: Norm
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    train_seconds: float
    test_seconds: float


@dataclass(frozen=True)
class RunInfo:
    """`run.json`: the settings, and all that is known of the data and the machine."""

    config: Config
    parameters: dict[str, int]
    """Of each norm's net."""
    dataset: dict[str, Any]
    """name, caption, fingerprint, source, verified, class_names, mean, deviation, train_count,
    test_count
    """
    versions: dict[str, str]
    device: str
    git_revision: str | None
    started: str
    command: str


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str) -> "RunDirectory":
        """Makes a new run directory, private to the user.

        A path that is used or cannot be written raises `UserError`.
        """
        path = Path(path)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"--out {path} is already used: choose another directory")
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from None
        return cls(path)

    # what is in it

    def info(self) -> RunInfo:
        """Reads `run.json`; raises `UserError` where it, or a field of it, is missing or wrong."""
        values = _read_json(self.path / "run.json")
        names = {field.name for field in dataclasses.fields(RunInfo)}
        if not isinstance(values, dict) or values.keys() != names:
            raise UserError(
                f"{self.path / 'run.json'} was not written by this version of jaxnorm: its fields "
                f"are not {', '.join(sorted(names))}"
            )
        try:
            return RunInfo(**{**values, "config": Config.from_json(values["config"])})
        except UserError as error:
            raise UserError(f"{self.path / 'run.json'}: {error}") from None

    def epochs(self) -> list[Epoch]:
        """Reads `metrics.jsonl`, in order; a half line at its end is dropped."""
        path = self.path / "metrics.jsonl"
        try:
            text = path.read_text()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        return [
            _epoch(line, f"{path} line {number}")
            for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1)
        ]

    def step_losses(self, norm: str, seed: int) -> np.ndarray:
        """The training loss of every batch so far: f32[epochs * steps]."""
        return self._load(self._step_losses(norm, seed))

    def predictions(self, norm: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32[N, classes] of the test images after the newest epoch, and their labels
        i32[N].
        """
        stored = self._load(self._predictions(norm, seed))
        return stored["logits"], stored["labels"]

    def examples(self) -> dict[str, np.ndarray]:
        """The pictures kept for figures: arrays by name (see `figures.save_examples`)."""
        return self._load(self.path / "examples.npz")

    def checkpoints(self, norm: str, seed: int) -> Path:
        """The Orbax directory of a norm and seed."""
        return self.path / "checkpoints" / f"{norm}-{seed}"

    # writing

    def write_info(self, info: RunInfo) -> None:
        """Writes `run.json`."""
        values = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)} | {
            "config": info.config.to_json()
        }
        self.write_bytes("run.json", (json.dumps(values, indent=2) + "\n").encode())

    def append_epoch(self, epoch: Epoch) -> None:
        """Adds a line to `metrics.jsonl` and waits until it is on disk."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(epoch)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_step_losses(self, norm: str, seed: int, losses: np.ndarray) -> None:
        """Writes the losses of every batch so far."""
        buffer = io.BytesIO()
        np.save(buffer, losses)
        self.write_bytes(self._step_losses(norm, seed).relative_to(self.path), buffer.getvalue())

    def write_predictions(
        self, norm: str, seed: int, logits: np.ndarray, labels: np.ndarray
    ) -> None:
        """Writes the newest test logits."""
        self.write_arrays(
            self._predictions(norm, seed).relative_to(self.path),
            {"logits": logits, "labels": labels},
        )

    def write_arrays(self, name: Path | str, arrays: dict[str, np.ndarray]) -> None:
        """Writes a compressed .npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self.write_bytes(name, buffer.getvalue())

    def write_bytes(self, name: Path | str, content: bytes) -> None:
        """Writes a file of the run under a temporary name and renames it."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _step_losses(self, norm: str, seed: int) -> Path:
        return self.path / "step_losses" / f"{norm}-{seed}.npy"

    def _predictions(self, norm: str, seed: int) -> Path:
        return self.path / "predictions" / f"{norm}-{seed}.npz"

    @staticmethod
    def _load(path: Path) -> Any:
        try:
            stored = np.load(path, allow_pickle=False)
            return (
                stored
                if isinstance(stored, np.ndarray)
                else {name: stored[name] for name in stored.files}
            )
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(f"{path} is damaged: {type(error).__name__}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a run directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _epoch(line: str, where: str) -> Epoch:
    try:
        values = json.loads(line)
        epoch = Epoch(**values)
    except (ValueError, TypeError):
        raise UserError(f"{where} is not an epoch's record") from None
    numbers = [value for name, value in values.items() if name not in ("norm", "seed", "epoch")]
    valid = all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
    valid &= all(
        type(value) is int for value in (epoch.seed, epoch.epoch)
    ) and epoch.norm in get_args(Norm)
    if not valid:
        raise UserError(f"{where} has a field of the wrong kind")
    return epoch
