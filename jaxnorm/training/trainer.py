"""Trains the nets of runs epoch by epoch, in memory: `fit` keeps them, `runs.runner` writes them
down. Both take what `train` yields.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.config import Config, Net, UserError
from jaxnorm.data.datasets import Dataset, hold_out
from jaxnorm.model import layers
from jaxnorm.model.summary import check_nets, net_of
from jaxnorm.storage.schema import Epoch
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.epoch import Chunk, Evaluation, Steps
from jaxnorm.training.mesh import ONE, MeshShape
from jaxnorm.training.step import Program, TrainState, init_state, standard_of

CHUNKS = 20
"""Chunks of an epoch, so that progress shows and a loss that is not finite is found soon."""
SweptNet = tuple[int, str, int]
"""A net of a sweep: the number of its run, its norm and its seed."""


class NonFiniteLoss(ArithmeticError):
    """The loss of a net turned NaN or infinite, at an epoch (from 1) and a step in it (from 1); the
    step is None where it is the loss of the evaluation after the epoch.
    """

    def __init__(self, net: SweptNet, epoch: int, step: int | None, loss: float) -> None:
        phase, where = ("evaluation", "") if step is None else ("training", f", step {step}")
        super().__init__(
            f"the {phase} loss of {net[1]} norm, seed {net[2]}, is {loss} at epoch {epoch}{where}: "
            "try a smaller learning_rate=; the epochs before it are kept"
        )
        self.net, self.epoch, self.step = net, epoch, step


class Callback:
    """Hears what happens while nets train. Every method does nothing unless overridden."""

    def on_start(self, norm: str, seeds: list[int], steps: int) -> None:
        """The nets of a norm and these seeds start to train together; `steps` is the number of
        batches in an epoch. In a sweep a seed may be there for several learning rates.
        """

    def on_steps(self, epoch: int, done: int) -> None:
        """So many batches of the epoch are done. May raise, to stop training."""

    def on_epoch(self, config: Config, epoch: Epoch) -> None:
        """A net of this run has finished an epoch, which is on disk where there is one."""

    def on_resume(self, complete: int) -> None:
        """A run resumes; so many epochs of all its nets are complete."""

    def on_warning(self, text: str) -> None:
        """Something is damaged and set aside, or a net is left out."""


class NetProgress(NamedTuple):
    """How far a net is: its complete epochs, its state after them (None for the initial one, and
    for that of a finished net without checkpoints), and its losses so far.
    """

    epochs: int = 0
    state: TrainState | None = None
    losses: np.ndarray = np.zeros(0, np.float32)  # f32[epochs * steps]


class Trained(NamedTuple):
    """The result of an epoch of one net, in NumPy's arrays."""

    run: int
    record: Epoch
    state: TrainState
    losses: np.ndarray  # f32[steps], of this epoch
    logits: np.ndarray  # f32[M, classes], of the test set after it

    @property
    def net(self) -> SweptNet:
        """Which net it is."""
        return self.run, self.record.norm, self.record.seed


@dataclass(frozen=True)
class Fit:
    """One trained net, in memory."""

    norm: str
    seed: int
    parameters: int
    epochs: list[Epoch]
    step_losses: np.ndarray  # f32[epochs * steps]
    logits: np.ndarray  # f32[M, classes], of the test set after the last epoch
    state: TrainState
    program: Program

    def predict(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
        return predict(self.program, self.state, images)


def fit(
    config: Config,
    dataset: Dataset,
    callback: Callback | None = None,
    mesh: MeshShape | None = None,
) -> dict[Net, Fit]:
    """Trains every net of `config` on `dataset` without touching the disk.

    Returns a `Fit` for each (norm, seed) whose loss stayed finite. Raises `UserError`, and
    `NonFiniteLoss` where no net's did.
    """
    counts, callback = check(config, dataset), callback or Callback()
    history: dict[Net, list[Trained]] = {net: [] for net in config.nets}
    for trained in train([config], dataset, callback, mesh):
        history[trained.net[1:]].append(trained)
        callback.on_epoch(config, trained.record)
    fits = {}
    for (norm, seed), done in history.items():
        if len(done) == config.epochs:
            records, losses = [epoch.record for epoch in done], [epoch.losses for epoch in done]
            program, last = program_of(config, dataset, norm), done[-1]
            results = (records, np.concatenate(losses), last.logits, last.state, program)
            fits[norm, seed] = Fit(norm, seed, counts[norm], *results)
    return fits


def program_of(config: Config, dataset: Any, norm: str, mesh: MeshShape = ONE) -> Program:
    """The program that trains a norm's nets; `dataset` is a `Dataset` or a `DatasetInfo`."""
    return Program(
        net_of(config, norm, len(dataset.class_names)),
        config.momentum,
        tuple(dataset.mean),
        tuple(dataset.deviation),
        mesh,
        config.nesterov,
        config.weight_decay > 0,
        config.augment != "none",
        config.label_smoothing,
        config.weight_average,
    )


def learning_rates(config: Config, epoch: int, steps: int) -> np.ndarray:  # f32[steps]
    """The learning rate of each step of an epoch (from 1), as a share of the highest: constant, or
    "one-cycle" up and down in straight lines (Smith and Topin, "Super-Convergence", 2018).
    """
    done = ((epoch - 1) * steps + np.arange(steps) + 0.5) / (config.epochs * steps)
    if config.schedule == "constant":
        done = np.full(steps, config.warmup)
    return np.interp(done, (0, config.warmup, 1), (0, 1, 0)).astype(np.float32)


def predict(program: Program, state: TrainState, images: Any) -> jax.Array:
    """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(
            f"predict takes images u8[N, 32, 32, 3], not {images.dtype}{list(images.shape)}"
        )
    program = dataclasses.replace(program, mesh=ONE)
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    return jax.nn.softmax(epochs.predict_logits(program, states, jnp.asarray(images))[0])


def check(config: Config, dataset: Dataset) -> dict[str, int]:
    """The parameters of each norm's net.

    Raises `UserError` for what can be known to fail before training starts.
    """
    if config.precision == "tf32" and jax.default_backend() != "gpu":
        raise UserError(
            "precision=tf32 needs an NVIDIA GPU, and there is none: choose float32 or bfloat16"
        )
    images = f"the {len(dataset.train_labels)} training images of {dataset.name}"
    count = len(dataset.train_labels) - config.validation
    if count <= 0:
        raise UserError(f"validation={config.validation} leaves none of {images} to train on")
    if config.batch_size > count:
        held = f", of which {config.validation} are held out" if config.validation else ""
        raise UserError(f"batch_size={config.batch_size} is larger than {images}{held}")
    return check_nets(config, len(dataset.class_names))


def mesh_for(configs: Sequence[Config], batch_size: int, mesh: MeshShape | None) -> MeshShape:
    """The mesh for the nets of that batch size: the given one, or one chosen for as many.

    Raises `UserError` where the given one is not possible.
    """
    custom = any(layers.is_custom(norm) for norm in configs[0].norms)
    if mesh is None:
        nets = sum(config.seeds for config in configs if config.batch_size == batch_size)
        return meshes.choose(nets, 1 if custom else batch_size)
    if custom and mesh.batch > 1:
        raise UserError(f"mesh={mesh} shares batches, which your own norm may not allow: batch=1")
    mesh.check(batch_size)
    return mesh


@dataclass(frozen=True)
class Group:
    """Nets that train in one program: of one norm and batch size.

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
    """The nets of a sweep, in the order in which they train: by batch size; then as many of a norm
    as train in one program together, run by run, and as many of each other norm before any more.
    Nets that are finished are left out.
    """
    for batch_size in dict.fromkeys(config.batch_size for config in configs):
        same = [(i, config) for i, config in enumerate(configs) if config.batch_size == batch_size]
        shape, norms = mesh_for(configs, batch_size, mesh), same[0][1].norms
        programs = [program_of(same[0][1], dataset, norm, shape) for norm in norms]
        at_once = min(epochs.nets_at_once(program, batch_size) for program in programs)
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
        self.program = program_of(self.config, dataset, group.norm, group.mesh)
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
        alone, states = dataclasses.replace(self.program, mesh=ONE), []
        for state, (_, _, seed), standard in zip(
            start, self.group.nets, self.standards, strict=False
        ):
            initial = jax.device_get(init_state(alone, seed)) if state is None else state
            states.append(initial._replace(standard=standard))
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
        return self.program, state, *data, keys, rates, self.decays, *bounds

    def train_chunk(
        self, state: TrainState, chunk: Chunk, of_epoch: tuple
    ) -> tuple[TrainState, Steps]:
        """Trains on one chunk of an epoch. `state` is consumed."""
        return epochs.train_nets(*self.arguments(state, chunk, of_epoch))

    def evaluate(self, state: TrainState) -> tuple[Evaluation, Evaluation | None]:
        """On the test images and, if any are, on the held-out ones; in NumPy's arrays."""
        test = epochs.evaluate_nets(self.program, state, self.test_images, self.test_labels)
        if not self.config.validation:
            return meshes.fetch(test), None
        data = (self.images, self.labels, self.held_out)
        return meshes.fetch((test, epochs.evaluate_nets(self.program, state, *data)))


def train(
    configs: Sequence[Config],
    dataset: Dataset,
    callback: Callback,
    mesh: MeshShape | None = None,
    progress: Mapping[SweptNet, NetProgress] | None = None,
    share: Callable[[Any], Any] = lambda arrays: arrays,
) -> Iterator[Trained]:
    """Trains the nets of a sweep to their last epoch, each from where it is; yields every epoch.

    A net whose loss is not finite is left out with a warning, and the others go on; where that
    leaves none, `NonFiniteLoss` is raised. `share` gives every process of a job the arrays of
    process 0.
    """
    progress, failed, total = progress or {}, [], sum(len(config.nets) for config in configs)
    finished = {net for net, done in progress.items() if done.epochs == configs[net[0]].epochs}
    for group in groups(configs, dataset, mesh, finished):
        at = {net: progress.get(net, NetProgress()) for net in group.nets}
        last_epoch, remaining = configs[group.nets[0][0]].epochs, list(group.nets)
        # Nets that were cut off between their lines are an epoch apart: those behind catch up.
        while remaining and (start := min(at[net].epochs for net in remaining)) < last_epoch:
            behind = tuple(net for net in remaining if at[net].epochs == start)
            stop = min({at[net].epochs for net in remaining} - {start}, default=last_epoch)
            nets = Nets(configs, dataset, dataclasses.replace(group, nets=behind))
            states = nets.states([_shared(nets, at[net].state, start, share) for net in behind])
            callback.on_start(group.norm, [seed for _, _, seed in behind], nets.steps)
            try:
                for epoch in range(start + 1, stop + 1):
                    states, done = _train_epoch(nets, states, epoch, callback, dataset)
                    for trained in done:
                        at[trained.net] = NetProgress(epoch, trained.state)
                        yield trained
            except NonFiniteLoss as error:
                failed.append(error)
                remaining.remove(error.net)
                config = configs[error.net[0]]
                if total > 1:
                    callback.on_warning(
                        f"batch size {config.batch_size}, learning rate "
                        f"{config.rate(group.norm):g}: {error}; the others go on without this net"
                    )
    if failed and len(failed) == total:
        raise failed[0]


def _shared(
    nets: Nets, state: TrainState | None, epoch: int, share: Callable[[Any], Any]
) -> TrainState | None:
    """Process 0's state of a net; None for the initial one, which every process makes."""
    if epoch == 0:
        return None
    if state is None:
        shapes = init_state.eval_shape(nets.program, 0)
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return share(jax.tree.map(np.asarray, state))


def _train_epoch(
    nets: Nets, state: TrainState, epoch: int, callback: Callback, dataset: Dataset
) -> tuple[TrainState, list[Trained]]:
    """One epoch of all nets and their evaluation."""
    clock, filled = time.perf_counter(), nets.group.filled
    losses, correct = np.zeros((len(filled), 0), np.float32), np.zeros(len(filled), int)
    chunks, of_epoch = nets.chunks(epoch)
    for chunk in chunks:
        state, steps = nets.train_chunk(state, chunk, of_epoch)
        done = meshes.fetch(steps)
        losses = np.concatenate([losses, done.losses[:, chunk.start : chunk.stop]], axis=1)
        correct += done.correct
        for i, step in np.argwhere(~np.isfinite(losses))[:1]:
            raise NonFiniteLoss(filled[i], epoch, int(step) + 1, float(losses[i, step]))
        callback.on_steps(epoch, losses.shape[1])
    trained = time.perf_counter()
    test, validation = nets.evaluate(state)
    tested = time.perf_counter()
    for evaluation in filter(None, (test, validation)):
        for i, *_ in np.argwhere(~np.isfinite(evaluation.logits))[:1]:
            raise NonFiniteLoss(filled[i], epoch, None, float(evaluation.loss[i]))
    share = len(nets.group.nets)
    seconds = round((trained - clock) / share, 3), round((tested - trained) / share, 3)
    whole, results = meshes.fetch(state), []
    for i, (run, norm, seed) in enumerate(nets.group.nets):
        held_out = ()
        if validation is not None:
            accuracy = _fraction(validation.accuracy[i], nets.config.validation)
            held_out = (float(validation.loss[i]), accuracy)
        train_loss = _mean_loss(losses[i], nets.count, nets.config.batch_size)
        accuracy = _fraction(test.accuracy[i], len(dataset.test_labels))
        numbers = (train_loss, int(correct[i]) / nets.count, float(test.loss[i]), accuracy)
        record = Epoch(norm, seed, epoch, *numbers, *seconds, *held_out)
        net_state = jax.tree.map(lambda leaf, i=i: leaf[i], whole)
        results.append(Trained(run, record, net_state, losses[i], np.asarray(test.logits[i])))
    return state, results


def _mean_loss(losses: np.ndarray, count: int, batch_size: int) -> float:
    """The mean over an epoch's images of the mean losses of its batches, the last one ragged."""
    sizes = np.full(len(losses), batch_size)
    sizes[-1] = count - batch_size * (len(losses) - 1)
    return float(np.average(losses.astype(np.float64), weights=sizes))


def _fraction(accuracy: Any, count: int) -> float:
    """An accuracy in float32 as the double nearest to the fraction that it is."""
    return round(float(accuracy) * count) / count
