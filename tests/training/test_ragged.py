"""The ragged last batch, filled up to the size of the others: what fills it changes nothing."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.model import layers

EIGHT = """
import dataclasses, os, sys
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
import jax, nets, numpy as np
from jaxnorm import Config, fit, load
from jaxnorm.training.mesh import MeshShape

digits = load("digits")
few = {f"{part}_{what}": getattr(digits, f"{part}_{what}")[:138]
       for part in ("train", "test") for what in ("images", "labels")}
for norm in ("batch", "layer"):
    config = Config(norm, "every-kind", "digits", 2, 64, 0.01)
    nets_of = [fit(config, dataclasses.replace(digits, **few), mesh=MeshShape(1, devices))
               for devices in (1, 2, 8)]
    one, *shared = [nets_of[i][norm, 1] for i in range(3)]
    for other in shared:
        np.testing.assert_allclose(other.step_losses, one.step_losses, rtol=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (other.state.norm_state, one.state.norm_state))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("kind", [layers.BatchNorm, layers.plain.BatchNorm])
def test_a_masked_batch_norm_is_that_of_the_images_that_count(kind):
    """Values, running averages and gradients; that of an image left out is exactly 0."""
    numbers = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(numbers.normal(1, 2, (6, 8, 8, 4)), jnp.float32) for _ in "xc")
    module = kind(use_running_average=False, momentum=0.9, use_fast_variance=False)
    variables = module.init(jax.random.key(0), x)

    def apply(x, scale, cotangent, **options):
        params = {"scale": scale, "bias": scale}
        outputs, state = module.apply(
            {**variables, "params": params}, x, mutable=["batch_stats"], **options
        )
        return (outputs * cotangent).sum(), (outputs, state)

    differentiate = jax.value_and_grad(apply, (0, 1), has_aux=True)
    mask = jnp.arange(6)[:, None, None, None] < 4
    (_, ours), ours_back = differentiate(x, jnp.ones(4), cotangent * mask, mask=mask)
    (_, wanted), back = differentiate(x[:4], jnp.ones(4), cotangent[:4])
    chex.assert_trees_all_close((ours[0][:4], ours[1]), wanted, atol=1e-6, rtol=1e-6)
    chex.assert_trees_all_close((ours_back[0][:4], ours_back[1]), back, atol=1e-5, rtol=1e-5)
    assert not np.any(ours_back[0][4:])


@pytest.mark.slow
def test_eight_devices_share_a_ragged_batch():
    """138 images in batches of 64: of the last 10, eight devices get 8, 2 and then none."""
    done = subprocess.run(
        [sys.executable, "-c", EIGHT], capture_output=True, text=True, timeout=300, cwd="tests"
    )
    assert done.returncode == 0, done.stderr
