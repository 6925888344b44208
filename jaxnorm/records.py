"""A run directory: what its files are called, how they are written, and how they are read back.

Every file but `metrics.jsonl` is written to a temporary name and renamed; `metrics.jsonl` gains one
line an epoch, and a half line at its end (a killed process) is dropped, never guessed at. Nothing
here trains or draws.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import filelock
import numpy as np

from jaxnorm.config import ALL, Config, Norm, UserError

Net = tuple[Norm, int]
"""A net of a run: its norm and seed."""


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


def agree(logits: np.ndarray, labels: np.ndarray, epoch: Epoch) -> bool:
    """Whether test logits f32[N, classes] have the test accuracy and, within rounding, the mean
    cross-entropy that an epoch's record says.
    """
    exact = logits.astype(np.float64)
    of_label = exact[np.arange(len(labels)), labels]
    loss = float((np.logaddexp.reduce(exact, axis=1) - of_label).mean())
    close = math.isclose(loss, epoch.test_loss, rel_tol=1e-4, abs_tol=1e-6)
    return close and bool((logits.argmax(1) == labels).mean() == epoch.test_accuracy)


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
    self_check: str = "not made: the run is older than the check"
    """Whether the arithmetic was checked before training (see `selfcheck`)."""
    repeatable: str = "not known"
    """What of it the same command gives again."""
    deterministic: bool = False
    """Whether the accelerator was asked for operations that repeat."""
    resumed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """For each time that the run was gone on with, what `RESUMED_FIELDS` names, of that time."""
    mesh: str = "not known"
    """The devices that it was trained on, as rows for nets and sharers of a batch."""

    @property
    def code(self) -> dict[str, str]:
        """What code ran: the versions, with our own given by its git revision where it has one."""
        own = {"jaxnorm": self.git_revision} if self.git_revision else {}
        return {**self.versions, **own}


RESUMED_FIELDS = ("started", "command", "device", "mesh", "versions", "git_revision", "self_check")
_TEXTS = ("device", "mesh", "started", "command", "self_check", "repeatable")
_COUNTS = ("train_count", "test_count")
_LARGEST = 1e300
_LATER = ("self_check", "repeatable", "deterministic", "resumed", "mesh")
"""Fields of `RunInfo` that runs may be older than."""
_LOCK, _TEMPORARY = ".lock", ".writing-"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has an OSError of the block name this file: a failed write names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _content(path: Path) -> list[Path]:
    """What a directory holds, but for what a process that was killed before it wrote leaves."""
    return [each for each in path.iterdir() if not each.name.startswith((_LOCK, _TEMPORARY))]


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = filelock.FileLock(self.path / _LOCK, timeout=0)

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raises `UserError` where `create` is known to fail, and makes nothing."""
        try:
            if path.exists() and (not path.is_dir() or _content(path)):
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
            path.chmod(0o700)
        except OSError as error:
            raise UserError(f"--out {path} cannot be written to: {error.strerror}") from None
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing here; one that has ended, however, holds no lock. Who
        has it may take it again.

        Raises `UserError` where another process holds it, and OSError where there can be none.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.path} is being written to by another process: wait until it ends, or stop "
                "it"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    # what is in it

    def info(self) -> RunInfo:
        """Reads `run.json`; raises `UserError` where it, or a field of it, is missing or wrong."""
        path = self.path / "run.json"
        values = _read_json(path)
        fields = dataclasses.fields(RunInfo)
        names = [field.name for field in fields]
        if not isinstance(values, dict) or not values.keys() <= {*names} <= {*values, *_LATER}:
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
        path = self._step_losses(norm, seed)
        losses = self._load(path)
        if not (isinstance(losses, np.ndarray) and losses.ndim == 1 and _numbers(losses, "f")):
            raise UserError(f"{path} is damaged: it does not hold a loss for each batch")
        return losses

    def predictions(self, norm: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32[N, classes] of the test images after the newest epoch, and their labels
        i32[N].
        """
        path = self._predictions(norm, seed)
        stored = self._load(path)
        try:
            logits, labels = stored["logits"], stored["labels"]
            right = logits.ndim == 2 and labels.shape == logits.shape[:1]
            right &= _numbers(logits, "f") and _numbers(labels, "iu") and labels.size > 0
            right = right and bool(((labels >= 0) & (labels < logits.shape[1])).all())
        except (KeyError, IndexError):
            raise UserError(f"{path} is damaged: it does not hold logits and labels") from None
        if not right:
            raise UserError(f"{path} is damaged: its logits and labels do not fit together")
        return logits, labels

    def effects(self, norm: str, seed: int) -> dict[str, np.ndarray]:
        """What was measured inside a trained net, by name (see `effects.measure`)."""
        path = self._effects(norm, seed)
        stored = self._load(path)
        stored = stored if isinstance(stored, dict) else {}
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
        kinds = {"layers": "U", "kernels": "U", "sizes": "iu", "tested": "iu"}
        right = {name: each.shape for name, each in stored.items()} == shapes
        right &= all(_numbers(each, kinds.get(name, "f")) for name, each in stored.items())
        if not right:
            raise UserError(f"{path} is damaged: it does not hold what is measured inside a net")
        return stored

    def examples(self) -> dict[str, np.ndarray]:
        """The pictures kept for figures: arrays by name (see `figures.save_examples`)."""
        path = self.path / "examples.npz"
        stored = self._load(path)
        stored = stored if isinstance(stored, dict) else {}
        right = stored.keys() == {f"test_{a}" for a in ("rows", "images")} | {
            f"train_{a}" for a in ("rows", "images", "labels")
        }
        for name, each in stored.items():
            shape = (32, 32, 3) if name.endswith("images") else ()
            kind = "u" if name.endswith("images") else "iu"
            right = right and each.shape[1:] == shape and each.ndim and _numbers(each, kind)
            right = right and len(each) == len(stored[f"{name.partition('_')[0]}_rows"])
            right = right and (kind != "u" or each.dtype == np.uint8)
        if not right:
            raise UserError(f"{path} is damaged: it does not hold the pictures for the figures")
        return stored

    def checkpoints(self, norm: str, seed: int) -> Path:
        """The Orbax directory of a norm and seed."""
        return self.path / "checkpoints" / f"{norm}-{seed}"

    # writing

    def take(self, sources: Sequence["RunDirectory"]) -> dict[Net, "RunDirectory"]:
        """Puts runs that differ in nothing but their norms and seeds together, as one run.

        Since no net's training depends on another's, this is what one command would have recorded,
        but for the times. Raises `UserError` where anything else differs, where a net is there
        twice, or where they are not the same seeds, one after the other, under batch, group and
        layer norm or under a single norm. Returns which run each net came from.
        """
        infos = [source.info() for source in sources]
        first = infos[0]
        homes: dict[Net, RunDirectory] = {}
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
        path = self.path / "metrics.jsonl"
        with _naming(path), path.open("a") as file:
            file.write(json.dumps(epoch.to_json()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def was_merged(self, norm: str, seed: int) -> bool:
        """Whether a net was measured and has no checkpoint, as after `take`."""
        return self._effects(norm, seed).exists() and not self.checkpoints(norm, seed).is_dir()

    def rewind(self, epochs: Sequence[Epoch], step_losses: Mapping[Net, np.ndarray]) -> None:
        """Makes these all the lines of `metrics.jsonl` and, of these nets, all the step losses."""
        lines = "".join(json.dumps(epoch.to_json()) + "\n" for epoch in epochs).encode()
        path = self.path / "metrics.jsonl"
        if lines != (path.read_bytes() if path.exists() else b""):
            self.write_bytes(path.name, lines)
        for (norm, seed), losses in step_losses.items():
            buffer, path = io.BytesIO(), self._step_losses(norm, seed)
            np.save(buffer, losses)
            if path.exists() and path.read_bytes() != buffer.getvalue():
                self.write_step_losses(norm, seed, losses)

    def sweep(self) -> None:
        """Removes what a killed process left half written. To be called under the lock."""
        for path in self.path.rglob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)

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
        with _naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=_TEMPORARY)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
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
        "deterministic": type(info.deterministic) is bool,
        "resumed": isinstance(info.resumed, list)
        and all(
            isinstance(each, dict) and {*RESUMED_FIELDS} - {"mesh"} <= {*each} <= {*RESUMED_FIELDS}
            for each in info.resumed
        ),
        "git_revision": info.git_revision is None or isinstance(info.git_revision, str),
        **{name: isinstance(getattr(info, name), str) for name in _TEXTS},
        "dataset": data.keys() == set(DATASET_FIELDS)
        and all(isinstance(data[n], str) for n in ("name", "caption", "fingerprint", "source"))
        and (data["verified"] is None or type(data["verified"]) is bool)
        and lists(data["class_names"], str)
        and len(data["class_names"]) > 0
        and lists(data["mean"], float, 3)
        and lists(data["deviation"], float, 3)
        and all(math.isfinite(each) for each in data["mean"])
        and all(0 < each < math.inf for each in data["deviation"])
        and all(type(data[name]) is int and data[name] > 0 for name in _COUNTS),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a run directory") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _numbers(array: Any, kind: str) -> bool:
    """Whether an array is of a kind that NumPy names by a letter, and finite if it is of floats."""
    right = isinstance(array, np.ndarray) and array.dtype.kind in kind
    return right and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


def _epoch(line: str, where: str) -> Epoch:
    try:
        values = json.loads(line)
        epoch = Epoch(**values)
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{where} is not an epoch's record") from None
    numbers = [value for name, value in values.items() if name not in ("norm", "seed", "epoch")]
    if (epoch.validation_loss is None) != (epoch.validation_accuracy is None):
        raise UserError(f"{where} has half of a validation")
    valid = all(type(each) in (int, float) and 0 <= each < _LARGEST for each in numbers)
    valid = valid and all(0 <= values[name] <= 1 for name in values if name.endswith("_accuracy"))
    valid = valid and all(type(each) is int for each in (epoch.seed, epoch.epoch))
    valid = valid and epoch.epoch >= 1 and epoch.norm in get_args(Norm)
    if not valid:
        raise UserError(f"{where} has a field of the wrong kind")
    return epoch
