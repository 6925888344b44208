"""Which nets train together in one program, and all that they train on."""

import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxnorm.config import Config, UserError
from jaxnorm.data.datasets import Dataset, hold_out
from jaxnorm.model import layers
from jaxnorm.model.summary import net_of
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.epoch import Chunk, Evaluation, Steps
from jaxnorm.training.mesh import MeshShape
from jaxnorm.training.step import Program, TrainState, init_state, standard_of

CHUNKS = 20
"""Chunks of an epoch, so that progress shows and a loss that is not finite is found soon."""
ARGUMENTS = ("learning_rate", "weight_decay")
"""The settings that a program takes as arguments, so that its nets may differ in them."""
SweptNet = tuple[int, str, int]
"""A net of a sweep: the number of its run, its norm and its seed."""


def program_of(config: Config, norm: str, num_classes: int) -> Program:
    """Returns the program that trains a norm's nets."""
    return Program(
        model=net_of(config, norm, num_classes),
        momentum=config.momentum,
        nesterov=config.nesterov,
        augments=config.augment != "none",
        label_smoothing=config.label_smoothing,
    )


def learning_rates(config: Config, epoch: int, steps: int) -> np.ndarray:  # f32[steps]
    """The learning rate of each step of an epoch (from 1), as a share of the highest: constant, or
    "one-cycle" up and down in straight lines (Smith and Topin, "Super-Convergence", 2018).
    """
    done = ((epoch - 1) * steps + np.arange(steps) + 0.5) / (config.epochs * steps)
    if config.schedule == "constant":
        done = np.full(steps, config.warmup)
    return np.interp(done, (0, config.warmup, 1), (0, 1, 0)).astype(np.float32)


def compiled_settings(config: Config) -> tuple:
    """The settings that are compiled in: nets train in one program where these are the same."""
    return tuple(value for name, value in vars(config).items() if name not in ARGUMENTS)


def mesh_for(configs: Sequence[Config], config: Config, mesh: MeshShape | None) -> MeshShape:
    """The mesh for all nets that one program can train with those of `config`: the given one, or
    one chosen for as many.

    Raises `UserError` where the given one is not possible.
    """
    custom = any(layers.is_custom(norm) for norm in configs[0].norms)
    if mesh is None:
        same = compiled_settings(config)
        nets = sum(other.seeds for other in configs if compiled_settings(other) == same)
        return meshes.choose(nets, 1 if custom else config.batch_size)
    if custom and mesh.batch > 1:
        raise UserError(f"mesh={mesh} shares batches, which your own norm may not allow: batch=1")
    mesh.check(config.batch_size)
    return mesh


@dataclass(frozen=True)
class Group:
    """Nets that train in one program: of one norm, and of runs that differ in `ARGUMENTS` alone.

    The program trains `size` nets, a multiple of the mesh's rows. Where there are fewer, the last
    one fills the rest, and its copies are left out.
    """

    nets: tuple[SweptNet, ...]
    mesh: MeshShape
    size: int

    @property
    def norm(self) -> str:
        """Of its nets."""
        return self.nets[0][1]

    @property
    def filled(self) -> tuple[SweptNet, ...]:
        """As many nets as the program trains."""
        return self.nets + self.nets[-1:] * (self.size - len(self.nets))


def groups(
    configs: Sequence[Config],
    dataset: Dataset,
    mesh: MeshShape | None = None,
    finished: Container[SweptNet] = (),
) -> Iterator[Group]:
    """The nets of a sweep, in the order in which they train: by what is compiled, as the batch size
    is; then as many of a norm as train in one program together, run by run, and as many of each
    other norm before any more. Nets that are finished are left out.
    """
    alike: dict[tuple, list[tuple[int, Config]]] = {}
    for i, config in enumerate(configs):
        alike.setdefault(compiled_settings(config), []).append((i, config))
    for same in alike.values():
        first = same[0][1]
        shape, norms = mesh_for(configs, first, mesh), first.norms
        classes = len(dataset.class_names)
        programs = [program_of(first, norm, classes) for norm in norms]
        at_once = min(epochs.nets_at_once(program, first.batch_size) for program in programs)
        nets = [(i, seed) for i, config in same for seed in config.seed_numbers]
        count = math.ceil(len(nets) / (at_once * shape.seed))
        size = math.ceil(len(nets) / count / shape.seed) * shape.seed
        of_norms = []
        for norm in norms:
            unfinished = [(i, norm, seed) for i, seed in nets if (i, norm, seed) not in finished]
            parts = [tuple(unfinished[k : k + size]) for k in range(0, len(unfinished), size)]
            of_norms.append([Group(part, shape, size) for part in parts])
        yield from filter(None, itertools.chain(*itertools.zip_longest(*of_norms)))


class Nets:
    """The nets of a group, with all that they train on, on the mesh."""

    def __init__(self, configs: Sequence[Config], dataset: Dataset, group: Group) -> None:
        self.group, self.config = group, configs[group.nets[0][0]]
        self.program = program_of(self.config, group.norm, len(dataset.class_names))
        data = (dataset.train_images, dataset.train_labels)
        self.images, self.labels = meshes.place(group.mesh, data)
        test = (dataset.test_images, dataset.test_labels)
        self.test_images, self.test_labels = meshes.place(group.mesh, test)
        seeds = [seed for _, _, seed in group.filled]
        rates = [configs[run].rate(norm) for run, norm, _ in group.filled]
        decays = [configs[run].weight_decay for run, _, _ in group.filled]
        splits = [hold_out(dataset.train_labels, self.config.validation, seed) for seed in seeds]
        rows, held_out = (np.stack(part) for part in zip(*splits, strict=True))
        self.standards = [standard_of(*dataset.statistics(net_rows)) for net_rows in rows]
        self.rates = np.array(rates, np.float32)
        self.seeds, self.decays, self.rows, self.held_out = self.place(
            (np.array(seeds, np.uint32), np.array(decays, np.float32), rows, held_out)
        )
        self.count = len(dataset.train_labels) - self.config.validation
        self.steps = self.config.steps(len(dataset.train_labels))

    def place(self, arrays: Any) -> Any:
        """Puts each net's arrays on its devices."""
        return meshes.place(self.group.mesh, arrays, by_net=True)

    def states(self, start: Sequence[TrainState | None]) -> TrainState:
        """Stacks the states of the group's nets, the initial one for None, on the mesh."""
        states = []
        for state, (_, _, seed), standard in zip(
            start, self.group.nets, self.standards, strict=False
        ):
            if state is None:
                state = jax.device_get(init_state(self.program, seed, standard))
            states.append(state)
        states += [states[-1]] * (self.group.size - len(states))
        return self.place(jax.tree.map(lambda *leaves: np.stack(leaves), *states))

    def chunks(self, epoch: int) -> tuple[list[Chunk], tuple]:
        """What the nets train on in an epoch; its keys, and its learning rates f32[K, steps]."""
        arguments = (self.group.mesh, self.seeds, epoch, self.rows, self.config.batch_size, CHUNKS)
        shares = learning_rates(self.config, epoch, self.steps)
        chunks, keys = epochs.epoch_chunks(*arguments)
        return chunks, (keys, self.rates[:, None] * shares[None])

    def arguments(self, state: TrainState, chunk: Chunk, of_epoch: tuple) -> tuple:
        """What `train_nets` takes for a chunk."""
        batches, *bounds = chunk
        keys, rates = of_epoch
        rates = self.place(rates[:, chunk.first_step : chunk.first_step + batches.shape[1]])
        data = (self.images, self.labels, batches)
        return self.program, self.group.mesh, state, *data, keys, rates, self.decays, *bounds

    def train_chunk(
        self, state: TrainState, chunk: Chunk, of_epoch: tuple
    ) -> tuple[TrainState, Steps]:
        """Trains on one chunk of an epoch. `state` is consumed."""
        return epochs.train_nets(*self.arguments(state, chunk, of_epoch))

    def evaluate(self, state: TrainState) -> tuple[Evaluation, Evaluation | None]:
        """On the test images and, if any are, on the held-out ones; in NumPy's arrays."""
        test = epochs.evaluate_nets(
            self.program, self.group.mesh, state, self.test_images, self.test_labels
        )
        if not self.config.validation:
            return meshes.fetch(test), None
        data = (self.images, self.labels, self.held_out)
        return meshes.fetch(
            (test, epochs.evaluate_nets(self.program, self.group.mesh, state, *data))
        )
