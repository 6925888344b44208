"""The nets against PyTorch: logits, gradients, losses, parameters and running statistics over three
steps.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_gradients_close
from golden import make_torch_golden as golden
from helpers import SOON

from jaxnorm.model.cnn import CNN
from jaxnorm.training import epoch as epochs
from jaxnorm.training import step as train
from jaxnorm.training.mesh import ONE


def nested(flat: dict) -> dict:
    """{"C1/kernel": x} -> {"C1": {"kernel": x}}."""
    tree: dict = {}
    for name, value in flat.items():
        layer, leaf = name.split("/")
        tree.setdefault(layer, {})[leaf] = jnp.asarray(value, jnp.float32)
    return tree


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.GOLDEN) as file:
        return {name: file[name] for name in file.files}


FIRST = ("standardized-group",)
OPTIMIZED = ("original-layer", "standardized-batch")
"""Compiled as in training; the others without optimization, in half of the time."""
CASES = [
    pytest.param(net, True, marks=[pytest.mark.slow] * (net not in FIRST))
    for net in golden.NETS
    if net != "matched-group"  # the same net as original-group: see test_cnn
]
CASES += [
    pytest.param(net, False, marks=pytest.mark.slow)
    for net in ("original-batch", "standardized-layer")
]


def initial_state(program, params):
    """The state before the first step, with these parameters."""
    standard = train.standard_of(golden.MEAN, golden.DEVIATION)
    shapes = train.init_state.eval_shape(program, 0, standard)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes.params)
    norm_state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var")), shapes.norm_state
    )
    return train.TrainState(params, norm_state, program.transformation(0.0).init(params), standard)


@pytest.mark.parametrize(("net", "fast"), CASES)
def test_three_steps_equal_pytorch(net, fast, stored):
    jit = jax.jit if net in OPTIMIZED and fast else partial(jax.jit, **SOON)
    arch, norm = net.split("-")
    standardized = arch == "standardized"
    arch = "residual" if standardized else arch
    model = CNN(norm, arch, dropout=0.0, weight_standardization=standardized, fast=fast)
    program = train.Program(model=model)
    state = initial_state(program, nested(golden.draw_parameters(net)))
    images, labels = map(jnp.asarray, golden.draw_batches(int(stored[f"{net}:seed"])))
    wanted = {
        name.split(":")[1]: value for name, value in stored.items() if name.startswith(net + ":")
    }

    predict = jit(partial(epochs._logits, program, ONE))
    if norm == "batch":  # in training it sees the batch
        inputs = train.standardize(state, images[0])
        in_training = jit(partial(model.apply, train=True, mutable=["batch_stats"]))
        logits, _ = in_training(state.variables, inputs)
    else:
        logits = predict(images[0], state)
    log_probabilities = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(log_probabilities, wanted["log_probabilities"], atol=5e-6)
    losses = []
    step = jit(train.train_step, static_argnums=0)
    for i in range(golden.STEPS):
        key = train.derive_key(0, "dropout", 1, i)
        state, loss, _ = step(program, state, images[i], labels[i], key, 0.01)
        losses.append(loss)
        if i == 0:
            gradients = state.opt_state[1][0].trace  # momentum's first value
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-5)
    for kind, tree in (("gradient", gradients), ("parameter", state.params)):
        ours = {
            f"{kind}/{layer}/{leaf}": golden.sample(np.asarray(values))
            for layer, leaves in tree.items()
            for leaf, values in leaves.items()
        }
        assert_gradients_close(ours, {name: wanted[name] for name in ours}, worst=2e-5)
    for layer, averages in state.norm_state.get("batch_stats", {}).items():
        for name, values in averages.items():
            np.testing.assert_allclose(values, wanted[f"{name}/{layer}"], rtol=1e-5, atol=2e-6)
    assert bool(state.norm_state) == (norm == "batch")
    evaluated = jax.nn.log_softmax(predict(images[golden.STEPS], state))
    np.testing.assert_allclose(evaluated, wanted["evaluated"], atol=1e-5)
