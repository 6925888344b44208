"""Where data sets and the user's own cache lie, and decoded arrays in that cache."""

import contextlib
import hashlib
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import platformdirs

from jaxnorm.config import UserError, local_path


def default_data_dir() -> Path:
    """Returns the folder of TFDS's datasets: TFDS_DATA_DIR, or ~/tensorflow_datasets. Raises
    `UserError` if that needs a home directory and the user has none.
    """
    given = os.environ.get("TFDS_DATA_DIR")
    try:
        return local_path(given or "~/tensorflow_datasets")
    except UserError:
        if given:
            raise
    raise UserError(
        "there is no home directory to look for datasets in (HOME is not set): give data_dir="
    )


def default_cache_dir() -> Path | None:
    """Returns the folder of decoded images, downloads and compiled code, by the system's own
    custom; None if the user has no home directory.
    """
    try:
        path = Path(platformdirs.user_cache_dir("jaxnorm", appauthor=False))
    except RuntimeError:
        return None
    return path if path.is_absolute() else None  # older versions of platformdirs leave the ~


def private_directory(path: Path) -> Path | None:
    """Makes a directory that only the user can read or write; None where it cannot.

    What is loaded from there is trusted (compiled code is), so a directory of somebody else's, or
    one that others may write to, is not used.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.is_dir() or not owned(path) or not os.access(path, os.W_OK):
            return None
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError:
        return None
    return path


def make_private(folder: Path) -> None:
    """Lets nobody but the user read or change a folder and the files in it, whatever the umask."""
    for path in (folder, *folder.iterdir()):
        with contextlib.suppress(OSError):  # of a file system that has no permissions
            path.chmod(0o700 if path.is_dir() else 0o600)


def owned(path: Path) -> bool:
    """Returns whether a file or folder is the user's own."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def only_ours(path: Path) -> bool:
    """Returns whether the user, and nobody else, may change a folder and the files in it."""
    return all(owned(file) and not file.stat().st_mode & 0o022 for file in (path, *path.iterdir()))


def machine_name() -> str:
    """A short name for what compiled code depends on: the processor, and how many cores we have."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(("flags", "model"))})
    except OSError:
        features = [platform.processor()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256(f"{platform.machine()} {cores} {features}".encode()).hexdigest()[:16]


def content_fingerprint(arrays: list[np.ndarray]) -> str:
    """The SHA-256 of arrays: their types, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def files_fingerprint(folder: Path, *left_out: str) -> str:
    """The SHA-256 of the names and contents of the files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in left_out:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_arrays(path: Path) -> tuple[list[np.ndarray], tuple[str, ...], str] | None:
    """The cached arrays, class names and fingerprint; None where absent, not as written, or where
    others may write to it.
    """
    try:
        if not only_ours(path.parent):
            return None
        with path.open("rb") as file:
            *arrays, names, fingerprint, check = (np.load(file) for _ in range(7))
        intact = content_fingerprint(arrays) == str(fingerprint)
        intact &= content_fingerprint([names, fingerprint]) == str(check)
    except Exception:  # absent or damaged in any way: it is rebuilt
        return None
    return (arrays, tuple(map(str, names)), str(fingerprint)) if intact else None


def write_arrays(
    path: Path, arrays: list[np.ndarray], class_names: tuple[str, ...], fingerprint: str
) -> None:
    """Writes the cache whole or not at all: where it cannot, the next start decodes again.

    The file is seven .npy records in a row, which are read four times as fast as an .npz.
    """
    if private_directory(path.parent) is None:
        return
    labels = [np.array(class_names), np.array(fingerprint)]
    check = np.array(content_fingerprint(labels))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                for record in [*arrays, *labels, check]:
                    np.save(file, record)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
    except OSError:
        return
