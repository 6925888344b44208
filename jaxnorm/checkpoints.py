"""Checkpoints of one net, by Orbax: each complete or absent, the newest two epochs kept.

Beside its files lie a list of the arrays, `ARRAYS`, and the SHA-256 of all in `SHA256SUMS`, which
`sha256sum -c` can check too: Orbax itself reads an altered number as it finds it, and fits an array
of another shape to the one that is asked for.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2
"""The newest epoch's checkpoint, and the one before it in case that is damaged."""
_ARRAYS, _SUMS = "ARRAYS", "SHA256SUMS"


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was written; says which and why."""


def epochs(path: Path) -> list[int]:
    """The epochs of which the directory of one net's checkpoints holds any, ascending."""
    found = path.iterdir() if path.is_dir() else ()
    return sorted(int(each.name) for each in found if each.name.isdecimal())


def restore(path: Path, epoch: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """The state of one net after an epoch, in arrays of these shapes; raises `Damaged`."""
    directory = path.absolute() / str(epoch)
    try:
        right = (directory / _SUMS).read_text() == "".join(_sums(directory))
    except (OSError, ValueError) as error:
        raise Damaged(f"{directory} is damaged ({type(error).__name__})") from None
    if not right:
        raise Damaged(f"{directory} is damaged (its files are not what was written)")
    if (directory / _ARRAYS).read_text() != _arrays(shapes):
        raise Damaged(f"{directory} holds a net of other layers")
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_this_process()) as reader:
            return dict(reader.restore(directory / "default", shapes))
    except Exception as error:  # as a later Orbax may, of a format that it has left behind
        raise Damaged(f"{directory} cannot be read ({type(error).__name__})") from None


class Writer:
    """Writes the checkpoints of one net. To be opened by `writer`."""

    def __init__(self, path: Path, manager: ocp.CheckpointManager) -> None:
        self._path, self._manager = path, manager

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Writes the state (a tree of arrays) after an epoch; the newest `KEPT` stay.

        Raises OSError where it cannot be written.
        """
        directory, state = self._path / str(epoch), jax.device_get(state)
        try:
            _check_room(self._path, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(epoch, args=ocp.args.StandardSave(state))  # pyright: ignore[reportCallIssue]
            for name, content in ((_ARRAYS, _arrays), (_SUMS, lambda _: "".join(_sums(directory)))):
                with (directory / name).open("w") as file:
                    file.write(content(state))
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(directory)) from None
        except Exception as error:  # what TensorStore makes of a full disk has no kind of its own
            full = "no space" in str(error).lower() or "resource_exhausted" in str(error).lower()
            reason = "No space left on device" if full else " ".join(str(error).split())[:200]
            raise OSError(errno.ENOSPC if full else errno.EIO, reason, str(directory)) from None


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Writer]:
    """Opens, or makes, the directory of one net's checkpoints."""
    path = path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        enable_async_checkpointing=False,
        create=False,
        multiprocessing_options=_this_process(),
    )
    with ocp.CheckpointManager(path, options=options) as manager:
        yield Writer(path, manager)


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Has Orbax wait for no other process of a job: the first alone has checkpoints."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def _check_room(path: Path, size: int) -> None:
    """Raises OSError where a directory has no room for a checkpoint of so many bytes.

    A file of that size is written and removed: TensorStore, which finds out too late, prints
    tracebacks from its threads; and what a quota leaves, only writing tells.
    """
    with tempfile.NamedTemporaryFile(dir=path) as file:
        file.write(bytes(size * 5 // 4 + 2**18))
        file.flush()


def _arrays(state: dict[str, Any]) -> str:
    """A line for each array of a state: its name, type and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    return "".join(f"{name} {leaf.dtype} {leaf.shape}\n" for name, leaf in names)


def _sums(directory: Path) -> list[str]:
    """A line for each file of a checkpoint, but for the one that holds these lines."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / _SUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(directory).as_posix()}\n")
    return lines


def forget_after(path: Path, epoch: int) -> None:
    """Removes what lies in the directory of one net's checkpoints and is not of this epoch or one
    before it: later epochs, and what a killed process left half written or half removed.
    """
    if not path.is_dir():
        return
    for entry in path.iterdir():
        if not (entry.name.isdecimal() and 0 < int(entry.name) <= epoch):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
