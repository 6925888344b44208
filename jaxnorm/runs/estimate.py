"""What training would take, before it starts: which nets train together, the memory of a device by
XLA's account, and the time from a measured step, a measured evaluation and a measured write.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxnorm.config import Config
from jaxnorm.data.datasets import Dataset
from jaxnorm.runs.runner import save_epoch
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.schema import Epoch
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.mesh import MeshShape
from jaxnorm.training.trainer import Group, Nets, Trained, groups

MEASURED_STEPS = 3
"""Steps from which an estimate knows how long one takes; their median counts."""


@dataclass(frozen=True)
class Estimate:
    """What the nets of one norm and batch size take. They train in rounds: in each, the program
    trains its nets from the first epoch to the last.
    """

    norm: str
    batch_size: int
    nets: int
    mesh: MeshShape
    at_once: int
    """Nets that train at the same time, on all devices."""
    rounds: int
    steps: int
    """Of each round."""
    epochs: int
    """Of each round."""
    step_seconds: float
    """Of one step of all nets of a round, as measured."""
    evaluation_seconds: float
    """Of one evaluation of them on the test images, as measured."""
    write_seconds: float
    """Of writing an epoch of all of them, by process 0, as measured."""
    device_bytes: int | None
    """Memory that the program takes on a device, data included, by XLA's account; None where XLA
    gives none.
    """

    @property
    def training(self) -> float:
        """Seconds of all training steps."""
        return self.rounds * self.steps * self.step_seconds

    @property
    def rest(self) -> float:
        """Seconds of evaluation and writing."""
        return self.rounds * self.epochs * (self.evaluation_seconds + self.write_seconds)


def estimate(
    configs: Sequence[Config], dataset: Dataset, mesh: MeshShape | None = None
) -> list[Estimate]:
    """Estimates the training of all nets. Compiles every program, runs a few steps of each, and
    writes to a folder of its own, which it removes.

    In a job of several processes all of them call it.
    """
    programs: dict[tuple[str, int], list[Group]] = {}
    for group in groups(configs, dataset, mesh):
        programs.setdefault((group.norm, configs[group.nets[0][0]].batch), []).append(group)
    estimates = []
    for (norm, batch_size), same in programs.items():
        nets = Nets(configs, dataset, same[0])
        (chunk, *_), keys = nets.chunks(1)
        state = nets.states([None] * len(nets.group.nets))
        size = _device_bytes(nets.arguments(state, chunk, keys))
        steps = []
        for number in range(1 + MEASURED_STEPS):  # the first compiles
            i = min(number, chunk.batches.shape[1] - 1)
            clock = time.perf_counter()
            state, done = nets.train_chunk(state, chunk._replace(start=i, stop=i + 1), keys)
            jax.block_until_ready(done.losses)
            steps.append(time.perf_counter() - clock)
        evaluations = _seconds(lambda nets=nets, state=state: nets.evaluate(state), 2)
        estimates.append(
            Estimate(
                norm,
                batch_size,
                sum(len(group.nets) for group in same),
                same[0].mesh,
                same[0].size,
                len(same),
                nets.steps * nets.config.epochs,
                nets.config.epochs,
                statistics.median(steps[1:]),
                evaluations[1],
                _write_seconds(nets, state, dataset) * len(nets.group.nets),
                size,
            )
        )
    return estimates


def _seconds(function: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        clock = time.perf_counter()
        function()
        times.append(time.perf_counter() - clock)
    return times


def _device_bytes(arguments: tuple) -> int | None:
    """The memory of `train_nets` on a device by XLA's account, its data included."""
    account: Any = epochs.train_nets.lower(*arguments).compile().memory_analysis()
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    if account is None or not all(hasattr(account, name) for name in sizes):
        return None
    return sum(getattr(account, name) for name in sizes) - account.alias_size_in_bytes


def _write_seconds(nets: Nets, state: Any, dataset: Dataset) -> float:
    """The median time of writing an epoch of one net."""
    record = Epoch(nets.group.norm, 0, 1, *[0.0] * 6)
    first = jax.tree.map(lambda leaf: leaf[0], meshes.fetch(state))
    losses = np.zeros(nets.steps, np.float32)
    logits = np.zeros((len(dataset.test_labels), len(dataset.class_names)), np.float32)
    done = Trained(0, record, first, losses, logits)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(folder)
        return statistics.median(
            _seconds(lambda: save_epoch(directory, done, losses, dataset), MEASURED_STEPS)
        )


def describe(estimates: Sequence[Estimate], data_bytes: int) -> str:
    """Estimates as a table for a terminal."""
    lines = [
        f"{'norm':>8}  batch  nets  at once  mesh              rounds x steps  step, ms  "
        "evaluation, ms  writing, ms  memory, MB  training      rest"
    ]
    for each in estimates:
        memory = "not known" if each.device_bytes is None else f"{each.device_bytes / 1e6:,.0f}"
        rounds = f"{each.rounds} x {each.steps:,}"
        lines.append(
            f"{each.norm:>8}  {each.batch_size:>5}  {each.nets:>4}  {each.at_once:>7}  "
            f"{each.mesh!s:<16}  {rounds:>14}  {1e3 * each.step_seconds:>8.1f}  "
            f"{1e3 * each.evaluation_seconds:>14.0f}  {1e3 * each.write_seconds:>11.0f}  "
            f"{memory:>10}  {duration(each.training):>8}  {duration(each.rest):>8}"
        )
    training, rest = (
        sum(getattr(each, name) for each in estimates) for name in ("training", "rest")
    )
    nets = sum(each.nets for each in estimates)
    lines.append(
        f"{nets} nets on {jax.device_count()} devices: about {duration(training)} of training and "
        f"{duration(rest)} of evaluation and writing. Times are of all nets at once; memory is a "
        f"device's, with the data's {data_bytes / 1e6:,.0f} MB."
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A length of time, for a person."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
