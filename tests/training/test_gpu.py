"""What a GPU computes, for a machine that has one (`pytest -m gpu`); a CPU passes as well."""

import chex
import jax
import numpy as np
import pytest
from close import assert_gradients_close
from helpers import init, program_of

from jaxnorm.config import ALL, NORMS, Config
from jaxnorm.data.datasets import load
from jaxnorm.training import selfcheck
from jaxnorm.training import step as train
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.fit import fit

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_that_of_a_cpu(tiny, norm):
    """The loss, running averages and gradients of plain float32, on 32 images."""
    program, results = program_of(norm, tiny, "every-kind"), []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            step = jax.jit(train.train_step, static_argnums=0)
            state = jax.device_get(init(program, tiny, 1))
            batch = tiny.train_images[:32], tiny.train_labels[:32], train.derive_key(1, "order", 1)
            results.append(jax.device_get(step(program, state, *batch, 0.01)))
    (ours, loss, _), (wanted, wanted_loss, _) = results
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-4)
    chex.assert_trees_all_close(ours.norm_state, wanted.norm_state, rtol=1e-3, atol=1e-4)
    traces = (each.opt_state[1][0].trace for each in (ours, wanted))
    assert_gradients_close(*traces, typical=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_self_check_passes(precision):
    config = Config("batch,layer", "matched", "digits", 1, 32, precision=precision)
    selfcheck.self_check(Experiment([config], load("digits")))


@pytest.mark.parametrize("norm", ALL)
def test_nets_in_one_program_are_those_that_train_alone(tiny, norm):
    """Within rounding: after one epoch, losses agree to a thousandth."""
    config = Config(norm, "every-kind", "tiny", 1, 16, seeds=3)
    together = fit(config, tiny)
    for seed in config.seed_numbers:
        alone = fit(Config(norm, "every-kind", "tiny", 1, 16, seed=seed), tiny)[norm, seed]
        np.testing.assert_allclose(together[norm, seed].step_losses, alone.step_losses, rtol=1e-3)
