"""Where files lie that are no run's: datasets, and the user's own cache."""

import os
import stat
from pathlib import Path

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
