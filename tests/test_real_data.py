"""Real pictures, where the JPEG mirror of CIFAR-10 lies beside the checkout."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxnorm.config import Config, UserError
from jaxnorm.data import datasets as data
from jaxnorm.training.fit import fit

MAKER = Path(__file__).resolve().parents[2] / "shared" / "data" / "make_cifar10_archive.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MAKER.exists(), reason="no CIFAR-10 beside the checkout"),
]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """The archive, imported, and the directory that it was imported into."""
    directory = tmp_path_factory.mktemp("mirror")
    archive = directory / "cifar-10-binary.tar.gz"
    subprocess.run([sys.executable, str(MAKER), str(archive)], check=True, capture_output=True)
    with pytest.raises(UserError, match="not an official CIFAR-10 archive's"):
        data.load("cifar10", directory / "tfds", str(archive), cache_dir=directory / "cache")
    places = {"data_dir": directory / "tfds", "cache_dir": directory / "cache"}
    return data.load("cifar10", archive=str(archive), allow_unverified=True, **places), places


def test_the_mirror_is_recognized_by_its_content(mirror):
    dataset, places = mirror
    assert dataset.caption == "cifar10, JPEG mirror, unverified data"
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert np.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1000] * 10
    mean, deviation = data.channel_statistics(dataset.train_images)
    np.testing.assert_allclose(mean, data.CIFAR10_MEAN, atol=5e-4)
    np.testing.assert_allclose(deviation, data.CIFAR10_DEVIATION, atol=2.5e-3)
    again = data.load("cifar10", allow_unverified=True, **places)
    assert again.fingerprint == dataset.fingerprint


def test_it_learns_from_real_pictures(mirror):
    """The study's net after two epochs: 32 to 35 % for seeds 1 to 4 (chance is 10 %)."""
    counts = {"train_images": 5000, "train_labels": 5000, "test_images": 1000, "test_labels": 1000}
    parts = {name: getattr(mirror[0], name)[:count] for name, count in counts.items()}
    config = Config("batch", epochs=2, batch_size=32)
    first, last = fit(config, dataclasses.replace(mirror[0], **parts))["batch", 1].epochs
    assert last.train_loss < first.train_loss
    assert last.test_accuracy > 0.25
