"""What the norms do inside a net, against plain arithmetic on small batches."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import running_averages
from helpers import SOON, init, predict_logits

from jaxnorm.analysis import tables
from jaxnorm.analysis.inside import ACTIVATIONS, BATCHES, CORRUPTED, DEPTH, GRADIENTS
from jaxnorm.analysis.results import Run
from jaxnorm.analysis.tables import EVALUATED
from jaxnorm.model.cnn import CNN
from jaxnorm.runs import runner
from jaxnorm.training import probes
from jaxnorm.training import step as train
from jaxnorm.training.mesh import ONE

PROBES = ACTIVATIONS | GRADIENTS | BATCHES | DEPTH | CORRUPTED | EVALUATED


def net(norm, tiny, arch="three-layers"):
    program = train.Program(model=CNN(norm, arch, 4))
    return program, init(program, tiny, 1)


def test_after_each_norm_the_activations_are_normalized(tiny):
    images = tiny.train_images[:12]
    program, state = net("batch", tiny, "every-kind")
    activations, _ = probes.look(program, state, images, tiny.train_labels[:12])
    assert set(activations) == {"C1", "C3", "C4"}
    chex.assert_shape(activations["C3"], (12, 16, 16, 8))
    for before, after in activations.values():
        x = np.asarray(before, np.float64)
        centred = x - x.mean((0, 1, 2))
        wanted = centred / np.sqrt((centred**2).mean((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(after, wanted, atol=2e-4)
    program, state = net("none", tiny)
    activations, _ = probes.look(program, state, images, tiny.train_labels[:12])
    for before, after in activations.values():
        chex.assert_trees_all_equal(before, after)


# The shapes of the following are those that `tiny_run` measures, and compiled once.


def test_gradient_norms_are_those_of_the_loss_without_dropout(tiny):
    program, state = net("group", tiny)
    images, labels = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    _, norms = probes.look(program, state, images, labels)
    model = program.model.clone(fast=False, dropout=0.0)

    def loss(params):
        logits = model.apply({"params": params}, train.standardize(state, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradients = jax.jit(jax.grad(loss), **SOON)(state.params)
    assert set(norms) == {"C1", "c11"}
    for name, value in norms.items():
        wanted = np.sqrt((np.asarray(gradients[name]["kernel"], np.float64) ** 2).sum())
        assert float(value) == pytest.approx(wanted, rel=1e-3)


def test_batch_accuracy_uses_each_batchs_own_statistics(tiny):
    program, state = net("batch", tiny)
    images, labels = jnp.asarray(tiny.test_images[:16]), jnp.asarray(tiny.test_labels[:16])
    model = program.model.clone(fast=False, dropout=0.0)
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]), **SOON)
    correct = 0
    for rows in np.arange(16).reshape(4, 4):
        logits, _ = apply(state.variables, train.standardize(state, images[rows]))
        correct += int((logits.argmax(-1) == labels[rows]).sum())
    accuracy = probes.batch_accuracy(program, state, images, labels, 4)
    assert float(accuracy) == pytest.approx(correct / 16)
    with pytest.raises(AssertionError, match="divisible"):
        probes.batch_accuracy(program, state, images, labels, 7)


def test_precise_statistics_are_those_of_all_images(tiny):
    """Of the first norm, whose inputs depend on no other: the mean and the variance of all batches
    together, each batch's variance unbiased.
    """
    program, state = net("batch", tiny)
    moved = jax.tree.map(lambda leaf: leaf + 7, state.norm_state)  # has no part in it
    batches = tiny.train_images[:64].reshape(4, 16, 32, 32, 3)
    statistics = probes.precise_statistics(program, state._replace(norm_state=moved), batches)
    activations, _ = probes.look(program, state, tiny.train_images, tiny.train_labels)
    before = activations["C1"][0][:64]
    flat = np.asarray(before, np.float64).reshape(4, -1, 4)
    wanted = flat.var(1, ddof=1).mean(0) + flat.mean(1).var(0)
    of_norm = statistics["batch_stats"]["C1_norm"]
    np.testing.assert_allclose(of_norm["var"], wanted, rtol=1e-5)
    np.testing.assert_allclose(of_norm["mean"], flat.mean((0, 1)), rtol=1e-4, atol=1e-6)
    other = dataclasses.replace(program, model=program.model.clone(norm_momentum=0.5))
    again = probes.precise_statistics(other, state, batches)
    chex.assert_trees_all_close(again, statistics, rtol=1e-5, atol=1e-6)


def test_dropout_adds_to_the_variances_of_later_norms_alone(tiny):
    program, state = net("batch", tiny, "every-kind")
    program = dataclasses.replace(program, model=program.model.clone(dropout=0.5))
    batches = tiny.train_images[:36].reshape(3, 12, 32, 32, 3)
    without, dropped, other = (
        probes.precise_statistics(program, state, batches, key)["batch_stats"]
        for key in (None, jax.random.key(1), jax.random.key(2))
    )
    chex.assert_trees_all_close(dropped["C1_norm"], without["C1_norm"], rtol=1e-5)
    for name in ("C3_norm", "C4_norm"):
        assert (dropped[name]["var"] > 1.1 * without[name]["var"]).all()
        assert (dropped[name]["var"] != other[name]["var"]).all()
    again = probes.precise_statistics(program, state, batches[::-1], jax.random.key(1))
    ratio = again["batch_stats"]["C3_norm"]["var"] / dropped["C3_norm"]["var"]
    assert (abs(ratio - 1) > 1e-3).any()  # each batch has masks of its own


def test_the_cost_of_running_averages_is_split_into_lag_and_dropout(tiny):
    program, state = net("batch", tiny)
    measured = running_averages.accuracies(program, state, tiny, jax.random.key(1))
    measured_again = probes.precise_statistics(
        program, state, jnp.asarray(tiny.train_images)[None], jax.random.key(1)
    )
    states = {"running": state, "with dropout": state._replace(norm_state=measured_again)}
    for way, state_of_way in states.items():
        logits = predict_logits(program, state_of_way, tiny.test_images)
        assert measured[way] == (logits.argmax(1) == tiny.test_labels).mean()
    # No norm comes after its dropout.
    assert measured["without dropout"] == measured["with dropout"]
    accuracies = {"1": (0.5, 0.6, 0.8), "2": (0.6, 0.7, 0.8)}
    nets = {s: dict(zip(running_averages.WAYS, a, strict=True)) for s, a in accuracies.items()}
    about = {"arch": "x", "caption": "y", "device": "z", "jax": "1"}
    (row,) = running_averages.table({**about, "nets": nets}).rows
    assert row[0] == "2"
    assert row[-2].startswith("+10.00")
    assert row[-1].startswith("+15.00 (")


def test_corruptions_by_hand():
    images = np.full((2, 32, 32, 3), 100, np.uint8)
    images[1, :, 16:] = 200
    corrupted = probes.corrupt(images)
    assert {pixels.dtype for pixels in corrupted.values()} == {np.dtype(np.uint8)}
    assert {pixels.shape for pixels in corrupted.values()} == {images.shape}
    np.testing.assert_array_equal(corrupted["bright"], np.where(images == 200, 255, 160))
    for name in ("blur", "coarse pixels", "low contrast"):
        np.testing.assert_array_equal(corrupted[name][0], images[0])
    assert corrupted["blur"][1, 5, 14:18, 0].tolist() == [100, 133, 167, 200]
    dot = np.zeros((1, 32, 32, 3), np.uint8)
    dot[0, 10, 20] = 90
    blurred = np.zeros((32, 32), np.uint8)
    blurred[9:12, 19:22] = 10
    np.testing.assert_array_equal(probes.corrupt(dot)["blur"][0, :, :, 0], blurred)
    np.testing.assert_array_equal(corrupted["coarse pixels"][1], images[1])
    assert set(corrupted["low contrast"][1].ravel()) == {130, 170}
    assert 19 < (corrupted["noise"].astype(float) - images).std() < 21
    np.testing.assert_array_equal(probes.corrupt(images)["noise"], corrupted["noise"])


def test_similarity_is_the_mean_cosine_of_two_images():
    one, other = np.zeros((2, 2, 2, 3), np.float32)
    one[0, 0, 0], other[0, 0, 0], other[1, 1, 1] = 2, 3, 3
    negative = one - 5 * (one == 0)  # ReLU takes it away
    cosine = 1 / 2**0.5
    value = probes.similarity(np.stack([one, negative, other]))
    assert value == pytest.approx((1 + 2 * cosine) / 3)
    dead = -np.ones_like(one)
    value = probes.similarity(np.stack([dead, one, dead, negative, other]))
    assert value == pytest.approx((1 + 2 * cosine) / 3)
    assert probes.similarity(np.stack([dead, one, dead])) == 1


def test_a_run_records_what_its_nets_do(tiny_run, tiny):
    run = Run(tiny_run)
    by_norm = run.probes(PROBES)
    measured, group = by_norm["batch"][3], by_norm["group"][3]
    program, state = runner.load_state(tiny_run.path, "batch", 3)
    assert list(measured["layers"]) == ["C1"]
    assert list(measured["kernels"]) == ["C1", "c11"]
    assert list(measured["sizes"]) == [4, 16]  # no more than the 22 test images
    activations, _ = probes.look(program, state, tiny.train_images, tiny.train_labels)
    before, after = activations["C1"]
    np.testing.assert_allclose(measured["before"][0], [before.mean(), before.std()], atol=1e-5)
    np.testing.assert_allclose(measured["after"][0], [after.mean(), after.std()], atol=1e-5)
    assert measured["tested"] == 16  # what every batch size divides
    correct = (run.predictions["batch", 3].predicted == tiny.test_labels)[:16]
    assert measured["running_accuracy"] == pytest.approx(correct.mean())
    initial = init(program, tiny, 3)
    for row, net_state in zip(measured["similarities"], (initial, state), strict=True):
        activations, _ = probes.look(program, net_state, tiny.train_images, tiny.train_labels)
        (_, after) = activations["C1"]
        assert row[0] == pytest.approx(probes.similarity(np.asarray(after)), rel=1e-4)
    predicted = probes._logits(program, ONE, 22, state, tiny.test_images[:16]).argmax(1)
    assert measured["running_accuracy"] == pytest.approx(
        (predicted == tiny.test_labels[:16]).mean()
    )
    assert "mirrored_accuracy" not in measured  # it was not trained on mirrored images
    assert len(measured["corruptions"]) == len(measured["corrupted_accuracy"]) == 5
    assert group["precise_accuracy"] == group["running_accuracy"]
    assert (group["batch_accuracy"] == group["running_accuracy"]).all()


def test_mirror_images_are_averaged_with_the_images_by_their_logits(tiny):
    program, state = net("layer", tiny)
    program = dataclasses.replace(program, augments=True)

    def logits_of(images):
        standard = train.standardize(state, jnp.asarray(images))
        return np.asarray(program.model.apply(state.variables, standard))

    own, mirrored = logits_of(tiny.test_images), logits_of(tiny.test_images[:, :, ::-1])
    guess = (mirrored - own).argmax(1)  # so that the mirror images decide
    data = dataclasses.replace(tiny, test_labels=guess.astype(np.int32))
    trained = SimpleNamespace(state=state, logits=-own)
    assert probes.measure(program, trained, data, 1)["mirrored_accuracy"] == 1


def test_the_mirror_table_gains_over_the_same_nets(tiny_run, monkeypatch):
    run = Run(tiny_run)
    assert tables.mirrored(run).rows == []
    last = run.summaries["batch"][3].last
    measured = {"batch": {3: {"mirrored_accuracy": np.float32(last + 0.05)}}}
    monkeypatch.setattr(Run, "probes", lambda self, shapes: measured)
    ((norm, n, one, both, gain),) = tables.mirrored(run).rows
    assert (norm, n, one, gain) == ("batch", "1", f"{last:.2%}", "+5.00")
    assert both == f"{last + 0.05:.2%}"
