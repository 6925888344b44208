"""Trains the norms of a configuration: in memory (`fit`), or into a run directory (`run`).

Knows nothing of flags and pictures. What happens is told to an `Observer`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxnorm import model as models
from jaxnorm import provenance, train
from jaxnorm.config import Config, Norm, UserError
from jaxnorm.data import Dataset, hold_out
from jaxnorm.model import CNN
from jaxnorm.records import Epoch, RunDirectory

PIECES = 20
"""Pieces in which an epoch is run, so that progress shows and a loss that is not finite is found
soon.
"""
Predict = Callable[[jax.Array | np.ndarray], jax.Array]


class NonFiniteLoss(ArithmeticError):
    """The loss turned NaN or infinite.

    Names the norm, the seed, the epoch (from 1) and the step in it (from 1).
    """

    def __init__(self, norm: str, seed: int, epoch: int, step: int, loss: float) -> None:
        super().__init__(
            f"the training loss of {norm} norm, seed {seed}, is {loss} at epoch {epoch}, step "
            f"{step}: try a smaller --learning-rate"
        )
        self.norm, self.seed, self.epoch, self.step = norm, seed, epoch, step


class Observer:
    """Hears what happens. Every method does nothing unless overridden."""

    def on_nets(self, norm: Norm, seeds: list[int], steps: int) -> None:
        """The nets of a norm and these seeds begin to train, together; `steps` is the number of
        batches in an epoch.
        """

    def on_steps(self, epoch: int, done: int) -> None:
        """So many batches of the epoch are done."""

    def on_epoch(self, epoch: Epoch) -> None:
        """A net's epoch is complete: trained, evaluated, and on disk where there is one."""


class Observers(Observer):
    """Tells several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_nets(self, norm: Norm, seeds: list[int], steps: int) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_nets(norm, seeds, steps)

    def on_steps(self, epoch: int, done: int) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_steps(epoch, done)

    def on_epoch(self, epoch: Epoch) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_epoch(epoch)


class _Trained(NamedTuple):
    record: Epoch
    state: train.TrainState
    losses: np.ndarray  # f32[steps], of this epoch
    logits: np.ndarray  # f32[M, classes], of the test set after it


@dataclass(frozen=True)
class Fit:
    """One trained net, in memory."""

    norm: Norm
    seed: int
    parameters: int
    epochs: list[Epoch]
    step_losses: np.ndarray  # f32[epochs * steps]
    logits: np.ndarray  # f32[M, classes], of the test set after the last epoch
    state: train.TrainState
    recipe: train.Recipe

    def predict(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
        return _predict(self.recipe, self.state)(images)


def make_recipe(
    config: Config, dataset_mean: tuple, dataset_deviation: tuple, num_classes: int, norm: Norm
) -> train.Recipe:
    """The recipe of one norm under a configuration."""
    net = CNN(norm, config.arch, num_classes, config.groups, config.dropout)
    return train.Recipe(
        net,
        config.learning_rate,
        config.momentum,
        tuple(dataset_mean),
        tuple(dataset_deviation),
        train.devices_for(config.batch),
    )


def check(config: Config, dataset: Dataset) -> dict[str, int]:
    """The parameters of each norm's net.

    Raises `UserError` for what can be known to fail before training starts.
    """
    count = len(dataset.train_labels)
    if config.validation >= count:
        raise UserError(
            f"--validation {config.validation} leaves none of the {count} training images of "
            f"{dataset.name} to train on"
        )
    if config.batch > count - config.validation:
        held = f", of which {config.validation} are held out" if config.validation else ""
        raise UserError(
            f"--batch-size {config.batch} is larger than the {count} training images of "
            f"{dataset.name}{held}"
        )
    return check_models(config, len(dataset.class_names))


def check_models(config: Config, num_classes: int) -> dict[str, int]:
    """The parameters of each norm's net.

    Raises `UserError` for groups that do not divide, and for more than 50,000 parameters.
    """
    counts = {}
    for norm in config.norms:
        counts[norm] = models.count_parameters(CNN(norm, config.arch, num_classes, config.groups))
        if counts[norm] > models.LARGEST and not config.allow_large:
            raise UserError(
                f"the {norm} net has {counts[norm]:,} parameters, more than {models.LARGEST:,}: "
                "add --allow-large to train it all the same"
            )
    return counts


def groups(config: Config, dataset: Dataset) -> Iterator[tuple[Norm, list[int]]]:
    """The norms and seeds in the order in which they train: the seeds that train in one program
    together, and all norms of these before the next seeds.
    """
    device_seeds = min(
        train.seeds_at_once(_recipe(config, dataset, norm), config.batch) for norm in config.norms
    )
    count = -(-config.seeds // device_seeds)
    for part in np.array_split(np.array(config.seed_numbers), count):
        for norm in config.norms:
            yield norm, part.tolist()


def _recipe(config: Config, dataset: Dataset, norm: Norm) -> train.Recipe:
    return make_recipe(config, dataset.mean, dataset.deviation, len(dataset.class_names), norm)


def _train(
    config: Config, dataset: Dataset, norm: Norm, seeds: list[int], observer: Observer
) -> Iterator[list[_Trained]]:
    """Trains one net for each seed, epoch by epoch; several seeds in one program."""
    recipe = _recipe(config, dataset, norm)
    images, labels, test_images, test_labels = train.replicate(
        recipe,
        (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels),
    )
    splits = [hold_out(dataset.train_labels, config.validation, seed) for seed in seeds]
    count = len(dataset.train_labels) - config.validation
    several = len(seeds) > 1
    train_steps = train.train_seeds if several else train.train_steps
    evaluate = train.evaluate_seeds if several else train.evaluate
    stack = train.stack_seeds
    held = stack([train.replicate(recipe, rows) for _, rows in splits])
    state = stack([train.replicate(recipe, train.init_state(recipe, seed)) for seed in seeds])
    observer.on_nets(norm, seeds, -(-count // config.batch))
    for epoch in range(1, config.epochs + 1):
        clock = time.perf_counter()
        losses = np.zeros((len(seeds), 0), np.float32)
        correct = np.zeros(len(seeds), int)
        dropout_key = stack([train.derive_key(seed, "dropout", epoch) for seed in seeds])
        cut = [
            train.epoch_pieces(seed, epoch, jnp.asarray(rows), config.batch, PIECES)
            for seed, (rows, _) in zip(seeds, splits, strict=True)
        ]
        for pieces in zip(*cut, strict=True):
            batches = stack([piece.batches for piece in pieces])
            _, first, start, stop = pieces[0]
            state, steps = train_steps(
                recipe, state, images, labels, batches, dropout_key, first, start, stop
            )
            new = np.reshape(steps.losses, (len(seeds), -1))[:, start:stop]
            losses = np.concatenate([losses, new], axis=1)
            correct += np.reshape(steps.correct, len(seeds))
            if not np.isfinite(new).all():
                which, step = np.argwhere(~np.isfinite(losses))[0]
                loss = float(losses[which, step])
                raise NonFiniteLoss(norm, seeds[which], epoch, int(step) + 1, loss)
            observer.on_steps(epoch, losses.shape[1])
        trained = time.perf_counter()
        test = evaluate(recipe, state, test_images, test_labels)
        validation = (
            evaluate(recipe, state, images[held], labels[held]) if config.validation else None
        )
        tests = train.unstack_seeds(jax.device_get(test), len(seeds))
        validations = train.unstack_seeds(jax.device_get(validation), len(seeds))
        tested = time.perf_counter()
        states = train.unstack_seeds(state, len(seeds))
        seconds = (trained - clock) / len(seeds), (tested - trained) / len(seeds)
        yield [
            _Trained(
                Epoch(
                    norm,
                    seed,
                    epoch,
                    _mean_loss(losses[i], count, config.batch),
                    int(correct[i]) / count,
                    float(tests[i].loss),
                    _fraction(tests[i].accuracy, len(test_labels)),
                    *(round(each, 3) for each in seconds),
                    **_validated(validations[i], config.validation),
                ),
                states[i],
                losses[i],
                tests[i].logits,
            )
            for i, seed in enumerate(seeds)
        ]


def _mean_loss(losses: np.ndarray, count: int, batch_size: int) -> float:
    """The mean over an epoch's images of the mean losses of its batches, the last one ragged."""
    sizes = np.full(len(losses), batch_size)
    sizes[-1] = count - batch_size * (len(losses) - 1)
    return float(np.average(losses.astype(np.float64), weights=sizes))


def _validated(validation: train.Evaluation | None, count: int) -> dict[str, float]:
    """What an epoch's record says of the validation, if there is one."""
    if validation is None:
        return {}
    accuracy = _fraction(validation.accuracy, count)
    return {"validation_loss": float(validation.loss), "validation_accuracy": accuracy}


def _fraction(accuracy: jax.Array, count: int) -> float:
    """An accuracy in float32 as the double nearest to the fraction that it is."""
    return round(float(accuracy) * count) / count


def fit(
    config: Config, dataset: Dataset, observer: Observer | None = None
) -> dict[tuple[Norm, int], Fit]:
    """Trains every net of `config` on `dataset` without touching the disk.

    Returns a net for each (norm, seed). Raises `UserError` and `NonFiniteLoss`.
    """
    observer = observer or Observer()
    counts, results = check(config, dataset), {}
    for norm, seeds in groups(config, dataset):
        epochs: dict[int, list[Epoch]] = {seed: [] for seed in seeds}
        losses: dict[int, list[np.ndarray]] = {seed: [] for seed in seeds}
        nets: list[_Trained] = []
        for nets in _train(config, dataset, norm, seeds, observer):
            for net in nets:
                epochs[net.record.seed].append(net.record)
                losses[net.record.seed].append(net.losses)
                observer.on_epoch(net.record)
        recipe = _recipe(config, dataset, norm)
        for seed, net in zip(seeds, nets, strict=True):
            results[norm, seed] = Fit(
                norm,
                seed,
                counts[norm],
                epochs[seed],
                np.concatenate(losses[seed]),
                net.logits,
                net.state,
                recipe,
            )
    return {net: results[net] for net in config.nets}


def run(
    config: Config,
    dataset: Dataset,
    directory: RunDirectory,
    command: str,
    observer: Observer | None = None,
) -> None:
    """Trains every net of `config` on `dataset` into a run directory.

    After each epoch the checkpoint, the losses and the predictions are written, and then the
    epoch's line. Raises `UserError`, `NonFiniteLoss` and OSError.
    """
    observer = observer or Observer()
    directory.write_info(provenance.describe(config, dataset, check(config, dataset), command))
    for norm, seeds in groups(config, dataset):
        losses = {seed: np.zeros(0, np.float32) for seed in seeds}
        with contextlib.ExitStack() as stack:
            checkpoints = {
                seed: stack.enter_context(_checkpointer(directory, norm, seed)) for seed in seeds
            }
            for nets in _train(config, dataset, norm, seeds, observer):
                for net in nets:
                    seed = net.record.seed
                    losses[seed] = np.concatenate([losses[seed], net.losses])
                    checkpoints[seed].save(
                        net.record.epoch,
                        args=ocp.args.StandardSave(jax.device_get(net.state)._asdict()),
                    )  # pyright: ignore[reportCallIssue]
                    directory.write_step_losses(norm, seed, losses[seed])
                    directory.write_predictions(norm, seed, net.logits, dataset.test_labels)
                    directory.append_epoch(net.record)
                    observer.on_epoch(net.record)


def load_state(path: Path | str, norm: Norm, seed: int) -> tuple[train.Recipe, train.TrainState]:
    """The recipe and the newest checkpoint of a net of a run.

    Raises `UserError` where the run has no checkpoint of that norm and seed.
    """
    directory = RunDirectory(path)
    info = directory.info()
    if norm not in info.config.norms or not directory.checkpoints(norm, seed).is_dir():
        raise UserError(f"{path} has no checkpoint of {norm} norm, seed {seed}")
    data = info.dataset
    recipe = make_recipe(
        info.config, data["mean"], data["deviation"], len(data["class_names"]), norm
    )
    shapes = train.init_state.eval_shape(recipe, seed)
    with _checkpointer(directory, norm, seed) as checkpoints:
        newest = checkpoints.latest_step()
        if newest is None:
            raise UserError(f"{path} has no complete epoch of {norm} norm, seed {seed}")
        stored = checkpoints.restore(newest, args=ocp.args.StandardRestore(shapes._asdict()))  # pyright: ignore[reportCallIssue]
    return recipe, train.TrainState(**train.replicate(recipe, stored))


def load_model(path: Path | str, norm: Norm, seed: int) -> Predict:
    """The trained net of a run: a pure `predict(images u8[N, 32, 32, 3]) -> probabilities f32[N,
    classes]`.

    Raises `UserError` where the run has no checkpoint of that norm and seed.
    """
    return _predict(*load_state(path, norm, seed))


def _predict(recipe: train.Recipe, state: train.TrainState) -> Predict:
    def predict(images: jax.Array | np.ndarray) -> jax.Array:
        """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
            raise ValueError(
                f"predict takes images u8[N, 32, 32, 3], not {images.dtype}{list(images.shape)}"
            )
        logits = train.predict_logits(recipe, state.params, state.batch_stats, jnp.asarray(images))
        return jax.nn.softmax(logits)

    return predict


def _checkpointer(directory: RunDirectory, norm: str, seed: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory.checkpoints(norm, seed).absolute(), options=options)
