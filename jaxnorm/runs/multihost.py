"""The processes of one job, on one host or many: joining, agreeing, and noticing a lost one.

The runtime is JAX's own (`jax.distributed`): process 0 holds its coordination service,
every process sees the devices of all, and one that dies is noticed by the others. A process that
never joined is a job of its own, in which all of this costs nothing.
"""

import contextlib
import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxnorm.config import UserError

HEARTBEAT_SECONDS = 30
"""A process not heard of for so long is lost. One whose connection breaks is lost at once."""
JOINING_SECONDS = 300
"""How long processes wait for each other at the start."""
PATIENCE_SECONDS = 24 * 3600
"""How long the other processes wait at the end for process 0 to write its report."""
LOST = 1
"""Exit code of a process that has lost another."""
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LOST = "another process of this job was lost, so this one stops too"
_last_words: list[Any] = []  # what C calls must not be collected


def joined() -> bool:
    """Whether this process has joined a job of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_process_0() -> bool:
    """Whether this process is process 0 of its job, which alone writes and prints."""
    return not joined() or jax.process_index() == 0


def join() -> None:
    """Joins the job that the cluster (Slurm, Open MPI, Kubernetes, cloud TPU) or the environment
    (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) describes.

    To be called before anything else of JAX. Raises `UserError` where neither describes one, or the
    process 0 is not reached.
    """
    address, *numbers = (os.environ.get(name) for name in _VARIABLES)
    for name, number in zip(_VARIABLES[1:], numbers, strict=True):
        if number is not None and not number.isdecimal():
            raise UserError(f"{name} is {number!r}: it must be a whole number")
    count, index = (None if number is None else int(number) for number in numbers)
    waiting: dict[str, Any] = {
        "initialization_timeout": JOINING_SECONDS,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": PATIENCE_SECONDS,
    }
    # JAX would take SIGTERM for itself, to tell of a preemption; here it ends the process.
    jax.config.update("jax_enable_preemption_service", False)
    _say_when_aborted(
        f"error: process 0 of this job was not reached in {JOINING_SECONDS} s: is it "
        "running, and is the coordinator's address right?"
    )
    try:
        jax.distributed.initialize(address, count, index, **waiting)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"distributed=True cannot join a job ({' '.join(str(error).split())[:200]}): start it "
            f"by Slurm, Open MPI or Kubernetes, or set {', '.join(_VARIABLES)} for each process"
        ) from None


def _say_when_aborted(text: str) -> None:
    """JAX's runtime ends a process that cannot go on by `abort`, from a thread of its own: have it
    print this, and end with exit code `LOST`.
    """

    def last_words(_: int) -> None:
        with contextlib.suppress(OSError):
            os.write(2, text.encode() + b"\n")
        os._exit(LOST)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)
    _last_words.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


@contextlib.contextmanager
def watched(hint: str) -> Iterator[None]:
    """Ends the block with `ConnectionError` and this hint where another process is lost."""
    if not joined():
        yield
        return
    _say_when_aborted(f"error: {_LOST}; {hint}")
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # this process's own memory
            raise
        lost = ConnectionError(_LOST)
        lost.add_note(hint)
        raise lost from error


def leave() -> None:
    """Gives the others, whom the end of process 0 ends, time to say why they stop too."""
    if is_process_0():
        time.sleep(3)


def _gather(content: bytes) -> list[bytes]:
    """The bytes of every process, in every process."""
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content))))
    padded = np.frombuffer(content.ljust(int(sizes.max()) + 1, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def agree(**facts: str) -> None:
    """Raises `UserError` in every process where these facts are not the same in all of them."""
    for name, fact in facts.items() if joined() else ():
        first, *others = _gather(fact.encode())
        for index, other in enumerate(others, 1):
            if other != first:
                raise UserError(
                    f"the processes of this job do not have the same {name}: process {index} "
                    "differs from process 0"
                )


def in_every_process(function: Callable[[], Any]) -> Any:
    """Calls it in every process, and returns what it does there; where it fails in one with an
    error that a user can read, it fails in all.
    """
    result, failure = None, None
    try:
        result = function()
    except (UserError, OSError, ArithmeticError) as error:
        failure = error
    mine = "" if failure is None else str(failure) or repr(failure)
    texts = _gather(mine.encode()) if joined() else []
    if failure is not None:
        raise failure
    for index, text in enumerate(texts):
        if text:
            raise UserError(f"process {index} of this job stopped: {text.decode(errors='replace')}")
    return result


def from_process_0(function: Callable[[], Any]) -> Any:
    """What it returns in process 0, where alone it is called: JSON values, in every process."""
    if not joined():
        return function()
    content = in_every_process(lambda: json.dumps(function()).encode() if is_process_0() else b"")
    return json.loads(_gather(content)[0])


def arrays_from_process_0(tree: Any) -> Any:
    """Process 0's NumPy arrays, bit for bit; the others give any of the same shapes."""
    if not joined():
        return tree

    def share(array: Any) -> np.ndarray:
        # As bytes: a sum with zeros, which a broadcast is, loses the sign of a zero.
        array = np.asarray(array)
        content = np.frombuffer(array.tobytes(), np.uint8)
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
        return content.view(array.dtype).reshape(array.shape)

    return jax.tree.map(share, tree)
