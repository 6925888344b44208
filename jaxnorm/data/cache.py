"""Where data sets and the user's own cache lie, and decoded arrays in that cache."""

import hashlib
import os
import platform
import stat
import tempfile
from pathlib import Path

import numpy as np
import platformdirs


def default_data_dir() -> Path:
    """Where TFDS keeps its datasets: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def default_cache_dir() -> Path:
    """Where decoded images, downloads and compiled code are kept, by the system's own custom."""
    return Path(platformdirs.user_cache_dir("jaxnorm", appauthor=False))


def private_directory(path: Path) -> Path | None:
    """Makes a directory that only the user can read or write; None where that cannot be had.

    What is loaded from there is trusted (compiled code is), so a directory of somebody else's, or
    one that others may write to, is not used.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
        owned = found.st_uid == os.getuid() if hasattr(os, "getuid") else True
        if not owned or not stat.S_ISDIR(found.st_mode) or not os.access(path, os.W_OK):
            return None
        if found.st_mode & 0o077:
            path.chmod(0o700)
    except OSError:
        return None
    return path


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


def read_arrays(path: Path) -> tuple[list[np.ndarray], tuple[str, ...], str] | None:
    """The cached arrays, class names and fingerprint; None where absent or not as written."""
    try:
        with path.open("rb") as file:
            *arrays, names, fingerprint, check = (np.load(file) for _ in range(7))
        class_names = tuple(map(str, names))
        right = content_fingerprint(arrays) == str(fingerprint)
        right &= content_fingerprint([names, fingerprint]) == str(check)
    except Exception:  # absent or damaged in any way: it is rebuilt
        return None
    return (arrays, class_names, str(fingerprint)) if right else None


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


def files_fingerprint(prepared: Path) -> str:
    """The SHA-256 of the files of a prepared data set, our own note beside them left out."""
    digest = hashlib.sha256()
    for path in sorted(prepared.iterdir()):
        if path.is_file() and path.name != "jaxnorm_import.json":
            with path.open("rb") as file:
                digest.update(
                    f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest()
                )
    return digest.hexdigest()
