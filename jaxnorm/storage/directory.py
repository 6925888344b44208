"""A run directory: what its files are called, how they are written, and how they are read back.

Every file but `metrics.jsonl` is written to a temporary name, synced and renamed; `metrics.jsonl`
gains one line an epoch. A half line at its end, of a killed process, is dropped. What is read may
come from anybody: links are refused, sizes are bounded, and every value is checked.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxnorm.config import NetId, OtherFields, UserError, from_json, local_path
from jaxnorm.records import Epoch, RunInfo

_LOCK, _TEMPORARY, _METRICS = ".lock", ".writing-", "metrics.jsonl"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LARGEST = 2**28
"""The most bytes of a record, also of what a compressed one unpacks to."""
Shapes = Mapping[str, str]
"""What arrays must be, by name: the letters of NumPy's kinds, and then the length of each axis, a
number or a letter that stands for the same length wherever it is used: {"logits": "f N C"}.
"""
_PREDICTIONS = {"logits": "f N C", "labels": "iu N"}
_EXAMPLES = {
    "test_rows": "iu N",
    "test_images": "u N 32 32 3",
    "train_rows": "iu M",
    "train_images": "u M 32 32 3",
    "train_labels": "iu M",
}


class RunDirectory:
    """Reads and writes the files of one run, or of the folder of a sweep."""

    def __init__(self, path: Path | str) -> None:
        self.path = local_path(path)
        self._lock = filelock.FileLock(self.path / _LOCK, timeout=0)

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raises `UserError` where `create` is known to fail, and makes nothing."""
        try:
            if path.exists():
                names = [entry.name for entry in path.iterdir()] if path.is_dir() else ["x"]
                if [name for name in names if not name.startswith((_LOCK, _TEMPORARY))]:
                    raise UserError(f"out={path} is already used: choose another directory")
            nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        except OSError as error:
            raise UserError(f"out={path} cannot be used: {error.strerror}") from None
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"out={path} cannot be written to: {nearest} is no writable folder")

    @classmethod
    def create(cls, path: Path) -> "RunDirectory":
        """Makes a new run directory, private to the user. Raises `UserError` where it cannot."""
        cls.check_unused(path)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)
        except OSError as error:
            raise UserError(f"out={path} cannot be written to: {error.strerror}") from None
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing here; a process that has ended holds no lock.

        Raises `UserError` if another process holds it, or if the file system has no locks.
        """
        self.path_of(_LOCK)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.path} is being written to by another process") from None
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOLCK) not in _NO_LOCKS:
                raise
            raise UserError(
                f"{self.path / _LOCK} cannot be locked, because its file system has no locks: keep "
                "the run on another one, such as a local disk"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    def path_of(self, name: Path | str) -> Path:
        """A file or folder of the run. Raises `UserError` where it, or a folder on the way to it,
        is a link: it could lie anywhere.
        """
        path = self.path
        for part in Path(name).parts:
            path = path / part
            if part == ".." or path.is_symlink():
                raise UserError(f"{path} is a link out of the run directory: it is not followed")
        return path

    # reading

    def exists(self) -> bool:
        """Whether anything was recorded here yet."""
        return self.path_of("run.json").exists()

    def info(self) -> RunInfo:
        """Reads `run.json`; raises `UserError` where it, or a field of it, is missing or wrong."""
        return self.read_json("run.json", RunInfo)

    def read_json(self, name: str, kind: type) -> Any:
        """Reads a JSON file as a `typed` dataclass; raises `UserError`."""
        try:
            return from_json(kind, self.read_bytes(name))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path / name} is missing: {self.path} is not a run directory"
            ) from None
        except OtherFields as error:
            raise UserError(
                f"{self.path / name} cannot be read: an older or newer jaxnorm wrote it ({error}); "
                "read it with the version that the run's run.json names"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / name} cannot be read: {error}") from None

    def epochs(self) -> list[Epoch]:
        """Reads `metrics.jsonl`, in order; a half line at its end is dropped.

        Raises `UserError` for a line that is not as it was written.
        """
        epochs, wrong = self.read_epochs()
        if wrong:
            raise UserError(f"{self.path / _METRICS} {wrong[0]}")
        return epochs

    def read_epochs(self) -> tuple[list[Epoch], list[str]]:
        """The epochs of the lines that are whole, and what is wrong with each of the others."""
        epochs, wrong = [], []
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = self.read_bytes(_METRICS).decode(errors="replace").split("\n")
            for number, line in enumerate(lines, 1):
                try:
                    epochs.append(Epoch.from_line(line))
                except UserError as error:
                    wrong.append(f"line {number} is damaged: {error}")
        return epochs, wrong

    def step_losses(self, net: NetId) -> np.ndarray:
        """The training loss of every batch so far: f32[epochs * steps]."""
        return self.arrays(_file("step_losses", net), {"values": "f S"})["values"]

    def predictions(self, net: NetId) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32[N, classes] and labels i32[N] of the test images after the newest epoch."""
        name = _file("predictions", net)
        logits, labels = self.arrays(name, _PREDICTIONS).values()
        if not labels.size or labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise UserError(f"{self.path / name} is damaged: its logits and labels do not fit")
        return logits, labels

    def probes(self, net: NetId, shapes: Shapes) -> dict[str, np.ndarray]:
        """What was measured inside a trained net (see `training.probes`): arrays of `shapes`; none
        where an earlier version measured less.
        """
        return self.arrays(_file("probes", net), shapes, optional=True)

    def measured(self, net: NetId) -> bool:
        """Whether it was measured inside."""
        return self.path_of(_file("probes", net)).exists()

    def examples(self) -> dict[str, np.ndarray]:
        """The images kept for figures: arrays by name (see `analysis.figures.save_examples`)."""
        return self.arrays("examples.npz", _EXAMPLES)

    def read_bytes(self, name: Path | str, largest: int = _LARGEST) -> bytes:
        """A regular file of at most so many bytes; raises `UserError` for any other."""
        path = self.path_of(name)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not wait for a writer
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > largest:
                raise UserError(f"{path} is damaged: it is no file of up to {largest:,} bytes")
            return file.read()

    def arrays(self, name: str, shapes: Shapes, optional: bool = False) -> dict[str, np.ndarray]:
        """The arrays of an .npz file, or the "values" of an .npy file; raises `UserError` where
        they are not finite and of these shapes. None of them if `optional` and one is not there.
        """
        path = self.path_of(name)
        damaged = f"{path} is damaged"
        try:
            content = io.BytesIO(self.read_bytes(name))
            if name.endswith(".npz"):
                unpacked = sum(member.file_size for member in zipfile.ZipFile(content).infolist())
                if unpacked > _LARGEST:
                    raise UserError(f"{damaged}: it unpacks to {unpacked:,} bytes")
                content.seek(0)
            stored: Any = np.load(content, allow_pickle=False)
            stored = {"values": stored} if isinstance(stored, np.ndarray) else stored
            if optional and not shapes.keys() <= stored.keys():
                return {}
            arrays = {key: stored[key] for key in shapes}
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except Exception as error:  # a damaged file can fail in any way
            if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
                raise
            raise UserError(f"{damaged}: {type(error).__name__}") from None
        if problem := _problem(arrays, shapes):
            raise UserError(f"{damaged}: {problem}")
        return arrays

    # writing

    def write_json(self, name: str, values: Any) -> None:
        """Writes a `typed` dataclass; `read_json` reads it back."""
        text = json.dumps(dataclasses.asdict(values), indent=2, ensure_ascii=False) + "\n"
        # What stands for a byte of a path that is not UTF-8 would be written and could not be read.
        text = re.sub("[\ud800-\udfff]", lambda match: rf"\\u{ord(match[0]):x}", text)
        self.write_bytes(name, text.encode())

    def write_info(self, info: RunInfo) -> None:
        """Writes `run.json`."""
        self.write_json("run.json", info)

    def write_text(self, name: str, text: str) -> None:
        """Writes text; of a name in it that is not UTF-8, the bytes are written as \\udcff."""
        self.write_bytes(name, text.encode(errors="backslashreplace"))

    def append_epoch(self, epoch: Epoch) -> None:
        """Adds a line to `metrics.jsonl` and waits until it is on disk."""
        path = self.path_of(_METRICS)
        with _naming(path), path.open("a") as file:
            file.write(epoch.to_line())
            file.flush()
            os.fsync(file.fileno())

    def write_epochs(self, epochs: Sequence[Epoch]) -> None:
        """Makes these all the lines of `metrics.jsonl`."""
        content = "".join(epoch.to_line() for epoch in epochs).encode()
        path = self.path_of(_METRICS)
        if content != (path.read_bytes() if path.exists() else b""):
            self.write_bytes(_METRICS, content)

    def set_aside(self, name: str) -> Path:
        """Keeps a copy of a record that is damaged, for a person to look at; returns its path."""
        number = 1 + len(list(self.path.glob(f"{name}.damaged-*")))
        self.write_bytes(f"{name}.damaged-{number}", self.read_bytes(name))
        return self.path / f"{name}.damaged-{number}"

    def write_net(self, kind: str, net: NetId, **arrays: np.ndarray) -> None:
        """Writes a net's "step_losses" (values=), "predictions" or "probes"."""
        self.write_arrays(_file(kind, net), **arrays)

    def write_arrays(self, name: str, **arrays: Any) -> None:
        """Writes a compressed .npz, or an .npy of `values`."""
        buffer = io.BytesIO()
        if name.endswith(".npz"):
            np.savez_compressed(buffer, **arrays)
        else:
            np.save(buffer, arrays["values"])
        self.write_bytes(name, buffer.getvalue())

    def write_bytes(self, name: Path | str, content: bytes) -> None:
        """Writes a file of the run, whole or not at all."""
        target = self.path_of(name)
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
        with contextlib.suppress(OSError):  # where the system cannot sync a folder
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def remove_half_written(self) -> None:
        """Removes what a killed process left half written. To be called under the lock."""
        for path in self.path.rglob(f"{_TEMPORARY}*"):
            if path.is_file():
                path.unlink()


def _file(kind: str, net: NetId) -> str:
    """A net's file of one kind."""
    return f"{kind}/{net[0]}-{net[1]}.{'npy' if kind == 'step_losses' else 'npz'}"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names this file in an OSError of the block: a failed write names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _problem(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> str:
    """Why arrays are not finite, or not of the kinds and shapes wanted; empty where they are."""
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        array, (kinds, *axes) = arrays[name], shape.split()
        wanted = [
            int(a) if a.isdecimal() else lengths.setdefault(a, n)
            for a, n in zip(axes, array.shape, strict=False)
        ]
        fits = array.dtype.kind in kinds and array.ndim == len(axes)
        if not fits or wanted != list(array.shape):
            return "its arrays do not fit together"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return "its numbers are not finite"
    return ""
