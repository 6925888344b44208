"""Strict JAX: rank promotion raises. Nothing that a test caches reaches the user's own files."""

import fcntl
import os
import tempfile
from pathlib import Path

_SCRATCH = Path(tempfile.mkdtemp(prefix="jaxnorm-tests-"))
os.environ["XDG_CACHE_HOME"] = str(_SCRATCH / "cache")
os.environ["TFDS_DATA_DIR"] = str(_SCRATCH / "tfds")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the processes of one session compile for each other
    from jaxnorm.data.cache import machine_name

    # Kept for the next run of pytest.
    cache = Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled" / machine_name()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # whatever the machine has: some tests share a batch

import shutil

import nets  # noqa: F401  of few layers, for all tests
import numpy as np
import pytest
from hypothesis import settings

from jaxnorm.data.datasets import Dataset, channel_statistics, content_fingerprint

settings.register_profile("fast", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("hostile", settings.get_profile("fast"), max_examples=2_000)
settings.load_profile("fast")


def pytest_addoption(parser) -> None:
    parser.addoption("--record-faults", help="write a line for each try of the fault harness here")


def pytest_collection_modifyitems(items: list) -> None:
    """Puts the rooms that compile nets first, so that both processes end together."""
    items.sort(key=lambda item: item.path.parent.name not in ("model", "runs", "training"))


def pytest_sessionfinish() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Tests need not survive a power cut: waiting for the disk takes a part of their time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory whose name has a space, a quote and an umlaut, as a user's may."""
    path = tmp_path / "a dir's näme"
    path.mkdir()
    return path


@pytest.fixture
def inside(scratch, monkeypatch) -> Path:
    """A working directory for one test."""
    monkeypatch.chdir(scratch)
    return scratch


@pytest.fixture
def tiny_by_name(tiny, monkeypatch) -> None:
    """`tiny` by whatever name; reports draw two figures, which take a fifth of the time of all."""
    from jaxnorm.analysis import figures
    from jaxnorm.data import datasets

    monkeypatch.setattr(datasets, "load", lambda *_, **__: tiny)
    monkeypatch.setattr(figures, "FIGURES", (figures.together,))


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Figures without pixels, which take the time."""
    from jaxnorm.analysis import figures

    monkeypatch.setattr(figures, "png", lambda figure: b"a PNG")


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    """Four easy classes in 70 training and 22 test images: noise around a colour and a bar."""
    rng = np.random.default_rng(5)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count, dtype=np.int32) % 4
        images = rng.integers(0, 60, (count, 32, 32, 3))
        images[labels % 2 == 1, 8:24, :, 0] += 150
        images[labels // 2 == 1, :, 8:24, 2] += 150
        return images.astype(np.uint8), labels

    arrays = [*draw(70), *draw(22)]
    mean, deviation = channel_statistics(arrays[0])
    names = ("north", "east", "south", "west")
    digest = content_fingerprint(arrays)
    return Dataset("tiny", *arrays, names, digest, "drawn", True, mean, deviation)


@pytest.fixture(scope="session")
def tiny_run(tiny, tmp_path_factory):
    """A finished run of all three norms of the study on `tiny`, two epochs; the processes of one
    session share it, and the first that needs it makes it.
    """
    from helpers import run

    from jaxnorm.analysis import results
    from jaxnorm.analysis.results import Run
    from jaxnorm.config import study
    from jaxnorm.storage.directory import RunDirectory

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (shared / "tiny run" / "examples.npz").exists():
            return RunDirectory(shared / "tiny run")
        config = study(arch="three-layers", dataset="tiny", epochs=2, batch_size=16, seed=3)
        directory = run(config, tiny, shared / "tiny run")
        results.save_examples(Run(directory), tiny)
        return directory


ACCURACIES = {
    "batch": ((11, 16), (13, 18), (10, 14)),
    "group": ((9, 15), (12, 16), (11, 15)),
    "layer": ((5, 12), (6, 11), (8, 13)),
}
"""Of the made-up sweep: how many of `tiny`'s 22 test images are right after each epoch, by norm and
seed.
"""


@pytest.fixture
def sweep(tiny, scratch):
    """Writes the records of a sweep that nobody trained: `sweep()` or `sweep(changed settings)`.

    Three norms, seeds 1 to 3, two epochs, with the accuracies above; the rest follows from them.
    """
    return _writer_of_sweeps(tiny, scratch)


@pytest.fixture(scope="session")
def made_up(tiny, tmp_path_factory):
    """The run of `sweep()`, to be read alone."""
    from jaxnorm.analysis.results import Run

    return Run(_writer_of_sweeps(tiny, tmp_path_factory.mktemp("made-up"))())


def _writer_of_sweeps(tiny, scratch):
    from jaxnorm.analysis import results
    from jaxnorm.analysis.results import Run
    from jaxnorm.config import RECIPES, NetId
    from jaxnorm.records import Epoch, Predictions
    from jaxnorm.runs import environment
    from jaxnorm.storage.directory import RunDirectory
    from jaxnorm.storage.net import NetFolder, Saved
    from jaxnorm.training.experiment import Experiment

    def net_of(norm, seed, rights, now, held_out):
        rng = np.random.default_rng([seed, len(norm), ord(norm[0])])
        losses = rng.uniform(0.1, 2, 5 * len(rights)).astype(np.float32)
        logits = rng.normal(size=(22, 4)).astype(np.float32)
        wrong = rng.permutation(22) >= rights[-1]
        logits[np.arange(22), (tiny.test_labels + wrong) % 4] = 5
        log_probabilities = Predictions.of(logits, tiny.test_labels).log_probabilities[:, 0]
        last = -float(log_probabilities.astype(float).mean())
        epochs = []
        for epoch, correct in enumerate(rights, 1):
            train = (1.5 / epoch, (correct - 1) / 22)
            test = (last * len(rights) / epoch, correct / 22)
            validation = test if held_out else ()
            epochs.append(Epoch(norm, seed, epoch, *train, *test, 2.0, 1.0, *validation))
        saved = Saved(epochs, [now], {}, losses, logits, tiny.test_labels)
        return saved, made_up_probes(rng)

    def write(name="sweep", accuracies=ACCURACIES, dataset=tiny, recipe="study", **settings):
        values = {"arch": "matched", "dataset": "tiny", "epochs": 2, "batch_size": 16, "seeds": 3}
        config = RECIPES[recipe](**{**values, **settings})
        directory = RunDirectory.create(scratch / name)
        experiment = Experiment([config], dataset)
        info = environment.describe(config, experiment, environment.environment("python -m x"))
        directory.write_json("run.json", info)
        for norm, seed in config.nets:
            rights = accuracies[norm]
            folder = NetFolder(directory, NetId(norm, seed))
            ends, held_out = rights[seed - config.seed], config.validation > 0
            saved, probes = net_of(norm, seed, ends, info.environment, held_out)
            if len(saved.epochs) < config.epochs:
                folder.commit(saved)
                continue
            folder.finish(saved, probes)
            if seed != config.seed:
                folder.path.joinpath("probes.npz").unlink()
        results.save_examples(Run(directory), dataset)
        return directory

    return write


def made_up_probes(rng):
    """What `probes.measure` would have written, of two layers and three kernels."""
    return {
        "layers": np.array(["C1", "C2"]),
        "before": rng.uniform(size=(2, 2)).astype(np.float32),
        "after": rng.uniform(size=(2, 2)).astype(np.float32),
        "kernels": np.array(["C1", "C2", "c3"]),
        "gradients": rng.uniform(0.1, 1, 3).astype(np.float32),
        "sizes": np.array([4, 16], np.int32),
        "batch_accuracy": rng.uniform(size=2).astype(np.float32),
        "running_accuracy": np.array(0.5, np.float32),
        "precise_accuracy": np.array(0.6, np.float32),
        "initial_gradients": rng.uniform(0.1, 1, 3).astype(np.float32),
        "similarities": rng.uniform(size=(2, 2)).astype(np.float32),
        "corruptions": np.array(["noise", "blur"]),
        "corrupted_accuracy": rng.uniform(size=2).astype(np.float32),
        "epoch": np.array(2, np.int32),
        "tested": np.array(22, np.int32),
    }
