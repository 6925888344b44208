"""What training would take, before it starts: which nets train together, the memory of a device by
XLA's account, and the time from a measured step, a measured evaluation and a measured write.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxnorm.config import Config
from jaxnorm.data.datasets import Dataset
from jaxnorm.data.download import Progress
from jaxnorm.runs.runner import save_epoch
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.schema import Epoch
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.groups import Group, Nets, SweptNet, compiled_settings, groups
from jaxnorm.training.mesh import MeshShape
from jaxnorm.training.trainer import Trained

MEASURED, STEPS = 3, 5
"""How often each thing is timed, of which the median counts; and the training steps timed at once:
a call takes time of its own, a third of a step under batch norm.
"""
COLUMNS = ("norm", "batch", "nets", "at once", "mesh", "rounds x steps", "step, ms")
COLUMNS += ("evaluation, ms", "writing, ms", "memory, MB", "training", "rest")


@dataclass(frozen=True)
class Estimate:
    """What the nets of one program take: a row of text for `COLUMNS`, and the seconds of all
    training and of all evaluation and writing.
    """

    row: list[str]
    training: float
    rest: float


def estimate(
    configs: Sequence[Config],
    dataset: Dataset,
    mesh: MeshShape | None = None,
    progress: Progress = lambda what, done, total: None,
    finished: Container[SweptNet] = (),
) -> list[Estimate]:
    """Estimates the training of all nets but the finished ones, from their first epoch on, program
    by program. Compiles every program, runs a few steps of each, and writes to a folder of its
    own, which it removes.

    In a job of several processes all of them call it.
    """
    rounds: dict[tuple, list[Group]] = {}
    for group in groups(configs, dataset, mesh, finished):
        program = group.norm, compiled_settings(configs[group.nets[0][0]])
        rounds.setdefault(program, []).append(group)
    done = itertools.count()

    def seconds(function: Callable[[], Any]) -> float:
        """The median time of a few calls, after one that compiles."""
        times = []
        for _ in range(1 + MEASURED):
            progress("planning", next(done), 3 * (1 + MEASURED) * len(rounds))
            clock = time.perf_counter()
            function()
            times.append(time.perf_counter() - clock)
        return statistics.median(times[1:])

    return [_estimate(configs, dataset, same, seconds) for same in rounds.values()]


def _estimate(
    configs: Sequence[Config],
    dataset: Dataset,
    rounds: list[Group],
    seconds: Callable[[Callable[[], Any]], float],
) -> Estimate:
    """Each round trains as many nets as the program does, from the first epoch to the last."""
    group, nets = rounds[0], Nets(configs, dataset, rounds[0])
    (chunk, *_), of_epoch = nets.chunks(1)
    state = nets.states([None] * len(group.nets))
    memory = _device_bytes(nets.arguments(state, chunk, of_epoch))

    few = chunk._replace(stop=min(chunk.start + STEPS, chunk.stop))

    def train_few() -> None:
        """A few training steps."""
        nonlocal state
        state, done = nets.train_chunk(state, few, of_epoch)
        jax.block_until_ready(done.losses)

    step_seconds = seconds(train_few) / (few.stop - few.start)
    evaluation = seconds(lambda: nets.evaluate(state))
    writing = seconds(lambda: _write(nets, state, dataset)) * len(group.nets)
    last_epoch = nets.config.epochs
    steps = nets.steps * last_epoch
    training = len(rounds) * steps * step_seconds
    rest = len(rounds) * last_epoch * (evaluation + writing)
    count = sum(len(group.nets) for group in rounds)
    row = [group.norm, *map(str, (nets.config.batch_size, count, group.size, group.mesh))]
    row += [f"{len(rounds)} x {steps:,}"]
    row += [f"{1e3 * time:.1f}" for time in (step_seconds, evaluation, writing)]
    row += ["not known" if memory is None else f"{memory / 1e6:,.0f}"]
    return Estimate([*row, duration(training), duration(rest)], training, rest)


def _device_bytes(arguments: tuple) -> int | None:
    """The memory of `train_nets` on a device by XLA's account, its data included; None for none."""
    account: Any = epochs.train_nets.lower(*arguments).compile().memory_analysis()
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    if account is None or not all(hasattr(account, name) for name in sizes):
        return None
    return sum(getattr(account, name) for name in sizes) - account.alias_size_in_bytes


def _write(nets: Nets, state: Any, dataset: Dataset) -> None:
    """Writes an epoch of one net to a folder that is removed."""
    first = jax.tree.map(lambda leaf: leaf[0], meshes.fetch(state))
    losses = np.zeros(nets.steps, np.float32)
    logits = np.zeros((len(dataset.test_labels), len(dataset.class_names)), np.float32)
    done = Trained(0, Epoch(nets.group.norm, 0, 1, *[0.0] * 6), first, losses, logits)
    with tempfile.TemporaryDirectory() as folder:
        save_epoch(RunDirectory(folder), done, losses, dataset)


def duration(seconds: float) -> str:
    """A length of time, for a person."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
