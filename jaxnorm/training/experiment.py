"""The runs of a command with their data and mesh, in memory; and the groups of nets that train in
one program.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxnorm.config import NORMS, Config, Setting, SweptNet, UserError, swept_nets
from jaxnorm.data.datasets import Dataset, hold_out
from jaxnorm.model import layers
from jaxnorm.model.summary import check_nets, net_of
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.epoch import Chunk, Evaluation, Steps
from jaxnorm.training.mesh import MeshShape
from jaxnorm.training.step import Program, TrainState, init_state, standard_of

CHUNKS = 20
"""Chunks of an epoch, so that progress shows and a loss that is not finite is found soon."""
ARGUMENTS = ("learning_rate", "weight_decay")
"""The settings that a program takes as arguments, so that its nets may differ in them."""


def program_of(
    config: Config, norm: str, num_classes: int, train_count: int | None = None
) -> Program:
    """Returns the program that trains a norm's nets, on a training set of this many images."""
    steps = None if train_count is None else config.epochs * config.steps(train_count)
    return Program(
        model=net_of(config, norm, num_classes, steps),
        optimizer=config.optimizer,
        momentum=config.momentum,
        nesterov=config.nesterov,
        augments=config.augment != "none",
        label_smoothing=config.label_smoothing,
    )


def learning_rates(config: Config, epoch: int, steps: int) -> np.ndarray:  # f32[steps]
    """Returns the learning rate of each step of an epoch (from 1), as a share of the highest:
    constant, or "one-cycle" up and down in straight lines (Smith and Topin, "Super-Convergence",
    2018).
    """
    done = ((epoch - 1) * steps + np.arange(steps) + 0.5) / (config.epochs * steps)
    if config.schedule == "constant":
        done = np.full(steps, config.warmup)
    return np.interp(done, (0, config.warmup, 1), (0, 1, 0)).astype(np.float32)


def compiled_settings(config: Config) -> tuple:
    """Returns the settings that are compiled in: nets train in one program if these are the
    same.
    """
    return tuple(value for name, value in vars(config).items() if name not in ARGUMENTS)


def mesh_for(
    configs: Sequence[Config], config: Config, asked: MeshShape | None, before: str | None = None
) -> MeshShape:
    """Returns the mesh for all nets that one program can train with those of `config`: the one that
    was asked for, or the one that the run was trained on `before` if it is possible here, or one
    chosen for their number.

    Raises `UserError` if the one that was asked for is not possible.
    """
    if asked is None and before is not None:
        with contextlib.suppress(UserError):
            return mesh_for(configs, config, MeshShape.parse(before))
    mesh, custom = asked, any(layers.is_custom(norm) for norm in config.norms)
    if mesh is None:
        same = compiled_settings(config)
        nets = sum(other.seeds for other in configs if compiled_settings(other) == same)
        alone = custom or _with_ghosts(config)
        return meshes.choose(nets, 1 if alone else config.batch_size)
    if custom and mesh.batch > 1:
        raise UserError(
            Setting("mesh", mesh), " shares batches, which your own norm may not allow: batch=1"
        )
    mesh.check(config.batch_size)
    check_ghosts(config, mesh, config.batch_size)
    return mesh


def _with_ghosts(config: Config) -> bool:
    return any("ghost_size" in NORMS[n].settings.values() for n in config.norms if n in NORMS)


def check_ghosts(config: Config, mesh: MeshShape, count: int) -> None:
    """Raises `UserError` if the devices that share a batch of `count` images would have other
    ghosts than one device has: a ghost never spans devices.
    """
    shared = mesh.batch > 1 and count % mesh.batch == 0
    if shared and _with_ghosts(config) and count // mesh.batch % config.ghost_size:
        raise UserError(
            Setting("mesh", mesh),
            f" would cut ghosts of {config.ghost_size} images in a batch of {count}: choose "
            "batch=1, or another ",
            Setting("ghost_size"),
        )


def check(config: Config, dataset: Dataset) -> dict[str, int]:
    """Returns the parameters of each norm's net.

    Raises `UserError` for what can be known to fail before training starts.
    """
    if config.precision == "tf32" and jax.default_backend() != "gpu":
        raise UserError(
            Setting("precision", "tf32"),
            " needs an NVIDIA GPU, and there is none: choose float32 or bfloat16",
        )
    images = f"the {len(dataset.train_labels)} training images of {dataset.name}"
    count = len(dataset.train_labels) - config.validation
    if count <= 0:
        raise UserError(
            Setting("validation", config.validation), f" leaves none of {images} to train on"
        )
    if config.batch_size > count:
        held = f", of which {config.validation} are held out" if config.validation else ""
        raise UserError(Setting("batch_size", config.batch_size), f" is larger than {images}{held}")
    return check_nets(config, len(dataset.class_names))


@dataclass(frozen=True, eq=False)
class Experiment:
    """The runs of a command, their data, and the mesh that was asked for (None: one is chosen for
    each group; that of the run `before`, for each run that resumes, is kept if it can be). It says
    whether a run `measures` its nets inside. It is made once, checked, and travels alone.

    Raises `UserError` for what can be known to fail before training starts.
    """

    configs: Sequence[Config]
    dataset: Dataset
    mesh: MeshShape | None = None
    before: Sequence[str | None] = ()
    measures: bool = True

    def __post_init__(self) -> None:
        for config in self.configs:
            check(config, self.dataset)
            self.mesh_for(config)

    @functools.cached_property
    def parameters(self) -> list[dict[str, int]]:
        """The number of parameters of each norm's net, for each run."""
        return [check(config, self.dataset) for config in self.configs]

    @property
    def nets(self) -> list[SweptNet]:
        """Every net of every run, in order."""
        return swept_nets(self.configs)

    def program(self, config: Config, norm: str) -> Program:
        """Returns the program that trains a norm's nets on this data."""
        classes, count = len(self.dataset.class_names), len(self.dataset.train_labels)
        return program_of(config, norm, classes, count)

    def mesh_for(self, config: Config) -> MeshShape:
        """Returns the mesh for all nets that one program can train with those of `config`."""
        before = self.before[self.configs.index(config)] if self.before else None
        mesh = mesh_for(self.configs, config, self.mesh, before)
        ragged = (len(self.dataset.train_labels) - config.validation) % config.batch_size
        check_ghosts(config, mesh, ragged)
        return mesh

    def groups(self, done: Mapping[SweptNet, int] | None = None) -> Iterator["Group"]:
        """Yields the nets in the order in which they train, those that train in one program
        together: as many of a norm, and as many of each other norm before any more.

        `done` says how many epochs of each net that is to train are complete; None: no epoch of
        any. Nets at the same epoch form a group; finished ones are left out.
        """
        done, alike = dict.fromkeys(self.nets, 0) if done is None else done, {}
        for run, config in enumerate(self.configs):
            alike.setdefault(compiled_settings(config), []).append(run)
        for runs in alike.values():
            first = self.configs[runs[0]]
            mesh, norms = self.mesh_for(first), first.norms
            programs = [self.program(first, norm) for norm in norms]
            at_once = min(epochs.nets_at_once(program, first.batch_size) for program in programs)
            nets = [(run, seed) for run in runs for seed in self.configs[run].seed_numbers]
            count = math.ceil(len(nets) / (at_once * mesh.seed))
            size = math.ceil(len(nets) / count / mesh.seed) * mesh.seed
            of_norms = []
            for norm in norms:
                at_epoch: dict[int, list[SweptNet]] = {}
                for run, seed in nets:
                    net = SweptNet(run, norm, seed)
                    if net in done:
                        at_epoch.setdefault(done[net], []).append(net)
                at_epoch.pop(first.epochs, None)
                of_norms.append(
                    [
                        Group(self, tuple(same[k : k + size]), mesh, size, start)
                        for start, same in sorted(at_epoch.items(), reverse=True)
                        for k in range(0, len(same), size)
                    ]
                )
            yield from filter(None, itertools.chain(*itertools.zip_longest(*of_norms)))

    def placed(self, mesh: MeshShape) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns the training images and labels and those of the test, on the mesh; they are put
        there once.
        """
        if mesh not in self._placed:
            data = self.dataset
            arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
            self._placed[mesh] = meshes.place(mesh, arrays)
        return self._placed[mesh]

    @functools.cached_property
    def _placed(self) -> dict[MeshShape, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class Group:
    """Nets that train in one program, with all that they train on: of one norm, at one epoch, and
    of runs that differ in `ARGUMENTS` alone.

    The program trains `size` nets, a multiple of the mesh's rows. If there are fewer, the last one
    fills the rest, and its copies are left out. `start` epochs of the nets are complete.
    """

    experiment: Experiment
    nets: tuple[SweptNet, ...]
    mesh: MeshShape
    size: int
    start: int = 0

    @property
    def norm(self) -> str:
        """The norm of the nets."""
        return self.nets[0].norm

    @property
    def config(self) -> Config:
        """The settings of the first net's run; the others differ in `ARGUMENTS` alone."""
        return self.experiment.configs[self.nets[0].run]

    @property
    def filled(self) -> tuple[SweptNet, ...]:
        """The nets, the last one repeated to as many as the program trains."""
        return self.nets + self.nets[-1:] * (self.size - len(self.nets))

    @functools.cached_property
    def program(self) -> Program:
        """The program that trains the nets."""
        return self.experiment.program(self.config, self.norm)

    @property
    def train_count(self) -> int:
        """The number of images that each net trains on."""
        return len(self.experiment.dataset.train_labels) - self.config.validation

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""
        return self.config.steps(len(self.experiment.dataset.train_labels))

    @functools.cached_property
    def _splits(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that each net trains on, i32[K, N], and those held out from it, i32[K, M]."""
        labels, held_out = self.experiment.dataset.train_labels, self.config.validation
        splits = [hold_out(labels, held_out, net.seed) for net in self.filled]
        rows, held = (np.stack(part) for part in zip(*splits, strict=True))
        return rows, held

    @functools.cached_property
    def standards(self) -> list[np.ndarray]:  # f32[2, 3] each
        """The mean and factor that the images of each net are standardized with."""
        dataset = self.experiment.dataset
        return [standard_of(*dataset.statistics(rows)) for rows in self._splits[0]]

    @functools.cached_property
    def _per_net(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Seeds u32[K], weight decays f32[K], rows and held-out rows, each on its net's devices."""
        configs = self.experiment.configs
        seeds = np.array([net.seed for net in self.filled], np.uint32)
        decays = np.array([configs[net.run].weight_decay for net in self.filled], np.float32)
        return self._place((seeds, decays, *self._splits))

    def _place(self, arrays: Any) -> Any:
        return meshes.place(self.mesh, arrays, by_net=True)

    def of(self, nets: Iterable[SweptNet], start: int) -> "Group":
        """Returns the group of some of the nets, which are at epoch `start`."""
        return dataclasses.replace(self, nets=tuple(nets), start=start)

    def states(self, start: Sequence[TrainState | None]) -> TrainState:
        """Stacks the states of the group's nets, the initial one for None, on the mesh."""
        states = []
        for state, net, standard in zip(start, self.nets, self.standards, strict=False):
            if state is None:
                state = jax.device_get(init_state(self.program, net.seed, standard))
            states.append(state)
        states += [states[-1]] * (self.size - len(states))
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *states))

    def chunks(self, epoch: int) -> tuple[list[Chunk], tuple]:
        """Returns what the nets train on in an epoch; its keys, and its learning rates f32[K,
        steps].
        """
        seeds, _, rows, _ = self._per_net
        configs = self.experiment.configs
        rates = np.array([configs[net.run].rate(net.norm) for net in self.filled], np.float32)
        shares = learning_rates(self.config, epoch, self.steps)
        cut = self.config.batch_size, CHUNKS, layers.takes_masks(self.norm)
        chunks, keys = epochs.epoch_chunks(self.mesh, seeds, epoch, rows, *cut)
        return chunks, (keys, rates[:, None] * shares[None])

    def arguments(self, state: TrainState, chunk: Chunk, of_epoch: tuple) -> tuple:
        """Returns what `train_nets` takes for a chunk."""
        batches, *bounds = chunk
        keys, rates = of_epoch
        rates = self._place(rates[:, chunk.first_step : chunk.first_step + batches.shape[1]])
        images, labels, _, _ = self.experiment.placed(self.mesh)
        data, decays = (images, labels, batches), self._per_net[1]
        return self.program, self.mesh, state, *data, keys, rates, decays, *bounds

    def train_chunk(
        self, state: TrainState, chunk: Chunk, of_epoch: tuple
    ) -> tuple[TrainState, Steps]:
        """Trains on one chunk of an epoch. `state` is consumed."""
        return epochs.train_nets(*self.arguments(state, chunk, of_epoch))

    def evaluate(self, state: TrainState) -> tuple[Evaluation, Evaluation | None]:
        """Evaluates on the test images and, if any are, on the held-out ones; returns NumPy's
        arrays.
        """
        images, labels, *test = self.experiment.placed(self.mesh)
        evaluate = functools.partial(epochs.evaluate_nets, self.program, self.mesh, state)
        of_test = evaluate(*test)
        if not self.config.validation:
            return meshes.fetch(of_test), None
        return meshes.fetch((of_test, evaluate(images, labels, self._per_net[3])))
