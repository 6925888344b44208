"""The folders of datasets and of the user's own cache, and decoded arrays in that cache."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import platformdirs

from jaxnorm.config import Setting, UserError, local_path

Decoded = tuple[list[np.ndarray], tuple[str, ...], str]
"""Images u8 and labels i32 of training and then of the test; class names; the fingerprint of the
arrays.
"""


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
        "there is no home directory to look for datasets in (HOME is not set): give ",
        Setting("data_dir"),
    )


def default_cache_dir() -> Path | None:
    """Returns the folder of decoded images, downloads and compiled code, by the system's
    convention; None if the user has no home directory.
    """
    try:
        path = Path(platformdirs.user_cache_dir("jaxnorm", appauthor=False))
    except RuntimeError:
        return None
    return path if path.is_absolute() else None  # older versions of platformdirs leave the ~


def private_directory(path: Path) -> Path | None:
    """Makes a directory of compiled code, which only the user can read or write; returns None if it
    cannot: compiled code is trusted, so that a directory of somebody else's is not used.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        own = not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
        if not path.is_dir() or not own or not os.access(path, os.W_OK):
            return None
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError:
        return None
    return path


_OF_CODE = ("flags", "model", "Features", "CPU ")
"""How the lines of /proc/cpuinfo begin that compiled code depends on, on x86 and on ARM."""


def machine_name() -> str:
    """Returns a short name for what compiled code depends on: the processor, and how many cores we
    have.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(_OF_CODE)})
    except OSError:
        features = [platform.processor()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256(f"{platform.machine()} {cores} {features}".encode()).hexdigest()[:16]


def content_fingerprint(arrays: list[np.ndarray]) -> str:
    """Returns the SHA-256 of arrays: their types, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def files_fingerprint(folder: Path, *left_out: str) -> str:
    """Returns the SHA-256 of the names and contents of the files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in left_out:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def decoded_file(cache: Path, folder: Path, test_split: str = "test") -> Path:
    """Returns the file of the cache that holds what is decoded of a prepared dataset."""
    other = "" if test_split == "test" else f"-{test_split}"
    return cache / "decoded" / f"{files_fingerprint(folder)}{other}.npys"


def read_decoded(path: Path) -> Decoded | None:
    """Reads what `write_decoded` wrote; returns None if it is absent or damaged in any way."""
    try:
        with path.open("rb") as file:
            *arrays, names, check = (np.load(file) for _ in range(6))
        fingerprint = content_fingerprint(arrays)
        intact = content_fingerprint([names, np.array(fingerprint)]) == str(check)
    except Exception:  # of a damaged file NumPy raises many kinds
        return None
    return (arrays, tuple(map(str, names)), fingerprint) if intact else None


def write_decoded(path: Path, decoded: Decoded) -> None:
    """Writes the arrays, the class names and a checksum of both, whole or not at all; if that
    fails, the next start decodes again.

    The file is six .npy records in a row, which are read four times as fast as an .npz.
    """
    arrays, class_names, fingerprint = decoded
    names = np.array(class_names)
    check = np.array(content_fingerprint([names, np.array(fingerprint)]))
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with temporary.open("wb") as file:
            for record in [*arrays, names, check]:
                np.save(file, record)
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
