"""The processes that train one run or sweep, on one host or many: they share its folder alone.

Each has a share of the nets. With `--distributed` it is that of a job of `jax.distributed`, which
ends every process if one dies; in a job array every process has its own life.
"""

import os
import re
import signal
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxnorm.config import Setting, SweptNet, UserError

JOINING_SECONDS = 300
"""How long processes wait for each other at the start."""
HEARTBEAT_SECONDS = 30
"""A process of a job that is not heard of for this long is lost, and ends the others."""
PATIENCE_SECONDS = 24 * 3600
"""How long those that have trained their nets wait for the others."""
joined = False
"""Whether this process belongs to a job that it has not left."""
_JOB = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("ID", "COUNT", "MIN", "MAX", "STEP")


class Share(NamedTuple):
    """A process's share of the nets: those whose place is `index`, modulo `count`."""

    index: int = 0
    count: int = 1

    def of(self, nets: Sequence[SweptNet]) -> Sequence[SweptNet]:
        """Returns the nets of this share."""
        return nets[self.index :: self.count]

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Reads "3/8", or "array" for that of a job array. Raises `UserError`."""
        if text == "array":
            return cls._of_array()
        part = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not part or int(part[1]) >= int(part[2]):
            raise UserError(
                Setting("share", text),
                " is wrong: it must be of the form '0/8' to '7/8', or "
                "'array' in a job array of Slurm or Kubernetes",
            )
        return cls(int(part[1]), int(part[2]))

    @classmethod
    def _of_array(cls) -> "Share":
        index = os.environ.get("JOB_COMPLETION_INDEX", "")
        count = os.environ.get("JOB_COMPLETIONS", "")
        slurm = [os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in _SLURM]
        if all(map(str.isdecimal, slurm)):
            task, tasks, first, last, step = map(int, slurm)
            if last - first != step * (tasks - 1):
                raise UserError(
                    Setting("share", "array"),
                    f": the {tasks} tasks of the array are not every {step}. of {first} to {last}, "
                    "so their shares are not known: give an array such as 0-7",
                )
            index, count = str((task - first) // step), str(tasks)
        if index.isdecimal() and count.isdecimal():
            return cls.parse(f"{index}/{count}")
        raise UserError(
            Setting("share", "array"),
            " finds no job array: SLURM_ARRAY_TASK_ID and "
            "SLURM_ARRAY_TASK_COUNT, or JOB_COMPLETION_INDEX and JOB_COMPLETIONS, "
            "must be set; or give a share such as '0/8'",
        )


EVERY_NET = Share()
"""The share of a process that is alone."""


def join() -> Share:
    """Joins the job that the cluster (Slurm, Open MPI, Kubernetes, cloud TPU) or the environment
    (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) describes; returns this
    process's share. To be called before anything else of JAX. Raises `UserError`.
    """
    address, *numbers = (os.environ.get(name) for name in _JOB)
    for name, number in zip(_JOB[1:], numbers, strict=True):
        if number is not None and not number.isdecimal():
            raise UserError(f"{name} is {number!r}: it must be a whole number")
    count, index = (None if number is None else int(number) for number in numbers)
    # JAX would take SIGTERM for itself, to tell of a preemption; here it ends the process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=JOINING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=PATIENCE_SECONDS,
        )
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(
            Setting("distributed", True),
            f" cannot join a job ({' '.join(str(error).split())[:200]}): "
            "start it by Slurm, Open MPI or Kubernetes, or set "
            f"{', '.join(_JOB)} for each process",
        ) from None
    global joined
    joined = True
    return Share(jax.process_index(), jax.process_count())


def leave() -> None:
    """Leaves the job, once every process of it has come here; a signal ends the process."""
    global joined
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    jax.distributed.shutdown()
    joined = False
