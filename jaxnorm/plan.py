"""What training would take, before it starts: which nets train together, the memory of a device by
XLA's account, and the time from a measured step, a measured evaluation and a measured write.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxnorm import devices, experiment
from jaxnorm.config import Config
from jaxnorm.data import Dataset
from jaxnorm.devices import Layout
from jaxnorm.records import Epoch, RunDirectory

MEASURED_STEPS = 3
"""Steps from which a plan knows how long one takes; their median counts."""


@dataclass(frozen=True)
class Program:
    """What is planned of the nets of one norm and batch size."""

    norm: str
    batch_size: int
    nets: int
    layout: Layout
    at_once: int
    """Nets that train at the same time, on all devices."""
    rounds: int
    """How often the program trains its nets from the first epoch to the last."""
    steps: int
    """Of each round."""
    epochs: int
    """Of each round."""
    step_seconds: float
    """That one step of all nets of a round was measured to take."""
    evaluation_seconds: float
    """That one evaluation of them on the test images was."""
    write_seconds: float
    """That writing an epoch of all of them down was, by the first process."""
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


def plan(
    configs: Sequence[Config], dataset: Dataset, layout: Layout | None = None
) -> list[Program]:
    """Plans the training of all nets: what trains together, its memory, and its time. Compiles
    every program, runs a few steps of each, and writes to a folder of its own, which it removes.

    In a job of several processes all of them call it.
    """
    found: dict[tuple[str, int], list[experiment.Group]] = {}
    for group in experiment.groups(configs, dataset, layout):
        found.setdefault((group.norm, configs[group.nets[0][0]].batch), []).append(group)
    programs = []
    for (norm, batch_size), groups in found.items():
        nets = experiment.Nets(configs, dataset, groups[0])
        size, step, evaluation, write = _measure(nets, dataset)
        programs.append(
            Program(
                norm,
                batch_size,
                sum(len(group.nets) for group in groups),
                groups[0].layout,
                groups[0].places,
                len(groups),
                nets.steps * nets.config.epochs,
                nets.config.epochs,
                step,
                evaluation,
                write,
                size,
            )
        )
    return programs


def _measure(nets: experiment.Nets, dataset: Dataset) -> tuple[int | None, float, float, float]:
    """The bytes that the program takes on a device, and the seconds of a step, of an evaluation and
    of writing an epoch, of all nets.
    """
    (piece, *_), keys = nets.pieces(1)
    state = nets.begin(nets.initial())
    size = nets.device_bytes(state, piece, keys)
    times = []
    for number in range(1 + MEASURED_STEPS):
        i = min(number, piece.batches.shape[1] - 1)
        clock = time.perf_counter()
        state, steps = nets.advance(state, piece._replace(start=i, stop=i + 1), keys)
        jax.block_until_ready(steps.losses)
        times.append(time.perf_counter() - clock)
    evaluations = []
    for _ in range(2):  # the first compiles
        clock = time.perf_counter()
        test, _ = nets.evaluate(state)
        evaluations.append(time.perf_counter() - clock)
    with tempfile.TemporaryDirectory() as folder:
        directory, epoch = RunDirectory(folder), Epoch(nets.group.norm, 0, 1, *[0.0] * 6)
        first = jax.tree.map(lambda leaf: leaf[0], devices.fetch(state))
        losses = np.zeros(nets.steps, np.float32)
        net = experiment.Trained(0, epoch, first, losses, np.asarray(test.logits[0]))
        writes = experiment.write_times(directory, net, dataset, MEASURED_STEPS)
    step = sorted(times[1:])[MEASURED_STEPS // 2]
    write = sorted(writes)[MEASURED_STEPS // 2] * len(nets.group.nets)
    return size, step, evaluations[1], write


def describe(programs: Sequence[Program], data_bytes: int) -> str:
    """A plan as a table for a terminal."""
    lines = [
        f"{'norm':>8}  batch  nets  at once  mesh              rounds x steps  step, ms  "
        "evaluation, ms  writing, ms  memory, MB  training      rest"
    ]
    for each in programs:
        memory = "not known" if each.device_bytes is None else f"{each.device_bytes / 1e6:,.0f}"
        rounds = f"{each.rounds} x {each.steps:,}"
        lines.append(
            f"{each.norm:>8}  {each.batch_size:>5}  {each.nets:>4}  {each.at_once:>7}  "
            f"{each.layout!s:<16}  {rounds:>14}  {1e3 * each.step_seconds:>8.1f}  "
            f"{1e3 * each.evaluation_seconds:>14.0f}  {1e3 * each.write_seconds:>11.0f}  "
            f"{memory:>10}  {duration(each.training):>8}  {duration(each.rest):>8}"
        )
    training, rest = (
        sum(getattr(each, name) for each in programs) for name in ("training", "rest")
    )
    nets = sum(each.nets for each in programs)
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
