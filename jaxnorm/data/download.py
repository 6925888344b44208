"""Fetching an archive: heard of within seconds where there is no route, resumed where it was cut
off, with progress.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import filelock

from jaxnorm.config import UserError
from jaxnorm.data.cache import private_directory

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
ROUTE_SECONDS = 8.0
"""How long a host may take to answer before the user hears that it does not."""


def fetch(url: str, directory: Path, progress: Progress) -> Path:
    """Downloads `url` into `directory` and returns the file; one that is there already is not
    fetched again.

    A download that was cut off is resumed. Raises `UserError` within about ten seconds where the
    host does not answer. The caller checks the content.
    """
    name = Path(urlparse(url).path).name
    if not name:
        raise UserError(f"archive={url}: the address names no file")
    # Another address may have a file of the same name.
    directory = directory / hashlib.sha256(url.encode()).hexdigest()[:16]
    if private_directory(directory.parent) is None or private_directory(directory) is None:
        raise UserError(f"{directory} cannot be made, or is not a directory of your own")
    with filelock.FileLock(directory / ".lock"):
        return _fetch(url, directory / name, progress)


def _fetch(url: str, target: Path, progress: Progress) -> Path:
    """The download itself, of one process at a time."""
    if target.exists():
        return target
    partial = target.with_name(target.name + ".part")
    have = partial.stat().st_size if partial.exists() else 0
    response = _open(url, have)
    if response.status_code == 416:  # the partial file is longer than the whole
        have, response = 0, _open(url, 0)
    if response.status_code not in (200, 206):
        raise UserError(f"{url}: the host answered {response.status_code} {response.reason}")
    start = response.headers.get("Content-Range", "")
    resumed = response.status_code == 206 and start.startswith(f"bytes {have}-")
    have = have if resumed else 0
    total, reason = have + int(response.headers.get("Content-Length") or 0), ""
    import requests

    try:
        with partial.open("ab" if resumed else "wb") as file:
            for block in response.iter_content(2**18):
                file.write(block)
                have += len(block)
                progress("downloading", have, max(total, have))
            file.flush()
            os.fsync(file.fileno())
    except requests.RequestException as error:
        reason = f" ({type(error).__name__})"
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {error.strerror}") from None
    if have < total or reason:
        raise UserError(
            f"{url}: the download was cut off at {have} of {total} bytes{reason}; the same command "
            "resumes it"
        )
    partial.rename(target)
    return target


def _open(url: str, have: int) -> Any:
    """The host's answer, or `UserError` after `ROUTE_SECONDS`: a name server that never answers
    must not hold the user up.
    """
    import requests

    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    answer: list[Any] = []

    def ask() -> None:
        timeout = (ROUTE_SECONDS / 2, 60)
        try:
            answer.append(requests.get(url, stream=True, timeout=timeout, headers=headers))
        except requests.RequestException as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ROUTE_SECONDS)
    if not answer:
        raise UserError(f"{url}: no answer within {ROUTE_SECONDS:.0f} seconds")
    if isinstance(answer[0], Exception):
        raise UserError(f"{url}: no route to it ({type(answer[0]).__name__})")
    return answer[0]
