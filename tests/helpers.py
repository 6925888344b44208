"""Shorter ways to the package's own functions, for tests of one net or one run."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm import cli
from jaxnorm import run as run_command
from jaxnorm.analysis.results import Run
from jaxnorm.config import NetId, UserError
from jaxnorm.model.cnn import CNN
from jaxnorm.runs import environment, runner
from jaxnorm.storage.net import NetFolder
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.fit import Callback
from jaxnorm.training.mesh import ONE
from jaxnorm.training.step import Program, init_state, standard_of

SMALL = ("--dataset", "tiny", "--epochs", "1", "--batch-size", "35", "--norm", "layer")
SMALL += ("--arch", "three-layers")
"""A run that is over soon, of `conftest`'s data and a net of `nets`."""
SOON = {"compiler_options": {"xla_backend_optimization_level": 0}}
"""For `jax.jit` of what ours is compared with: it compiles in half of the time."""


class Evil:
    """Unpickled by anything less strict, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def call(*arguments, app=run_command.app) -> int:
    """A command in this process; its exit code."""
    return cli.run(app, [str(argument) for argument in arguments])


def error_of(capsys, after_output=False) -> str:
    """What a command that failed printed: one line on standard error, and else nothing."""
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert after_output or not printed.out
    return printed.err


def write_npz(path, dataset, **changes):
    """Writes a dataset as a file of the user's own, some of its arrays changed."""
    names = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    np.savez(path, **{**{name: getattr(dataset, name) for name in names}, **changes})


def program_of(norm, dataset, arch="three-layers", dropout=0.1, **fields):
    """A program of a net of `nets`, which compiles soon."""
    net = CNN(norm, arch, len(dataset.class_names), dropout=dropout, **fields)
    return Program(model=net)


def init(program, dataset, seed):
    """The initial state of a net."""
    return init_state(program, seed, standard_of(dataset.mean, dataset.deviation))


class Stopped(BaseException):
    """Stops a run as a signal does."""


class StopAfter(Callback):
    """Stops a run when so many epochs of all nets are complete, and writes down what it hears."""

    def __init__(self, epochs=10**9):
        self.left, self.complete = epochs, None
        self.warnings, self.together, self.heard = [], [], []

    def on_start(self, norm, seeds, steps):
        self.together.append(seeds)

    def on_epoch(self, config, epoch):
        self.heard.append((config, epoch.epoch))
        self.left -= 1
        if not self.left:
            raise Stopped

    def on_resume(self, complete):
        self.complete = complete

    def on_warning(self, text):
        self.warnings.append(text)


def refusal(act, *arguments, **options) -> str:
    """The one line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as error:
        act(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def failing(error: Exception):
    """A function that raises an error whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


def stacked(tree):
    """Arrays of one net with a leading axis of one."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def first(tree):
    """The arrays of the first net."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def train_chunk(program, state, images, labels, chunk, keys, rate=0.01, mesh=ONE):
    """Trains one net on a chunk: the state, f32[S] losses and the correct predictions; `rate` is of
    all its steps, or f32[S].
    """
    state, images, labels = jax.device_get((state, images, labels))
    states = meshes.place(mesh, jax.tree.map(lambda a: np.asarray(a)[None], state), True)
    images, labels = meshes.place(mesh, (images, labels))
    rates = jnp.broadcast_to(jnp.float32(rate), (1, chunk.batches.shape[1]))  # as a run's own
    states, steps = epochs.train_nets(
        program, mesh, states, images, labels, chunk.batches, keys, rates, jnp.zeros(1), *chunk[1:]
    )
    states, steps = meshes.fetch((states, steps))
    return first(states), steps.losses[0], int(steps.correct[0])


def train_epoch(program, state, images, labels, seed, epoch, batch_size, rate=0.01, chunks=1):
    """Trains one net on every image once: the state, all losses and the correct predictions."""
    rows = jnp.arange(labels.shape[0], dtype=jnp.int32)[None]
    seeds = jnp.array([seed], jnp.uint32)
    cut, keys = epochs.epoch_chunks(ONE, seeds, epoch, rows, batch_size, chunks)
    losses, correct = [], 0
    for chunk in cut:
        state, done, of_chunk = train_chunk(program, state, images, labels, chunk, keys, rate)
        losses.extend(done[chunk.start : chunk.stop])
        correct += of_chunk
    return state, np.array(losses), correct


def evaluate(program, state, images, labels):
    """Evaluates one net."""
    return first(epochs.evaluate_nets(program, ONE, stacked(state), images, labels))


def predict_logits(program, state, images, mesh=ONE):
    """Logits of one net."""
    states = meshes.place(mesh, jax.tree.map(lambda a: np.asarray(a)[None], state), True)
    images = meshes.place(mesh, images)
    return meshes.fetch(epochs.predict_logits(program, mesh, states, images))[0]


def run(config, dataset, path, callbacks=(), mesh=None, measures=True):
    """Trains a run, or resumes it; returns its directory."""
    sweep = Sweep(path, [config])
    train(sweep, dataset, callbacks, mesh, measures)
    return sweep.folder


def train(sweep, dataset, callbacks=(), mesh=None, measures=False):
    """Trains the runs of a sweep, or resumes them; to measure nets inside compiles two programs."""
    experiment = Experiment(sweep.configs, dataset, mesh, measures=measures)
    runner.run(sweep, experiment, environment.environment("python -m x"), callbacks)


def epochs_of(directory):
    """The epochs of every net of a run, in order."""
    return [epoch for epochs in Run(directory).epochs.values() for epoch in epochs]


def losses_of(directory, net):
    """The loss of every step of a net."""
    return Run(directory).step_losses(*net)


def logits_of(directory, net):
    """The test logits of a net."""
    return Run(directory).predictions[net].logits


def rewrite_net(directory, net, kind="result", **arrays):
    """Changes arrays of a net's result or, of the kind "probes", of what was measured inside it; an
    array that is None goes.
    """
    name = f"{NetFolder(directory, NetId(*net)).name}/{kind}.npz"
    kept = {**np.load(directory.path / name), **arrays}
    directory.write_arrays(name, **{k: v for k, v in kept.items() if v is not None})


def probes_of(directory, net):
    """What was measured inside a net."""
    return dict(np.load(NetFolder(directory, NetId(*net)).path / "probes.npz"))


def remove_nets(directory, names):
    """Removes the folders of nets, of names with `*` in it."""
    for path in directory.path.glob(f"nets/{names}"):
        shutil.rmtree(path)


def without_times(epoch):
    return dataclasses.replace(epoch, train_seconds=0.0, test_seconds=0.0)


def difference(ours, wanted) -> str:
    """What differs between two finished runs, except for the times; empty if nothing does."""
    config = wanted.info().config
    if ours.info().config != config:
        return "settings"
    for net in config.nets:
        (a, state), (b, other) = (
            (NetFolder(run, net).result(), runner.load_state(run.path, *net)[1])
            for run in (ours, wanted)
        )
        if list(map(without_times, a.epochs)) != list(map(without_times, b.epochs)):
            return f"metrics of {net}"
        if a.losses.tobytes() != b.losses.tobytes():
            return f"step losses of {net}"
        predictions = (Run(run).predictions[net].logits for run in (ours, wanted))
        if len({logits.tobytes() for logits in predictions}) > 1:
            return f"predictions of {net}"
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
        if any(np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in pairs):
            return f"parameters of {net}"
    return ""


def cells(table, name):
    """The row of that name, by the head."""
    (row,) = [row for row in table.rows if row[0] == name]
    return dict(zip(table.head, row, strict=True))
