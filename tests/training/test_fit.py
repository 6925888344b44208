"""Training in memory: what of it no run on disk shows."""

import time

import jax
import numpy as np
import pytest

from jaxnorm.config import Config, study, tuned
from jaxnorm.model import summary
from jaxnorm.model.cnn import CNN
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.fit import Callback, fit, train
from jaxnorm.training.mesh import MeshShape

SETTINGS = {"arch": "three-layers", "dataset": "tiny", "epochs": 1, "batch_size": 35}


def test_the_same_seed_gives_the_same_numbers_under_any_defaults_of_jax(tiny):
    """What JAX_ENABLE_X64, JAX_THREEFRY_PARTITIONABLE and JAX_DEFAULT_MATMUL_PRECISION set."""
    config = Config("layer", **SETTINGS)
    wanted = fit(config, tiny)["layer", 1]
    with (
        jax.enable_x64(True),
        jax.threefry_partitionable(False),
        jax.default_matmul_precision("BF16_BF16_F32"),
    ):
        trained = fit(config, tiny)["layer", 1]
        probabilities = trained.predict(tiny.test_images)
        assert summary.count_parameters(CNN("own_norm:OwnNorm", "three-layers", 5)) == 132
    np.testing.assert_array_equal(trained.step_losses, wanted.step_losses)
    np.testing.assert_array_equal(probabilities, wanted.predict(tiny.test_images))
    accuracy = f"{trained.epochs[-1].test_accuracy:.2%}"
    assert repr(trained) == f"Fit(layer norm, seed 1: test accuracy {accuracy} after 1 epoch)"


def test_an_untuned_learning_rate_beside_tuned_ones_is_said(tiny):
    heard = []

    class Stops(Callback):
        def on_warning(self, text):
            heard.append(text)

        def on_start(self, norm, seeds, steps):
            raise KeyboardInterrupt

    settings = {**SETTINGS, "norm": "batch,rms,own_norm:OwnNorm"}
    for config in (tuned(**settings), tuned(**settings, learning_rate=0.1), study(**settings)):
        with pytest.raises(KeyboardInterrupt):
            next(train(Experiment([config], tiny), Stops()))
    (text,) = heard
    assert "no learning rate for rms and own_norm:OwnNorm norm: 0.1 is taken, which was not" in text
    assert "python -m jaxnorm.tune --recipe tuned --norm rms,own_norm:OwnNorm" in text


def test_nets_that_train_together_share_its_time(tiny):
    """However fast the machine is, their shares add up to no more than all that has passed."""
    config, clock = Config("layer", "three-layers", "tiny", 1, 35, seeds=2), time.monotonic()
    fits = fit(config, tiny, mesh=MeshShape(2))
    passed = time.monotonic() - clock
    records = [fit.epochs[0] for fit in fits.values()]
    spent = sum(record.train_seconds + record.test_seconds for record in records)
    assert 0 < spent <= passed + 0.002  # which are rounded to milliseconds
