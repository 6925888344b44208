"""A directory of records: how they are written, and how they are read back.

Every file is written to a temporary name, synced and renamed, so that it is there whole or not at
all. What is read may come from anybody: links are refused, sizes are bounded, and every value is
checked.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxnorm.config import OtherFields, Setting, UserError, from_json, local_path, valid_text
from jaxnorm.records import RunInfo

LOCK, TEMPORARY = ".lock", ".writing-"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LARGEST = 2**28
"""The most bytes of a record, also of what a compressed one unpacks to."""
Shapes = Mapping[str, str]
"""What arrays must be, by name: the letters of NumPy's kinds, and then the length of each axis, a
number or a letter that stands for the same length wherever it is used: {"logits": "f N C"}.
"""
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

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raises `UserError` if `create` is known to fail, and makes nothing."""
        try:
            if path.exists():
                names = [entry.name for entry in path.iterdir()] if path.is_dir() else ["x"]
                if [name for name in names if not name.startswith((LOCK, TEMPORARY))]:
                    raise UserError(
                        Setting("out", path), " is already used: choose another directory"
                    )
            nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        except OSError as error:
            raise UserError(Setting("out", path), f" cannot be used: {error.strerror}") from None
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                Setting("out", path), f" cannot be written to: {nearest} is no writable folder"
            )

    @classmethod
    def create(cls, path: Path) -> "RunDirectory":
        """Makes a new run directory, private to the user. Raises `UserError` if it cannot."""
        cls.check_unused(path)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(
                Setting("out", path), f" cannot be written to: {error.strerror}"
            ) from None
        return cls(path)

    @contextlib.contextmanager
    def locked(self, folder: str = "", patience: float = 0) -> Iterator[bool]:
        """Locks a folder of the run; yields whether it could, within `patience` seconds.
        A process that has ended holds no lock. Raises `UserError` if the file system has no locks.
        """
        path = self.path_of(Path(folder) / LOCK)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock, free = filelock.FileLock(path, timeout=patience), True
        try:
            lock.acquire()
        except filelock.Timeout:
            free = False
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOLCK) not in _NO_LOCKS:
                raise
            raise UserError(
                f"{path} cannot be locked, because its file system has no locks: keep the run on "
                "another one, such as a local disk"
            ) from None
        try:
            yield free
        finally:
            lock.release()

    def path_of(self, name: Path | str) -> Path:
        """Returns a file or folder of the run. Raises `UserError` if it, or a folder on the way to
        it, is a link: it could lie anywhere.
        """
        path = self.path
        for part in Path(name).parts:
            path = path / part
            if part == ".." or path.is_symlink():
                raise UserError(f"{path} is a link out of the run directory: it is not followed")
        return path

    # reading

    def exists(self) -> bool:
        """Returns whether a run has begun here."""
        return self.path_of("run.json").exists()

    def info(self) -> RunInfo:
        """Reads `run.json`; raises `UserError` if it, or a field of it, is missing or wrong."""
        try:
            return self.read_json("run.json", RunInfo)
        except OSError as error:
            path = self.path / "run.json"
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def read_json(self, name: str, kind: type) -> Any:
        """Reads a JSON file as a `typed` dataclass; raises `UserError` if it is missing or damaged,
        and OSError if it cannot be read, which is no damage.
        """
        try:
            return from_json(kind, self.read_bytes(name))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path / name} is missing: {self.path} is not a run directory"
            ) from None
        except OtherFields as error:
            raise UserError(
                f"{self.path / name} is of {self._version()}, whose records differ ({error}): read "
                "it with that version"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.path / name} cannot be read: {error}") from None

    def _version(self) -> str:
        """The version of jaxnorm that the run's `run.json` names."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            info = json.loads(self.read_bytes("run.json"))
            return f"jaxnorm {info['environment']['versions']['jaxnorm']}"[:40]
        return "another version of jaxnorm"

    def examples(self) -> dict[str, np.ndarray]:
        """The images kept for figures: arrays by name (see `analysis.results.save_examples`)."""
        return self.arrays("examples.npz", _EXAMPLES)

    def read_bytes(self, name: Path | str, largest: int = _LARGEST) -> bytes:
        """Reads a regular file of at most `largest` bytes; raises `UserError` for any other."""
        path = self.path_of(name)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not wait for a writer
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > largest:
            os.close(handle)
            raise UserError(f"{path} is damaged: it is no file of up to {largest:,} bytes")
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def arrays(self, name: str, shapes: Shapes, optional: bool = False) -> dict[str, np.ndarray]:
        """Reads the arrays of an .npz file; raises `UserError` unless they are finite and of these
        shapes. Returns none of them if `optional` and one is not there.
        """
        path = self.path_of(name)
        damaged = f"{path} is damaged"
        try:
            content = io.BytesIO(self.read_bytes(name))
            archive = zipfile.ZipFile(content)
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > _LARGEST:
                raise UserError(f"{damaged}: it unpacks to {unpacked:,} bytes")
            if archive.testzip():
                raise UserError(f"{damaged}: a checksum in it does not fit")
            content.seek(0)
            stored: Any = np.load(content, allow_pickle=False)
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

    def write_text(self, name: str, text: str) -> None:
        """Writes text; of a name in it that is not UTF-8, the bytes are written as \\udcff."""
        self.write_bytes(name, valid_text(text).encode())

    def set_aside(self, name: str) -> Path:
        """Renames a damaged record, so that nothing reads it again; returns its new path."""
        path, number = self.path_of(name), 1
        while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
            number += 1
        return path.rename(aside)

    def write_arrays(self, name: str, **arrays: Any) -> None:
        """Writes a compressed .npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self.write_bytes(name, buffer.getvalue())

    def write_bytes(self, name: Path | str, content: bytes) -> None:
        """Writes a file of the run, whole or not at all."""
        target = self.path_of(name)
        with _naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=TEMPORARY)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        with contextlib.suppress(OSError):  # if the system cannot sync a folder
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def remove_half_written(self, folder: str) -> None:
        """Removes what a killed process left half written in a folder that is locked."""
        for path in self.path_of(folder).glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names this file in an OSError of the block: a failed write names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _problem(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> str:
    """Returns why arrays are not finite, or not of the kinds and shapes wanted; "" if they are."""
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
