"""Trains the norms of a configuration: in memory (`fit`), or into a run directory (`run`).

Knows nothing of flags and pictures. What happens is told to an `Observer`.
"""

import datetime
import importlib.metadata
import platform
import subprocess
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
from jaxnorm import train
from jaxnorm.config import Config, Norm, UserError
from jaxnorm.data import Dataset
from jaxnorm.model import CNN
from jaxnorm.records import Epoch, RunDirectory, RunInfo

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

    def on_norm(self, norm: Norm, seed: int, steps: int) -> None:
        """A net begins to train; `steps` is the number of batches in an epoch."""

    def on_steps(self, epoch: int, done: int) -> None:
        """So many batches of the epoch are done."""

    def on_epoch(self, epoch: Epoch) -> None:
        """An epoch is complete: trained, evaluated, and on disk where there is one."""


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
    predict: Predict


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
    if config.batch > len(dataset.train_labels):
        raise UserError(
            f"--batch-size {config.batch} is larger than the {len(dataset.train_labels)} training "
            f"images of {dataset.name}"
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


def _train(config: Config, dataset: Dataset, norm: Norm, observer: Observer) -> Iterator[_Trained]:
    """Trains one net, epoch by epoch."""
    recipe = make_recipe(config, dataset.mean, dataset.deviation, len(dataset.class_names), norm)
    train_images, train_labels, test_images, test_labels = train.replicate(
        recipe,
        (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels),
    )
    count, seed = len(dataset.train_labels), config.seed
    state = train.replicate(recipe, train.init_state(recipe, seed))
    observer.on_norm(norm, seed, -(-count // config.batch))
    for epoch in range(1, config.epochs + 1):
        clock = time.perf_counter()
        losses, correct = [], 0
        dropout_key = train.derive_key(seed, "dropout", epoch)
        for piece in train.epoch_pieces(seed, epoch, count, config.batch, PIECES):
            state, steps = train.train_steps(
                recipe, state, train_images, train_labels, piece.batches, dropout_key, *piece[1:]
            )
            losses.extend(np.asarray(steps.losses)[piece.start : piece.stop].tolist())
            correct += int(steps.correct)
            if not np.isfinite(losses).all():
                step = int(np.flatnonzero(~np.isfinite(losses))[0])
                raise NonFiniteLoss(norm, seed, epoch, step + 1, losses[step])
            observer.on_steps(epoch, len(losses))
        trained = time.perf_counter()
        test = jax.block_until_ready(train.evaluate(recipe, state, test_images, test_labels))
        tested = time.perf_counter()
        sizes = np.full(len(losses), config.batch)
        sizes[-1] = count - config.batch * (len(losses) - 1)
        record = Epoch(
            norm,
            seed,
            epoch,
            train_loss=float(np.average(losses, weights=sizes)),
            train_accuracy=correct / count,
            test_loss=float(test.loss),
            test_accuracy=round(float(test.accuracy) * len(test_labels)) / len(test_labels),
            train_seconds=round(trained - clock, 3),
            test_seconds=round(tested - trained, 3),
        )
        yield _Trained(record, state, np.array(losses, np.float32), np.asarray(test.logits))


def fit(config: Config, dataset: Dataset, observer: Observer | None = None) -> dict[Norm, Fit]:
    """Trains every norm of `config` on `dataset` without touching the disk.

    Raises `UserError` and `NonFiniteLoss`.
    """
    observer = observer or Observer()
    counts, results = check(config, dataset), {}
    for norm in config.norms:
        epochs, losses = [], []
        for done in _train(config, dataset, norm, observer):
            epochs.append(done.record)
            losses.append(done.losses)
            observer.on_epoch(done.record)
        recipe = make_recipe(
            config, dataset.mean, dataset.deviation, len(dataset.class_names), norm
        )
        predict = _predict(recipe, done.state)
        results[norm] = Fit(
            norm,
            config.seed,
            counts[norm],
            epochs,
            np.concatenate(losses),
            done.logits,
            done.state,
            predict,
        )
    return results


def run(
    config: Config,
    dataset: Dataset,
    directory: RunDirectory,
    command: str,
    observer: Observer | None = None,
) -> None:
    """Trains every norm of `config` on `dataset` into a run directory.

    After each epoch the checkpoint, the losses and the predictions are written, and then the
    epoch's line. Raises `UserError`, `NonFiniteLoss` and OSError.
    """
    observer = observer or Observer()
    directory.write_info(describe(config, dataset, check(config, dataset), command))
    for norm in config.norms:
        losses = np.zeros(0, np.float32)
        with _checkpointer(directory, norm, config.seed) as checkpoints:
            for done in _train(config, dataset, norm, observer):
                losses = np.concatenate([losses, done.losses])
                checkpoints.save(
                    done.record.epoch,
                    args=ocp.args.StandardSave(jax.device_get(done.state)._asdict()),
                )  # pyright: ignore[reportCallIssue]
                directory.write_step_losses(norm, config.seed, losses)
                directory.write_predictions(norm, config.seed, done.logits, dataset.test_labels)
                directory.append_epoch(done.record)
                observer.on_epoch(done.record)


def load_model(path: Path | str, norm: Norm, seed: int) -> Predict:
    """The trained net of a run: a pure `predict(images u8[N, 32, 32, 3]) -> probabilities f32[N,
    classes]`.

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
    shapes = jax.eval_shape(lambda: train.init_state(recipe, seed))
    with _checkpointer(directory, norm, seed) as checkpoints:
        newest = checkpoints.latest_step()
        if newest is None:
            raise UserError(f"{path} has no complete epoch of {norm} norm, seed {seed}")
        stored = checkpoints.restore(newest, args=ocp.args.StandardRestore(shapes._asdict()))  # pyright: ignore[reportCallIssue]
    return _predict(recipe, train.TrainState(**train.replicate(recipe, stored)))


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


def describe(config: Config, dataset: Dataset, parameters: dict[str, int], command: str) -> RunInfo:
    """All that `run.json` says of a run that starts now."""
    packages = (
        "jaxnorm",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
        "tensorflow-datasets",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    facts = {
        "name": dataset.name,
        "caption": dataset.caption,
        "fingerprint": dataset.fingerprint,
        "source": dataset.source,
        "verified": dataset.verified,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "deviation": list(dataset.deviation),
        "train_count": len(dataset.train_labels),
        "test_count": len(dataset.test_labels),
    }
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    hardware = f"{device.device_kind} x{jax.device_count()}" + (
        f" ({_processor()})" if device.platform == "cpu" else ""
    )
    return RunInfo(config, parameters, facts, versions, hardware, _git_revision(), started, command)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """The revision of the checkout that this package lies in, or None where it is installed."""
    here = Path(__file__).resolve().parent
    if not (here.parent / "pyproject.toml").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
