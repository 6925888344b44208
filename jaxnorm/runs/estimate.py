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
    trains `at_once` nets from the first epoch to the last, in so many steps and epochs.

    Seconds are of a step, an evaluation on the test images and a write of all nets of a round.
    `device_bytes` is what the program takes on a device, data included; None where XLA keeps no
    account.
    """

    norm: str
    batch_size: int
    nets: int
    mesh: MeshShape
    at_once: int
    rounds: int
    steps: int
    epochs: int
    step_seconds: float
    evaluation_seconds: float
    write_seconds: float
    device_bytes: int | None

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
        programs.setdefault((group.norm, configs[group.nets[0][0]].batch_size), []).append(group)
    return [_estimate(configs, dataset, same) for same in programs.values()]


def _estimate(configs: Sequence[Config], dataset: Dataset, same: Sequence[Group]) -> Estimate:
    nets, group = Nets(configs, dataset, same[0]), same[0]
    (chunk, *_), of_epoch = nets.chunks(1)
    state = nets.states([None] * len(group.nets))
    size = _device_bytes(nets.arguments(state, chunk, of_epoch))

    def step() -> None:
        nonlocal state
        state, done = nets.train_chunk(state, chunk._replace(stop=chunk.start + 1), of_epoch)
        jax.block_until_ready(done.losses)

    training = _seconds(step)
    evaluation = _seconds(lambda: nets.evaluate(state))
    writing = _seconds(_writing(nets, state, dataset)) * len(group.nets)
    count, last_epoch = sum(len(each.nets) for each in same), nets.config.epochs
    rounds = (len(same), nets.steps * last_epoch, last_epoch)
    about = (group.norm, nets.config.batch_size, count, group.mesh, group.size)
    return Estimate(*about, *rounds, training, evaluation, writing, size)


def _seconds(function: Callable[[], Any]) -> float:
    """The median time of a few calls, after one that compiles."""
    times = []
    for _ in range(1 + MEASURED_STEPS):
        clock = time.perf_counter()
        function()
        times.append(time.perf_counter() - clock)
    return statistics.median(times[1:])


def _device_bytes(arguments: tuple) -> int | None:
    """The memory of `train_nets` on a device by XLA's account, its data included."""
    account: Any = epochs.train_nets.lower(*arguments).compile().memory_analysis()
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    if account is None or not all(hasattr(account, name) for name in sizes):
        return None
    return sum(getattr(account, name) for name in sizes) - account.alias_size_in_bytes


def _writing(nets: Nets, state: Any, dataset: Dataset) -> Callable[[], None]:
    """What writes an epoch of one net, to a folder that is removed."""
    first = jax.tree.map(lambda leaf: leaf[0], meshes.fetch(state))
    losses = np.zeros(nets.steps, np.float32)
    logits = np.zeros((len(dataset.test_labels), len(dataset.class_names)), np.float32)
    done = Trained(0, Epoch(nets.group.norm, 0, 1, *[0.0] * 6), first, losses, logits)

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_epoch(RunDirectory(folder), done, losses, dataset)

    return write


def duration(seconds: float) -> str:
    """A length of time, for a person."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
