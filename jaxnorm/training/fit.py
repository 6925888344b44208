"""Trains the nets of runs epoch by epoch, in memory: `fit` keeps them, `runs.runner` writes them
down. Both take what `train` yields.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.config import (
    Config,
    NetId,
    Setting,
    SweptNet,
    UserError,
    counted,
    named,
    names_a_file,
)
from jaxnorm.data.datasets import Dataset
from jaxnorm.model import arithmetic
from jaxnorm.records import Epoch
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.experiment import Experiment, Group
from jaxnorm.training.mesh import ONE, MeshShape
from jaxnorm.training.step import Program, TrainState


class NonFiniteLoss(ArithmeticError):
    """The loss of a net turned NaN or infinite, at an epoch (from 1) and a step in it (from 1); the
    step is None if it is the loss of the evaluation after the epoch.
    """

    def __init__(self, net: SweptNet, epoch: int, step: int | None, loss: float) -> None:
        phase, where = ("evaluation", "") if step is None else ("training", f", step {step}")
        super().__init__(
            f"the {phase} loss of {named(net.norm)}, seed {net.seed}, is {loss} at epoch {epoch}"
            f"{where}: try a smaller learning rate; the epochs before it are kept"
        )
        self.net, self.epoch, self.step = net, epoch, step


class Callback:
    """A listener to what happens while nets train. Its methods do nothing unless overridden."""

    def on_start(self, norm: str, seeds: list[int], steps: int) -> None:
        """The nets of a norm and these seeds start to train together; `steps` is the number of
        batches in an epoch. In a sweep a seed may be there for several learning rates.
        """

    def on_steps(self, epoch: int, done: int) -> None:
        """This many batches of the epoch are done. May raise, to stop training."""

    def on_measuring(self, done: int, total: int) -> None:
        """This many of the measurements inside a net after its last epoch are done. May raise."""

    def on_epoch(self, config: Config, epoch: Epoch) -> None:
        """A net of this run has finished an epoch, which is on disk if the run is."""

    def on_resume(self, complete: int) -> None:
        """A run resumes; this many epochs of all nets are complete."""

    def on_warning(self, text: str) -> None:
        """Something is damaged and set aside, or a net is left out."""


class Trained(NamedTuple):
    """The result of an epoch of one net, in NumPy's arrays."""

    run: int
    record: Epoch
    state: TrainState
    losses: np.ndarray  # f32[steps], of this epoch
    logits: np.ndarray  # f32[M, classes], of the test set after it

    @property
    def net(self) -> SweptNet:
        """The net that was trained."""
        return SweptNet(self.run, self.record.norm, self.record.seed)


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
            f"Fit({named(self.norm)}, seed {self.seed}: test accuracy {last.test_accuracy:.2%} "
            f"after {counted(last.epoch, 'epoch')})"
        )

    def predict(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Returns probabilities f32[N, classes] of images u8[N, 32, 32, 3]; raises ValueError for
        any other.
        """
        return predict(self.program, self.state, images)


def check_dataset(config: Config, dataset: Dataset) -> None:
    """Raises `UserError` if a dataset is not the one that the settings name, or none."""
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"dataset is a {type(dataset).__name__}: give what jaxnorm.load returns, or nothing"
        )
    named = Path(config.dataset).name if names_a_file(config.dataset) else config.dataset
    if (named, config.test_split) != (dataset.name, dataset.test_split):
        raise UserError(
            Setting("dataset", config.dataset),
            " with ",
            Setting("test_split", config.test_split),
            f" is not what is given, {dataset}",
        )
    dataset.check()


@arithmetic.standard()
def fit(
    config: Config,
    dataset: Dataset,
    callbacks: Sequence[Callback] = (),
    mesh: MeshShape | None = None,
) -> dict[NetId, Fit]:
    """Trains every net of `config` on `dataset` without touching the disk.

    Returns a `Fit` for each (norm, seed) whose loss stayed finite. Raises `UserError`, also for a
    dataset that is not the one of `config`, and `NonFiniteLoss` if no net's did.
    """
    check_dataset(config, dataset)
    experiment, failed = Experiment([config], dataset, mesh), []
    history: dict[NetId, list[Trained]] = {net: [] for net in config.nets}
    warn_of_untuned(config, callbacks)
    for group in experiment.groups():
        for trained in train(group, [None] * len(group.nets), callbacks):
            if isinstance(trained, NonFiniteLoss):
                failed.append(trained)
                warn_of_lost(trained, config, callbacks)
                continue
            history[trained.record.net].append(trained)
            for callback in callbacks:
                callback.on_epoch(config, trained.record)
    if len(failed) == len(history):
        raise failed[0]
    whole = {net: done for net, done in history.items() if len(done) == config.epochs}
    return {net: _fit_of(done, experiment) for net, done in whole.items()}


def _fit_of(done: Sequence[Trained], experiment: Experiment) -> Fit:
    norm, seed = done[-1].record.net
    return Fit(
        norm=norm,
        seed=seed,
        parameters=experiment.parameters[0][norm],
        epochs=[epoch.record for epoch in done],
        step_losses=np.concatenate([epoch.losses for epoch in done]),
        logits=done[-1].logits,
        state=done[-1].state,
        program=experiment.program(experiment.configs[0], norm),
    )


@arithmetic.standard()
def predict(program: Program, state: TrainState, images: Any) -> jax.Array:
    """Returns probabilities f32[N, classes] of u8[N, 32, 32, 3] images; raises ValueError for any
    other.
    """
    images = images if hasattr(images, "dtype") else np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(
            f"predict takes images u8[N, 32, 32, 3], not {images.dtype}{list(images.shape)}"
        )
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    return jax.nn.softmax(epochs.predict_logits(program, ONE, states, jnp.asarray(images))[0])


def train(
    group: Group, states: Sequence[TrainState | None], callbacks: Sequence[Callback]
) -> Iterator[Trained | NonFiniteLoss]:
    """Trains the nets of a group to their last epoch, from these states (None: the
    initial one); yields each epoch of each net.

    If the loss of a net is not finite, the error is yielded, and the others go on without the net.
    """
    at, last = dict(zip(group.nets, states, strict=True)), group.config.epochs
    while group.nets:
        stacked = group.states([at[net] for net in group.nets])
        for callback in callbacks:
            callback.on_start(group.norm, [net.seed for net in group.nets], group.steps)
        try:
            for epoch in range(group.start + 1, last + 1):
                stacked, done = _train_epoch(group, stacked, epoch, callbacks)
                for trained in done:
                    at[trained.net] = trained.state
                    yield trained
            return
        except NonFiniteLoss as error:
            others = [net for net in group.nets if net != error.net]
            group = group.of(others, start=error.epoch - 1)
            yield error


def warn_of_untuned(config: Config, callbacks: Sequence[Callback]) -> None:
    """Warns if norms train at a learning rate that was not tuned, beside others whose was."""
    if config.untuned:
        norms, usual = config.untuned, {"arch": "residual", "optimizer": Config.optimizer}
        differ = [name for name, value in usual.items() if getattr(config, name) != value]
        tuned = "" if differ else " as those of other norms were"
        flag = "".join(f" --{name} {getattr(config, name)}" for name in differ)
        text = (
            f"the {config.recipe} recipe has no {config.optimizer} learning rate for "
            f"{' and '.join(norms)} norm: {config.rate(norms[0]):g} is taken, which was not tuned"
            f"{tuned}; python -m jaxnorm.tune --recipe {config.recipe}{flag} --norm "
            f"{','.join(norms)} finds a good one"
        )
        for callback in callbacks:
            callback.on_warning(text)


def warn_of_lost(error: NonFiniteLoss, config: Config, callbacks: Sequence[Callback]) -> None:
    """Warns that a net is left out because its loss is not finite."""
    for callback in callbacks:
        callback.on_warning(
            f"batch size {config.batch_size}, learning rate {config.rate(error.net.norm):g}: "
            f"{error}; the others go on without this net"
        )


def _train_epoch(
    group: Group, state: TrainState, epoch: int, callbacks: Sequence[Callback]
) -> tuple[TrainState, list[Trained]]:
    """Trains and evaluates all nets of a group for one epoch."""
    clock, filled = time.perf_counter(), group.filled
    losses, correct = np.zeros((len(filled), 0), np.float32), np.zeros(len(filled), int)
    chunks, of_epoch = group.chunks(epoch)
    for chunk in chunks:
        state, steps = group.train_chunk(state, chunk, of_epoch)
        done = meshes.fetch(steps)
        losses = np.concatenate([losses, done.losses[:, chunk.start : chunk.stop]], axis=1)
        correct += done.correct
        for i, step in np.argwhere(~np.isfinite(losses))[:1]:
            raise NonFiniteLoss(filled[i], epoch, int(step) + 1, float(losses[i, step]))
        for callback in callbacks:
            callback.on_steps(epoch, losses.shape[1])
    trained = time.perf_counter()
    test, validation = group.evaluate(state)
    tested = time.perf_counter()
    for evaluation in filter(None, (test, validation)):
        finite = np.isfinite(evaluation.logits).all((1, 2)) & np.isfinite(evaluation.loss)
        for i in np.flatnonzero(~finite)[:1]:
            raise NonFiniteLoss(filled[i], epoch, None, float(evaluation.loss[i]))
    share, config = len(group.nets), group.config
    whole, results = meshes.fetch(state), []
    for i, net in enumerate(group.nets):
        record = Epoch(
            norm=net.norm,
            seed=net.seed,
            epoch=epoch,
            train_loss=_mean_loss(losses[i], group.train_count, config.batch_size),
            train_accuracy=int(correct[i]) / group.train_count,
            test_loss=float(test.loss[i]),
            test_accuracy=_fraction(test.accuracy[i], test.logits.shape[1]),
            train_seconds=round((trained - clock) / share, 3),
            test_seconds=round((tested - trained) / share, 3),
            validation_loss=float(validation.loss[i]) if validation else None,
            validation_accuracy=(
                _fraction(validation.accuracy[i], config.validation) if validation else None
            ),
        )
        net_state = jax.tree.map(lambda leaf, i=i: leaf[i], whole)
        results.append(Trained(net.run, record, net_state, losses[i], np.asarray(test.logits[i])))
    return state, results


def _mean_loss(losses: np.ndarray, count: int, batch_size: int) -> float:
    """Returns the mean loss of an epoch's images from those of its batches, the last one ragged."""
    sizes = np.full(len(losses), batch_size)
    sizes[-1] = count - batch_size * (len(losses) - 1)
    return float(np.average(losses.astype(np.float64), weights=sizes))


def _fraction(accuracy: Any, count: int) -> float:
    """Returns an accuracy in float32 as the double nearest to the fraction that it is."""
    return round(float(accuracy) * count) / count
