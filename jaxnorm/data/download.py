"""Downloads an archive: says within seconds that there is no route, resumes what was cut off,
leaves a slow address for another, and shows progress.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock

from jaxnorm.config import Setting, UserError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
ROUTE_SECONDS = 8.0
"""The time that all hosts together may take to answer before the user is told."""
SLOW_RATE, SLOW_SECONDS = 200_000, 20.0
"""An address that gives fewer bytes per second for this time is left for the next one."""
clock = time.monotonic


class AddressError(UserError):
    """An address does not give its file. Another address may."""


class _Slow(Exception):
    """An address is slow or was cut off, and another may be faster; its argument is the rate."""


def fetch(url: str, directory: Path | None, progress: Progress) -> Path:
    """Downloads `url` into `directory` and returns the file; one that is there already is not
    fetched again.

    A download that was cut off is resumed. Raises `UserError`, within about ten seconds if the
    host does not answer. The caller checks the content.
    """
    return _fetch(url, _target(url, directory), progress, ROUTE_SECONDS)


def fetch_known(addresses: Mapping[str, str], directory: Path | None, progress: Progress) -> Path:
    """Downloads from the first of `addresses` (URL to SHA-256) that gives its file, and returns it.

    The address of which most is already there comes first. One that is slow is left for the next;
    if none is left, those that were slow are resumed, the fastest first. Raises `UserError` that
    says what is wrong with each address, within about ten seconds if no host answers.
    """
    targets = {url: _target(url, directory) for url in addresses}
    first = sorted(addresses, key=lambda url: _size(targets[url]), reverse=True)
    failures: list[str] = []
    rates: dict[str, float] = {}
    for leave_slow in (True, False):
        urls = first if leave_slow else sorted(rates, key=lambda url: rates[url], reverse=True)
        seconds = ROUTE_SECONDS / len(addresses) if leave_slow else ROUTE_SECONDS
        for url in urls:
            try:
                path = _fetch(url, targets[url], progress, seconds, leave_slow)
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == addresses[url]:
                        return path
                path.unlink()
                failures.append(f"{url}: its file has another SHA-256 than the official one")
            except _Slow as slow:
                rates[url] = slow.args[0]
            except AddressError as error:
                failures.append(str(error))
    raise AddressError("; ".join(failures))


def _target(url: str, directory: Path | None) -> Path:
    """Returns the place of an address's file, in a directory that is made. Raises `UserError`."""
    try:
        name = Path(urlsplit(url).path).name
    except ValueError as error:
        raise UserError(Setting("archive", url), f" is not an address: {error}") from None
    if name in ("", ".."):
        raise UserError(Setting("archive", url), ": the address names no file")
    if directory is None:
        raise UserError(
            f"{url} cannot be downloaded, because there is no home directory to keep it in: set "
            "HOME or XDG_CACHE_HOME"
        )
    # Another address may have a file of the same name.
    folder = directory / hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    return folder / name


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _size(target: Path) -> int:
    """Returns the number of bytes of a download that are already there."""
    return sum(path.stat().st_size for path in (target, _partial(target)) if path.exists())


def _fetch(
    url: str, target: Path, progress: Progress, seconds: float, leave_slow: bool = False
) -> Path:
    """Downloads to `target`, one process at a time; the host may take `seconds` to answer. Raises
    `UserError`, and if `leave_slow`, `_Slow`.
    """
    with filelock.FileLock(target.parent / ".lock"):
        if target.exists():
            return target
        partial = _partial(target)
        have = partial.stat().st_size if partial.exists() else 0
        response = _open(url, have, seconds, leave_slow)
        if response.status_code == 416:  # the partial file is longer than the whole
            have, response = 0, _open(url, 0, seconds, leave_slow)
        with response:
            if response.status_code not in (200, 206):
                answer = f"{response.status_code} {response.reason}"
                raise AddressError(f"{url}: the host answered {answer}")
            start = response.headers.get("Content-Range", "")
            resumed = response.status_code == 206 and start.startswith(f"bytes {have}-")
            _receive(url, response, partial, have if resumed else 0, progress, leave_slow)
        partial.rename(target)
        return target


def _receive(
    url: str, response: Any, partial: Path, have: int, progress: Progress, leave_slow: bool
) -> None:
    """Writes what the host sends after the `have` bytes of the partial file that are kept."""
    import requests

    length, reason = response.headers.get("Content-Length", ""), ""  # which may be any text
    total = have + (int(length) if re.fullmatch(r"\d{1,18}", length) else 0)
    what = f"downloading from {urlsplit(url).hostname}"
    before, start, rate = have, clock(), 0.0
    try:
        with partial.open("ab" if have else "wb") as file:
            for block in response.iter_content(2**14):
                file.write(block)
                have += len(block)
                progress(what, have, max(total, have))
                seconds = clock() - start
                if leave_slow and seconds >= SLOW_SECONDS:
                    rate = (have - before) / seconds
                    if rate < SLOW_RATE:
                        raise _Slow(rate)
                    before, start = have, clock()
            file.flush()
            os.fsync(file.fileno())
    except requests.RequestException as error:
        reason = f" ({type(error).__name__})"
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {error.strerror}") from None
    if have < total or reason:
        if leave_slow:
            raise _Slow(rate)
        raise AddressError(
            f"{url}: the download was cut off at {have} of {total} bytes{reason}; the same command "
            "resumes it"
        )


def _open(url: str, have: int, seconds: float, leave_slow: bool) -> Any:
    """Returns the host's answer; raises `UserError` after `seconds`, even if it is a name server
    that never answers.
    """
    import requests

    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    timeout = (seconds, SLOW_SECONDS if leave_slow else 60)
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(requests.get(url, stream=True, timeout=timeout, headers=headers))
        except Exception as error:  # of any kind: it is raised below
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer or isinstance(answer[0], requests.Timeout):
        raise AddressError(f"{url}: no answer within {seconds:.0f} seconds")
    if isinstance(answer[0], Exception):
        raise _unanswered(url, answer[0])
    return answer[0]


def _unanswered(url: str, error: Exception) -> UserError:
    """Returns an error that says why an address cannot be asked."""
    import requests

    line = " ".join(str(error).split())[:300]
    if isinstance(error, requests.exceptions.SSLError):
        found = re.search(r"\[\w+: \w+\] (.+?) \(_ssl", line)
        return AddressError(
            f"{url}: no connection that can be trusted ({found[1] if found else line}); "
            "REQUESTS_CA_BUNDLE=FILE names certificates to trust"
        )
    if isinstance(error, requests.ConnectionError):
        return AddressError(f"{url}: no route to it ({type(error).__name__})")
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return UserError(f"{url}: {line} (REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names it)")
    return AddressError(f"{url} cannot be asked ({type(error).__name__}: {line})")
