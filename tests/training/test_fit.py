"""Training in memory: what of it no run on disk shows."""

import dataclasses
import time

import chex
import jax
import numpy as np
import pytest

from jaxnorm.config import Config, study, tuned
from jaxnorm.model import summary
from jaxnorm.model.cnn import CNN
from jaxnorm.training.experiment import Experiment, learning_rates
from jaxnorm.training.fit import Callback, fit, train, warn_of_untuned
from jaxnorm.training.mesh import ONE, MeshShape

SETTINGS = {"arch": "three-layers", "dataset": "tiny", "epochs": 1, "batch_size": 35}
TUNED = {**SETTINGS, "epochs": 2}


@pytest.fixture(scope="module")
def alone(tiny):
    return fit(Config("layer", **SETTINGS), tiny)["layer", 1]


def test_the_same_seed_gives_the_same_numbers_under_any_defaults_of_jax(tiny, alone):
    """What JAX_ENABLE_X64, JAX_THREEFRY_PARTITIONABLE and JAX_DEFAULT_MATMUL_PRECISION set."""
    with (
        jax.enable_x64(True),
        jax.threefry_partitionable(False),
        jax.default_matmul_precision("BF16_BF16_F32"),
    ):
        trained = fit(Config("layer", **SETTINGS), tiny)["layer", 1]
        probabilities = trained.predict(tiny.test_images)
        assert summary.count_parameters(CNN("own_norm:OwnNorm", "three-layers", 5)) == 132
    np.testing.assert_array_equal(trained.step_losses, alone.step_losses)
    np.testing.assert_array_equal(probabilities, alone.predict(tiny.test_images))
    accuracy = f"{trained.epochs[-1].test_accuracy:.2%}"
    assert repr(trained) == f"Fit(layer norm, seed 1: test accuracy {accuracy} after 1 epoch)"


def test_nets_on_two_devices_are_as_alone_bit_for_bit_and_share_the_time(tiny, alone):
    """However fast the machine is, their shares add up to no more than all that has passed."""
    config, clock = Config("layer", **SETTINGS, seeds=2), time.monotonic()
    fits = fit(config, tiny, mesh=MeshShape(2))
    passed = time.monotonic() - clock
    one, other = fits["layer", 1], fits["layer", 2]
    np.testing.assert_array_equal(one.step_losses, alone.step_losses)
    np.testing.assert_array_equal(one.logits, alone.logits)
    chex.assert_trees_all_equal(one.state, alone.state)
    assert (one.step_losses != other.step_losses).all()
    records = [fit.epochs[0] for fit in fits.values()]
    spent = sum(record.train_seconds + record.test_seconds for record in records)
    assert 0 < spent <= passed + 0.002  # which are rounded to milliseconds


def test_a_tuned_net_goes_on_from_a_state_bit_for_bit(tiny):
    """Augmentation, one-cycle and momentum are those of the epoch, not of the start."""
    group = next(Experiment([tuned(norm="group", **TUNED)], tiny, ONE).groups())
    before, whole = train(group, [None], ())
    (resumed,) = train(group.of(group.nets, start=1), [before.state], ())
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    chex.assert_trees_all_equal(resumed.state, whole.state)
    assert (before.losses != whole.losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_seed_sees_the_same_images_on_any_devices(tiny, norm):
    config = dataclasses.replace(tuned(norm="all", **TUNED), norm=norm, batch_size=14)
    one, two = (fit(config, tiny, mesh=mesh)[norm, 1] for mesh in (ONE, MeshShape(batch=2)))
    np.testing.assert_allclose(one.step_losses, two.step_losses, rtol=1e-4)
    chex.assert_trees_all_close(one.state.variables, two.state.variables, atol=1e-4)


def test_an_untuned_learning_rate_beside_tuned_ones_is_said():
    heard, callback = [], Callback()
    callback.on_warning = heard.append
    settings = {**SETTINGS, "arch": "residual", "norm": "batch,own_norm:Bare,own_norm:OwnNorm"}
    under_muon = tuned(**settings, optimizer="muon")
    warn_of_untuned(tuned(**settings), [callback])
    for tuned_or_asked in (tuned(**settings, learning_rate=0.1), study(**settings)):
        warn_of_untuned(tuned_or_asked, [callback])
    warn_of_untuned(under_muon, [callback])
    warn_of_untuned(tuned(**{**settings, "arch": "attention"}), [callback])
    text, other, third = heard
    assert "no sgd learning rate for own_norm:Bare and own_norm:OwnNorm norm: 0.1 is taken" in text
    assert "which was not tuned as those of other norms were; python -m" in text
    assert "python -m jaxnorm.tune --recipe tuned --norm own_norm:Bare,own_norm:OwnNorm" in text
    assert "for batch and own_norm:Bare and own_norm:OwnNorm norm: 0.07 is taken" in other
    assert "python -m jaxnorm.tune --recipe tuned --optimizer muon --norm batch,own" in other
    assert "for batch and own_norm:Bare and own_norm:OwnNorm norm: 0.123 is taken" in third
    assert "python -m jaxnorm.tune --recipe tuned --arch attention --norm batch,own" in third


def test_one_cycle_goes_up_and_down_in_straight_lines_and_constant_stays():
    config = tuned(epochs=4, warmup=0.25)
    rates = np.concatenate([learning_rates(config, epoch, 100) for epoch in range(1, 5)])
    assert rates.argmax() in (99, 100)
    np.testing.assert_allclose(
        rates[[0, 49, 99, 249, 399]], [0.005, 0.495, 0.995, 0.5017, 0.0017], atol=1e-3
    )
    assert (np.diff(rates[:100]) > 0).all()
    assert (np.diff(rates[100:]) < 0).all()
    constant = learning_rates(dataclasses.replace(config, schedule="constant"), 3, 10)
    assert (constant == 1).all()
