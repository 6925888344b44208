"""Trains the norms of a configuration: in memory (`fit`), or into a run directory (`run`), and goes
on with a run that was cut off (`resume`).

Knows nothing of flags and pictures. What happens is told to an `Observer`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import checkpoints, interrupts, progress, provenance, selfcheck, train
from jaxnorm import model as models
from jaxnorm.config import Config, Norm, UserError
from jaxnorm.data import Dataset, hold_out
from jaxnorm.model import CNN
from jaxnorm.progress import NOTHING, Begun
from jaxnorm.records import RESUMED_FIELDS, Epoch, Net, RunDirectory

PIECES = 20
"""Pieces in which an epoch is run, so that progress shows and a loss that is not finite is found
soon.
"""
Predict = Callable[[jax.Array | np.ndarray], jax.Array]


class NonFiniteLoss(ArithmeticError):
    """The loss turned NaN or infinite.

    Names the norm, the seed, the epoch (from 1) and the step in it (from 1); the step is None where
    it is the loss of the evaluation after the epoch.
    """

    def __init__(self, norm: str, seed: int, epoch: int, step: int | None, loss: float) -> None:
        which, where = ("evaluation", "") if step is None else ("training", f", step {step}")
        super().__init__(
            f"the {which} loss of {norm} norm, seed {seed}, is {loss} at epoch {epoch}{where}: try "
            "a smaller --learning-rate; the epochs before it, and the last good checkpoint, are "
            "kept"
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

    def on_begun(self, complete: int) -> None:
        """A run is gone on with, of which so many epochs of all nets are complete."""

    def on_warning(self, text: str) -> None:
        """Something was found damaged, and is made again."""


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

    def on_begun(self, complete: int) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_begun(complete)

    def on_warning(self, text: str) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_warning(text)


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


def self_check(config: Config, dataset: Dataset) -> None:
    """Checks, before anything is trained, that this installation computes the nets of `config`
    rightly (see `selfcheck`), by the programs that will train them.

    Raises `selfcheck.WrongNumbers`.
    """
    selfcheck.check_compiler()
    checked = set()
    for norm, seeds in groups(config, dataset):
        if norm not in checked:
            checked.add(norm)
            _check_step(config, dataset, norm, seeds)


def _check_step(config: Config, dataset: Dataset, norm: Norm, seeds: list[int]) -> None:
    recipe = _recipe(config, dataset, norm)
    train_steps = train.train_seeds if len(seeds) > 1 else train.train_steps
    images, labels = train.replicate(recipe, (dataset.train_images, dataset.train_labels))
    rows, _ = hold_out(dataset.train_labels, config.validation, seeds[0])
    first = train.epoch_pieces(seeds[0], 1, jnp.asarray(rows), config.batch)[0]
    keys = [train.derive_key(seed, "dropout", 1) for seed in seeds]
    initial = train.init_state(recipe, seeds[0])
    stack = train.stack_seeds

    def step(i: int) -> selfcheck.Step:
        """One step of the training program, in which every seed trains as the first does."""
        state = stack([train.replicate(recipe, jax.tree.map(jnp.copy, initial)) for _ in seeds])
        batches = stack([first.batches] * len(seeds))
        state, steps = train_steps(
            recipe, state, images, labels, batches, stack([keys[0]] * len(seeds)), 0, i, i + 1
        )
        state = train.unstack_seeds(state, len(seeds))[0]
        return selfcheck.Step(np.reshape(steps.losses, (len(seeds), -1))[0, i], state)

    selfcheck.check_step(
        recipe,
        jax.device_get(initial),
        dataset.train_images,
        dataset.train_labels,
        np.asarray(first.batches),
        keys[0],
        step,
    )


def _recipe(config: Config, dataset: Dataset, norm: Norm) -> train.Recipe:
    return make_recipe(config, dataset.mean, dataset.deviation, len(dataset.class_names), norm)


def _train(
    config: Config,
    dataset: Dataset,
    norm: Norm,
    seeds: list[int],
    observer: Observer,
    states: Sequence[train.TrainState] | None = None,
    complete: int = 0,
) -> Iterator[list[_Trained]]:
    """Trains one net for each seed, epoch by epoch; several seeds in one program. With `states`,
    from these, after so many complete epochs.
    """
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
    states = states or [train.init_state(recipe, seed) for seed in seeds]
    state = stack([train.replicate(recipe, each) for each in states])
    observer.on_nets(norm, seeds, -(-count // config.batch))
    for epoch in range(complete + 1, config.epochs + 1):
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
            interrupts.check()
            observer.on_steps(epoch, losses.shape[1])
        trained = time.perf_counter()
        test = evaluate(recipe, state, test_images, test_labels)
        validation = (
            evaluate(recipe, state, images[held], labels[held]) if config.validation else None
        )
        tests = train.unstack_seeds(jax.device_get(test), len(seeds))
        validations = train.unstack_seeds(jax.device_get(validation), len(seeds))
        tested = time.perf_counter()
        for seed, evaluations in zip(seeds, zip(tests, validations, strict=True), strict=True):
            for each in evaluations:
                if each is not None and not np.isfinite(each.logits).all():
                    raise NonFiniteLoss(norm, seed, epoch, None, float(each.loss))
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
    **about: Any,
) -> None:
    """Trains every net of `config` on `dataset` into a run directory.

    After each epoch the checkpoint, the losses and the predictions are written, and then the
    epoch's line, which makes it complete. `about` is what else `run.json` says (`self_check`,
    `deterministic`). Raises `UserError`, `NonFiniteLoss` and OSError.
    """
    counts = check(config, dataset)
    with directory.locked():
        RunDirectory.check_unused(directory.path)
        directory.write_info(provenance.describe(config, dataset, counts, command, **about))
        _train_into(directory, config, dataset, observer or Observer(), {})


def resume(
    dataset: Dataset,
    directory: RunDirectory,
    command: str,
    observer: Observer | None = None,
    self_check: str = "not made",
) -> None:
    """Goes on with a run from the newest complete epoch of each net, to its end.

    A damaged checkpoint is told to the observer, and the one before it used. On a CPU what comes
    out equals an unbroken run bit for bit, but for the times. Raises `UserError` where the
    directory is no run, another process writes to it, or the data is not what it was trained on.
    """
    observer = observer or Observer()
    with directory.locked():
        info = directory.info()
        if dataset.fingerprint != info.dataset["fingerprint"]:
            raise UserError(
                f"the data found is not what {directory.path} was trained on: give its --data-dir"
            )
        counts = check(info.config, dataset)
        directory.sweep()
        begun = progress.rewind(
            directory,
            {norm: _recipe(info.config, dataset, norm) for norm in info.config.norms},
            list(groups(info.config, dataset)),
            len(dataset.train_labels),
            observer.on_warning,
        )
        complete = sum(each.epochs for each in begun.values())
        observer.on_begun(complete)
        if complete == info.config.epochs * len(info.config.nets):
            return
        now = provenance.describe(info.config, dataset, counts, command, self_check)
        again = {name: getattr(now, name) for name in RESUMED_FIELDS}
        if now.code != info.code or now.device != info.device:
            observer.on_warning(
                "the run was begun by other code or on another device (compare its run.json): it "
                "goes on, but not bit for bit as it would have there"
            )
        directory.write_info(dataclasses.replace(info, resumed=[*info.resumed, again]))
        _train_into(directory, info.config, dataset, observer, begun)


def _train_into(
    directory: RunDirectory,
    config: Config,
    dataset: Dataset,
    observer: Observer,
    begun: dict[Net, Begun],
) -> None:
    """Trains what is not trained yet, and writes it down."""
    for norm, seeds in groups(config, dataset):
        # Seeds that train in one program and were cut off between their lines are an epoch apart.
        far = {seed: begun.get((norm, seed), NOTHING).epochs for seed in seeds}
        for complete in sorted({*far.values()} - {config.epochs}):
            own = [seed for seed in seeds if far[seed] == complete]
            _train_group(directory, config, dataset, norm, own, complete, observer, begun)
    progress.put_in_order(directory, list(groups(config, dataset)))


def _train_group(
    directory: RunDirectory,
    config: Config,
    dataset: Dataset,
    norm: Norm,
    seeds: list[int],
    complete: int,
    observer: Observer,
    begun: dict[Net, Begun],
) -> None:
    """Trains the nets of some seeds, of which so many epochs are complete, to the end."""
    befores = [begun.get((norm, seed), NOTHING) for seed in seeds]
    losses = {seed: before.losses for seed, before in zip(seeds, befores, strict=True)}
    states = [before.state for before in befores if before.state is not None]
    with contextlib.ExitStack() as stack:
        stored = {
            seed: stack.enter_context(checkpoints.writer(directory.checkpoints(norm, seed)))
            for seed in seeds
        }
        for nets in _train(config, dataset, norm, seeds, observer, states, complete):
            with interrupts.uninterrupted():
                for net in nets:
                    seed = net.record.seed
                    losses[seed] = np.concatenate([losses[seed], net.losses])
                    stored[seed].save(net.record.epoch, net.state._asdict())
                    directory.write_step_losses(norm, seed, losses[seed])
                    directory.write_predictions(norm, seed, net.logits, dataset.test_labels)
                    directory.append_epoch(net.record)
                    observer.on_epoch(net.record)


def load_state(path: Path | str, norm: Norm, seed: int) -> tuple[train.Recipe, train.TrainState]:
    """The recipe and the newest complete epoch's checkpoint of a net of a run.

    Raises `UserError` where the run has no checkpoint of that norm and seed, or a damaged one.
    """
    directory = RunDirectory(path)
    info = directory.info()
    if norm not in info.config.norms or not directory.checkpoints(norm, seed).is_dir():
        raise UserError(f"{path} has no checkpoint of {norm} norm, seed {seed}")
    data = info.dataset
    recipe = make_recipe(
        info.config, data["mean"], data["deviation"], len(data["class_names"]), norm
    )
    shapes = train.init_state.eval_shape(recipe, seed)._asdict()
    complete = sum((each.norm, each.seed) == (norm, seed) for each in directory.epochs())
    stored = directory.checkpoints(norm, seed)
    if complete not in checkpoints.epochs(stored):
        raise UserError(f"{path} has no complete epoch of {norm} norm, seed {seed}")
    try:
        state = checkpoints.restore(stored, complete, shapes)
    except checkpoints.Damaged as error:
        raise UserError(f"{error}: python -m jaxnorm.run --resume {path} mends it") from None
    return recipe, train.TrainState(**train.replicate(recipe, state))


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
