"""What training would take, before it starts: which nets train together, the memory of a device by
XLA's account, and the time from a measured step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxnorm import experiment
from jaxnorm.config import Config
from jaxnorm.data import Dataset
from jaxnorm.devices import Layout

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
    step_seconds: float
    """That one step of all nets of a round was measured to take."""
    device_bytes: int | None
    """Memory that the program takes on a device, data included, by XLA's account; None where XLA
    gives none.
    """

    @property
    def seconds(self) -> float:
        """Of training, without evaluation."""
        return self.rounds * self.steps * self.step_seconds


def plan(
    configs: Sequence[Config], dataset: Dataset, layout: Layout | None = None
) -> list[Program]:
    """Plans the training of all nets: what trains together, its memory, and its time from a
    measured step. Compiles every program and runs a few steps of each.

    In a job of several processes all of them call it.
    """
    found: dict[tuple[str, int], list[experiment.Group]] = {}
    for group in experiment.groups(configs, dataset, layout):
        found.setdefault((group.norm, configs[group.nets[0][0]].batch), []).append(group)
    programs = []
    for (norm, batch_size), groups in found.items():
        nets = experiment.Nets(configs, dataset, groups[0])
        seconds, size = _measure(nets)
        programs.append(
            Program(
                norm,
                batch_size,
                sum(len(group.nets) for group in groups),
                groups[0].layout,
                groups[0].places,
                len(groups),
                nets.steps * nets.config.epochs,
                seconds,
                size,
            )
        )
    return programs


def _measure(nets: experiment.Nets) -> tuple[float, int | None]:
    """Seconds of a step of all nets, and the bytes that the program takes on a device."""
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
    return sorted(times[1:])[MEASURED_STEPS // 2], size


def describe(programs: Sequence[Program], data_bytes: int) -> str:
    """A plan as a table for a terminal."""
    head = (
        f"{'norm':>8}  batch  nets  at once  mesh               rounds x steps    step, ms  "
        "memory a device, MB  training"
    )
    lines = [head]
    for each in programs:
        memory = "not known" if each.device_bytes is None else f"{each.device_bytes / 1e6:,.0f}"
        rounds = f"{each.rounds} x {each.steps:,}"
        lines.append(
            f"{each.norm:>8}  {each.batch_size:>5}  {each.nets:>4}  {each.at_once:>7}  "
            f"{each.layout!s:<17}  {rounds:>14}  {1e3 * each.step_seconds:>10.1f}  {memory:>19}  "
            f"{duration(each.seconds):>8}"
        )
    total = sum(each.seconds for each in programs)
    nets = sum(each.nets for each in programs)
    lines.append(
        f"{nets} nets on {jax.device_count()} devices: about {duration(total)} of training, and "
        f"evaluation and writing; the data takes {data_bytes / 1e6:,.0f} MB of each device's memory"
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A length of time, for a person."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
