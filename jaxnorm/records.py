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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxnorm.config import ALL, Config, Norm, UserError


@dataclass(frozen=True)
class Epoch:
    """One line of `metrics.jsonl`. Accuracies are fractions; epochs count from 1; the first epoch's
    time holds compilation.

    `train_loss` and `train_accuracy` are over the epoch's batches as they were trained on, with
    dropout, while the net changes. Seeds that train in one program each have an equal share of its
    time.
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
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the two of the validation are left out where nothing was held out."""
        return {name: each for name, each in dataclasses.asdict(self).items() if each is not None}


DATASET_FIELDS = (
    "name",
    "caption",
    "fingerprint",
    "source",
    "verified",
    "class_names",
    "mean",
    "deviation",
    "train_count",
    "test_count",
)


@dataclass(frozen=True)
class RunInfo:
    """`run.json`: the settings, and all that is known of the data and the machine."""

    config: Config
    parameters: dict[str, int]
    """Of each norm's net."""
    dataset: dict[str, Any]
    """What is known of the data, by the names of `DATASET_FIELDS`."""
    versions: dict[str, str]
    device: str
    git_revision: str | None
    started: str
    command: str

    @property
    def code(self) -> dict[str, str]:
        """What code ran: the versions, with our own given by its git revision where it has one."""
        own = {"jaxnorm": self.git_revision} if self.git_revision else {}
        return {**self.versions, **own}


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raises `UserError` where `create` is known to fail, and makes nothing."""
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"--out {path} is already used: choose another directory")
            nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
        except OSError as error:
            raise UserError(f"--out {path} cannot be used: {error.strerror}") from None
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--out {path} cannot be written to: {nearest} is no writable folder")

    @classmethod
    def create(cls, path: Path) -> "RunDirectory":
        """Makes a new run directory, private to the user. Raises `UserError` where it cannot."""
        cls.check_unused(path)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from None
        return cls(path)

    # what is in it

    def info(self) -> RunInfo:
        """Reads `run.json`; raises `UserError` where it, or a field of it, is missing or wrong."""
        path = self.path / "run.json"
        values = _read_json(path)
        names = {field.name for field in dataclasses.fields(RunInfo)}
        if not isinstance(values, dict) or values.keys() != names:
            raise UserError(f"{path}: its fields are not {', '.join(sorted(names))}")
        try:
            info = RunInfo(**{**values, "config": Config.from_json(values["config"])})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if wrong := [name for name, right in _checks(info).items() if not right]:
            raise UserError(f"{path}: {', '.join(wrong)} is missing or of the wrong kind")
        return info

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
        path = self._predictions(norm, seed)
        stored = self._load(path)
        try:
            logits, labels = stored["logits"], stored["labels"]
            right = logits.ndim == 2 and labels.shape == logits.shape[:1]
        except (KeyError, IndexError):
            raise UserError(f"{path} is damaged: it does not hold logits and labels") from None
        if not right:
            raise UserError(f"{path} is damaged: its logits and labels do not fit together")
        return logits, labels

    def effects(self, norm: str, seed: int) -> dict[str, np.ndarray]:
        """What was measured inside a trained net, by name (see `effects.measure`)."""
        path = self._effects(norm, seed)
        stored = self._load(path)
        layers, kernels, sizes = (
            np.size(stored[name]) if name in stored else -1
            for name in ("layers", "kernels", "sizes")
        )
        shapes = {
            "layers": (layers,),
            "before": (layers, 2),
            "after": (layers, 2),
            "kernels": (kernels,),
            "gradients": (kernels,),
            "sizes": (sizes,),
            "batch_accuracy": (sizes,),
            "running_accuracy": (),
            "tested": (),
        }
        if {name: each.shape for name, each in stored.items()} != shapes:
            raise UserError(f"{path} is damaged: it does not hold what is measured inside a net")
        return stored

    def examples(self) -> dict[str, np.ndarray]:
        """The pictures kept for figures: arrays by name (see `figures.save_examples`)."""
        return self._load(self.path / "examples.npz")

    def checkpoints(self, norm: str, seed: int) -> Path:
        """The Orbax directory of a norm and seed."""
        return self.path / "checkpoints" / f"{norm}-{seed}"

    # writing

    def take(self, sources: Sequence["RunDirectory"]) -> dict[tuple[Norm, int], "RunDirectory"]:
        """Puts runs that differ in nothing but their norms and seeds together, as one run.

        Since no net's training depends on another's, this is what one command would have recorded,
        but for the times. Raises `UserError` where anything else differs, where a net is there
        twice, or where they are not the same seeds, one after the other, under batch, group and
        layer norm or under a single norm. Returns which run each net came from.
        """
        infos = [source.info() for source in sources]
        first = infos[0]
        homes: dict[tuple[Norm, int], RunDirectory] = {}
        for source, info in zip(sources, infos, strict=True):
            one = {"norm": first.config.norm, "seed": first.config.seed, "seeds": 1}
            same = dataclasses.replace(info.config, **one) == dataclasses.replace(
                first.config, **one
            )
            same &= (info.dataset, info.device) == (first.dataset, first.device)
            if not same or info.code != first.code:
                raise UserError(
                    f"{sources[0].path} and {source.path} differ in more than the norm and the "
                    "seed: compare their run.json"
                )
            for net in info.config.nets:
                if net in homes:
                    raise UserError(f"{net[0]} norm, seed {net[1]}, is in two of the runs")
                homes[net] = source
        norms, seeds = {norm for norm, _ in homes}, sorted({seed for _, seed in homes})
        config = dataclasses.replace(
            first.config,
            norm="all" if norms == set(ALL) else first.config.norm,
            seed=seeds[0],
            seeds=len(seeds),
        )
        if set(config.nets) != homes.keys():
            raise UserError(
                "to be put together, runs must be of batch, group and layer norm or of a single "
                "norm, and of the same seeds, one after the other"
            )
        read = {source.path: source.epochs() for source in sources}
        lines = []
        for net in config.nets:
            norm, seed = net
            epochs = [each for each in read[homes[net].path] if (each.norm, each.seed) == net]
            lines += [json.dumps(epoch.to_json()) + "\n" for epoch in epochs]
            for file in (self._step_losses, self._predictions):
                name = file(norm, seed).relative_to(self.path)
                self.write_bytes(name, (homes[net].path / name).read_bytes())
        self.write_bytes("metrics.jsonl", "".join(lines).encode())
        self.write_info(
            dataclasses.replace(
                first,
                config=config,
                parameters={k: v for info in infos for k, v in info.parameters.items()},
                started=min(info.started for info in infos),
                command="; ".join(dict.fromkeys(info.command for info in infos)),
            )
        )
        return homes

    def write_info(self, info: RunInfo) -> None:
        """Writes `run.json`."""
        values = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)} | {
            "config": info.config.to_json()
        }
        self.write_bytes("run.json", (json.dumps(values, indent=2) + "\n").encode())

    def append_epoch(self, epoch: Epoch) -> None:
        """Adds a line to `metrics.jsonl` and waits until it is on disk."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(epoch.to_json()) + "\n")
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

    def write_effects(self, norm: str, seed: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes what was measured inside a trained net."""
        self.write_arrays(self._effects(norm, seed).relative_to(self.path), arrays)

    def write_arrays(self, name: Path | str, arrays: dict[str, np.ndarray]) -> None:
        """Writes a compressed .npz."""
        buffer = io.BytesIO()
        # NumPy's stub takes any name for `allow_pickle`.
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

    def _effects(self, norm: str, seed: int) -> Path:
        return self.path / "effects" / f"{norm}-{seed}.npz"

    @staticmethod
    def _load(path: Path) -> Any:
        try:
            with path.open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                if isinstance(stored, np.ndarray):
                    return stored
                return {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(f"{path} is damaged: {type(error).__name__}") from None


def _checks(info: RunInfo) -> dict[str, bool]:
    """Whether each field of `run.json` is of the kind that it must be."""

    def maps(value: Any, kind: type) -> bool:
        """Whether it is an object of such values."""
        return isinstance(value, dict) and all(type(each) is kind for each in value.values())

    def lists(value: Any, kind: type, length: int | None = None) -> bool:
        """Whether it is a list of such values, of that length if one is given."""
        right = isinstance(value, list) and all(isinstance(each, kind) for each in value)
        return right and length in (None, len(value))

    data: Any = info.dataset if isinstance(info.dataset, dict) else {}
    return {
        "parameters": maps(info.parameters, int) and {*info.config.norms} <= {*info.parameters},
        "versions": maps(info.versions, str),
        "git_revision": info.git_revision is None or isinstance(info.git_revision, str),
        **{name: isinstance(getattr(info, name), str) for name in ("device", "started", "command")},
        "dataset": data.keys() == set(DATASET_FIELDS)
        and all(isinstance(data[n], str) for n in ("name", "caption", "fingerprint", "source"))
        and data["verified"] in (True, False, None)
        and lists(data["class_names"], str)
        and lists(data["mean"], float, 3)
        and lists(data["deviation"], float, 3)
        and all(type(data[name]) is int for name in ("train_count", "test_count")),
    }


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
    if (epoch.validation_loss is None) != (epoch.validation_accuracy is None):
        raise UserError(f"{where} has half of a validation")
    valid = all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
    valid &= all(
        type(value) is int for value in (epoch.seed, epoch.epoch)
    ) and epoch.norm in get_args(Norm)
    if not valid:
        raise UserError(f"{where} has a field of the wrong kind")
    return epoch
