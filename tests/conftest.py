"""Strict JAX: rank promotion raises. Nothing that a test caches reaches the user's own files."""

import os
import tempfile
from pathlib import Path

_SCRATCH = Path(tempfile.mkdtemp(prefix="jaxnorm-tests-"))
os.environ["XDG_CACHE_HOME"] = str(_SCRATCH / "cache")
os.environ["TFDS_DATA_DIR"] = str(_SCRATCH / "tfds")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # whatever the machine has: some tests share a batch

import shutil

import numpy as np
import pytest

from jaxnorm.data import Dataset, channel_statistics, content_fingerprint


def pytest_sessionfinish() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory whose name has a space, a quote and an umlaut, as a user's may."""
    path = tmp_path / "a dir's näme"
    path.mkdir()
    return path


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
    """A finished run of all three norms of the study on `tiny`: two epochs, with figures."""
    from jaxnorm import experiment, figures
    from jaxnorm.config import Config
    from jaxnorm.records import RunDirectory

    directory = RunDirectory.create(tmp_path_factory.mktemp("runs") / "tiny run")
    config = Config(dataset="tiny", epochs=2, batch_size=16, seed=3)
    experiment.run(config, tiny, directory, "python -m jaxnorm.run --dataset tiny")
    figures.save_examples(directory, tiny)
    figures.draw(directory)
    return directory
