"""Trains the nets of runs epoch by epoch, in memory: `fit` keeps them, `runs.runner` writes them
down. Both take what `train` yields.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.config import RECIPES, Config, Net, UserError, counted, names_a_file
from jaxnorm.data.datasets import Dataset
from jaxnorm.model import arithmetic
from jaxnorm.model.summary import check_nets
from jaxnorm.storage.schema import Epoch
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.groups import Nets, SweptNet, groups, program_of
from jaxnorm.training.mesh import ONE, MeshShape
from jaxnorm.training.step import Program, TrainState, init_state


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

    def on_measuring(self, done: int, total: int) -> None:
        """So many of the measurements inside a net after its last epoch are done. May raise."""

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


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        last = self.epochs[-1]
        return (
            f"Fit({self.norm} norm, seed {self.seed}: test accuracy {last.test_accuracy:.2%} after "
            f"{counted(last.epoch, 'epoch')})"
        )

    def predict(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
        return predict(self.program, self.state, images)


@arithmetic.standard()
def fit(
    config: Config,
    dataset: Dataset,
    callback: Callback | None = None,
    mesh: MeshShape | None = None,
) -> dict[Net, Fit]:
    """Trains every net of `config` on `dataset` without touching the disk.

    Returns a `Fit` for each (norm, seed) whose loss stayed finite. Raises `UserError`, also for a
    dataset that is not the one of `config`, and `NonFiniteLoss` where no net's did.
    """
    named = Path(config.dataset).name if names_a_file(config.dataset) else config.dataset
    if (named, config.test_split) != (dataset.name, dataset.test_split):
        raise UserError(
            f"dataset={config.dataset} with test_split={config.test_split} is not what fit is "
            f"given, {dataset}"
        )
    counts, callback = check(config, dataset), callback or Callback()
    history: dict[Net, list[Trained]] = {net: [] for net in config.nets}
    for trained in train([config], dataset, callback, mesh):
        history[trained.net[1:]].append(trained)
        callback.on_epoch(config, trained.record)
    fits = {}
    for (norm, seed), done in history.items():
        if len(done) == config.epochs:
            records, losses = [epoch.record for epoch in done], [epoch.losses for epoch in done]
            program, last = program_of(config, norm, len(dataset.class_names)), done[-1]
            results = (records, np.concatenate(losses), last.logits, last.state, program)
            fits[norm, seed] = Fit(norm, seed, counts[norm], *results)
    return fits


@arithmetic.standard()
def predict(program: Program, state: TrainState, images: Any) -> jax.Array:
    """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
    images = images if hasattr(images, "dtype") else np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(
            f"predict takes images u8[N, 32, 32, 3], not {images.dtype}{list(images.shape)}"
        )
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    return jax.nn.softmax(epochs.predict_logits(program, ONE, states, jnp.asarray(images))[0])


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
    if (untuned := configs[0].untuned) and len(finished) < total:
        callback.on_warning(_untuned_text(configs[0], untuned))
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


def _untuned_text(config: Config, norms: Sequence[str]) -> str:
    """Says at what learning rate these norms train, beside others whose rates were tuned."""
    return (
        f"the {config.recipe} recipe has no learning rate for {' and '.join(norms)} norm: "
        f"{config.rate(norms[0]):g} is taken, which was not tuned as those of "
        f"{', '.join(RECIPES[config.recipe]['learning_rate'])} were; python -m jaxnorm.tune "
        f"--recipe {config.recipe} --norm {','.join(norms)} finds a good one"
    )


def _shared(
    nets: Nets, state: TrainState | None, epoch: int, share: Callable[[Any], Any]
) -> TrainState | None:
    """Process 0's state of a net; None for the initial one, which every process makes."""
    if epoch == 0:
        return None
    if state is None:
        shapes = init_state.eval_shape(nets.program, 0, nets.standards[0])
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
