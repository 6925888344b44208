"""Checkpoints: one file for a net and an epoch, with a checksum; the newest two stay.

A file holds a SHA-256 and then `flax.serialization` bytes of the net's state, the loss of every
step so far and the newest test logits, so that all of it is of the same epoch.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np

from jaxnorm.config import NetId
from jaxnorm.storage.directory import RunDirectory

KEPT = 2
"""The newest epoch's checkpoint, and the one before it in case that is damaged."""
_NAME = re.compile(r"epoch-([1-9]\d*)\.msgpack")
_LARGEST = 2**30


class Damaged(Exception):
    """A checkpoint that does not hold what was written; says which and why."""


def _path(run: RunDirectory, net: NetId, epoch: int) -> Path:
    return run.path_of(f"checkpoints/{net[0]}-{net[1]}/epoch-{epoch}.msgpack")


def epochs(run: RunDirectory, net: NetId) -> list[int]:
    """The epochs of which a net has a checkpoint, ascending."""
    folder = _path(run, net, 0).parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def save(run: RunDirectory, net: NetId, epoch: int, values: dict[str, Any]) -> None:
    """Writes a tree of arrays, and then removes all but the newest checkpoints. Raises OSError."""
    content = flax.serialization.to_bytes(jax.device_get(values))
    path = _path(run, net, epoch).relative_to(run.path)
    run.write_bytes(path, hashlib.sha256(content).digest() + content)
    for old in epochs(run, net):
        if not epoch - KEPT < old <= epoch:
            _path(run, net, old).unlink()


def restore(run: RunDirectory, net: NetId, epoch: int, shapes: Any) -> Any:
    """The values of a net after an epoch, in a tree like `shapes`.

    Raises `Damaged` where they are not what was written, and OSError where they cannot be read.
    """
    path = _path(run, net, epoch)
    content = run.read_bytes(path.relative_to(run.path), _LARGEST)
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise Damaged(f"{path} is damaged: its checksum does not fit")
    try:
        values = flax.serialization.from_bytes(shapes, content[32:])
    except Exception as error:  # whatever a file that passes its checksum may hold
        raise Damaged(f"{path} cannot be read ({type(error).__name__})") from None
    for wanted, got in zip(jax.tree.leaves(shapes), jax.tree.leaves(values), strict=True):
        ranks = np.ndim(wanted) == np.ndim(got) == 1
        if not ranks and (np.shape(wanted), wanted.dtype) != (np.shape(got), got.dtype):
            raise Damaged(f"{path} holds a net of other layers")
    return values


def set_aside(run: RunDirectory, net: NetId, epoch: int) -> Path:
    """Renames a damaged checkpoint, so that nothing reads it again; returns its new path."""
    return (path := _path(run, net, epoch)).rename(path.with_suffix(".damaged"))
