"""Training into memory and into a run directory: the records, the checkpoint, and what stops it."""

import dataclasses
import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import data, devices, experiment, stats, train
from jaxnorm.config import Config, UserError
from jaxnorm.devices import ONE
from jaxnorm.observers import Observer
from jaxnorm.records import RunDirectory


class Diary(Observer):
    """Writes down what it hears."""

    def __init__(self):
        self.heard = []

    def on_nets(self, norm, seeds, steps):
        self.heard.append((norm, seeds, steps))

    def on_steps(self, epoch, done):
        self.heard.append((epoch, done))

    def on_epoch(self, epoch):
        self.heard.append(epoch)


def without_times(epoch):
    return dataclasses.replace(epoch, train_seconds=0.0, test_seconds=0.0)


def test_a_run_directory_holds_what_the_design_says(tiny_run, tiny):
    names = {path.relative_to(tiny_run.path).as_posix() for path in tiny_run.path.rglob("*")}
    for norm in ("batch", "group", "layer"):
        assert {f"step_losses/{norm}-3.npy", f"predictions/{norm}-3.npz"} <= names
        kept = sorted(path.name for path in tiny_run.checkpoints(norm, 3).iterdir())
        assert kept == ["1", "2"]
    assert {"run.json", "metrics.jsonl", "effects/batch-3.npz"} <= names
    info = tiny_run.info()
    assert info.parameters == {"batch": 45_584, "group": 45_584, "layer": 46_220}
    assert info.dataset["fingerprint"] == tiny.fingerprint
    assert {"jax", "jaxlib", "flax", "python"} <= info.versions.keys()
    line = json.loads((tiny_run.path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == [
        *("norm", "seed", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("train_seconds", "test_seconds"),
    ]


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_records_agree_with_each_other(tiny_run, norm):
    epochs = [epoch for epoch in tiny_run.epochs() if epoch.norm == norm]
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    losses = tiny_run.step_losses(norm, 3).reshape(2, 5)
    chex.assert_type(losses, np.float32)
    for epoch, each in zip(epochs, losses, strict=True):
        wanted = np.average(each, weights=[16, 16, 16, 16, 6])
        np.testing.assert_allclose(epoch.train_loss, wanted, rtol=1e-6)
        assert round(epoch.train_accuracy * 70, 9).is_integer()
    logits, labels = tiny_run.predictions(norm, 3)
    chex.assert_shape(logits, (22, 4))
    probabilities = stats.probabilities(logits)[np.arange(22), labels]
    np.testing.assert_allclose(epochs[-1].test_loss, -np.log(probabilities).mean(), rtol=1e-5)
    assert epochs[-1].test_accuracy == (logits.argmax(1) == labels).mean()


def test_a_loaded_model_predicts_what_the_run_did(tiny_run, tiny):
    for norm in ("batch", "layer"):
        predict = jaxnorm.load_model(tiny_run.path, norm, 3)
        probabilities = predict(tiny.test_images)
        chex.assert_shape(probabilities, (22, 4))
        chex.assert_type(probabilities, jnp.float32)
        wanted = stats.probabilities(tiny_run.predictions(norm, 3)[0])
        np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
        for wrong in (tiny.test_images[0], tiny.test_images / 255, tiny.test_images[:, :28]):
            with pytest.raises(ValueError, match=r"u8\[N, 32, 32, 3\]"):
                predict(wrong)
        one = predict(tiny.test_images[5:6])
        np.testing.assert_allclose(one[0], probabilities[5], atol=1e-6)


def test_a_model_that_is_not_there_is_refused(tiny_run, scratch):
    for norm, seed in (("batch", 4), ("rms", 3), ("../x", 3)):
        with pytest.raises(UserError, match="has no checkpoint"):
            jaxnorm.load_model(tiny_run.path, norm, seed)
    with pytest.raises(UserError, match="not a run directory"):
        jaxnorm.load_model(scratch, "batch", 3)


def test_fit_is_the_run_without_the_disk_and_repeats_bit_for_bit(tiny_run, tiny, monkeypatch):
    monkeypatch.setattr(RunDirectory, "write_bytes", None)
    config = dataclasses.replace(tiny_run.info().config, norm="group")
    diary = Diary()
    fitted = jaxnorm.fit(config, tiny, diary)["group", 3]
    recorded = [epoch for epoch in tiny_run.epochs() if epoch.norm == "group"]
    assert list(map(without_times, fitted.epochs)) == list(map(without_times, recorded))
    np.testing.assert_array_equal(fitted.step_losses, tiny_run.step_losses("group", 3))
    np.testing.assert_array_equal(fitted.logits, tiny_run.predictions("group", 3)[0])
    probabilities = fitted.predict(tiny.test_images)
    np.testing.assert_allclose(probabilities, stats.probabilities(fitted.logits), atol=1e-6)
    steps = [(epoch, done) for epoch in (1, 2) for done in (1, 2, 3, 4, 5)]
    heard = [("group", [3], 5), *steps[:5], fitted.epochs[0], *steps[5:], fitted.epochs[1]]
    assert diary.heard == heard


def test_a_run_whose_batches_were_shared_by_devices_is_a_run_like_any_other(tiny, scratch):
    config = Config(norm="batch", dataset="tiny", epochs=1, batch_size=70)
    assert devices.choose(1, config.batch).batch == 2
    directory = RunDirectory.create(scratch / "run")
    experiment.run(config, tiny, directory, "x")
    logits, _ = directory.predictions("batch", 1)
    assert directory.step_losses("batch", 1).shape == (1,)
    probabilities = jaxnorm.load_model(directory.path, "batch", 1)(tiny.test_images)
    np.testing.assert_allclose(probabilities, stats.probabilities(logits), atol=1e-6)


def test_another_seed_is_another_run(tiny_run, tiny):
    config = dataclasses.replace(tiny_run.info().config, norm="group", seed=4, epochs=1)
    losses = jaxnorm.fit(config, tiny)["group", 4].step_losses
    assert (losses != tiny_run.step_losses("group", 3)[:5]).all()


def test_a_seed_of_a_sweep_is_that_seed_alone_bit_for_bit(tiny_run, tiny):
    config = dataclasses.replace(tiny_run.info().config, norm="group", seed=2, seeds=2)
    fits = jaxnorm.fit(config, tiny)
    assert list(fits) == [("group", 2), ("group", 3)]
    np.testing.assert_array_equal(fits["group", 3].step_losses, tiny_run.step_losses("group", 3))
    np.testing.assert_array_equal(fits["group", 3].logits, tiny_run.predictions("group", 3)[0])
    assert (fits["group", 2].step_losses != fits["group", 3].step_losses).all()


def test_seeds_that_train_in_one_program_are_the_seeds_alone(tiny, scratch, monkeypatch):
    norm = "batch"  # whose statistics must not mix the seeds
    config = Config(
        norm, "matched", "tiny", 1, 16, learning_rate=0.001, seed=3, seeds=3, validation=6
    )
    alone = jaxnorm.fit(config, tiny, layout=ONE)
    monkeypatch.setattr(train, "nets_at_once", lambda recipe, batch_size: 2)
    diary = Diary()
    directory = RunDirectory.create(scratch / "run")
    experiment.run(config, tiny, directory, "x", diary, ONE)
    assert [heard for heard in diary.heard if heard in ((norm, [3, 4], 4), (norm, [5], 4))] == [
        *((norm, [3, 4], 4), (norm, [5], 4))  # the second in a program of two places
    ]
    epochs = {(epoch.seed, epoch.epoch): epoch for epoch in directory.epochs()}
    assert len(epochs) == 3
    for seed in config.seed_numbers:
        fit = alone[norm, seed]
        np.testing.assert_allclose(directory.step_losses(norm, seed), fit.step_losses, rtol=2e-4)
        np.testing.assert_allclose(directory.predictions(norm, seed)[0], fit.logits, atol=2e-3)
        for epoch in fit.epochs:
            both = epochs[seed, epoch.epoch], epoch
            for field in ("train_loss", "test_loss", "validation_loss"):
                mine, wanted = (getattr(each, field) for each in both)
                assert mine == pytest.approx(wanted, rel=1e-3)
        images = tiny.test_images
        predicted = jaxnorm.load_model(directory.path, norm, seed)(images)
        np.testing.assert_allclose(predicted, fit.predict(images), atol=2e-3)


def test_held_out_images_are_evaluated_and_never_trained_on(tiny, scratch):
    config = Config("group", "matched", "tiny", 1, 29, validation=12)
    _, held = data.hold_out(tiny.train_labels, 12, seed=1)
    fit = jaxnorm.fit(config, tiny)["group", 1]
    assert fit.step_losses.shape == (2,)  # of 58 images
    (epoch,) = fit.epochs
    probabilities = np.asarray(fit.predict(tiny.train_images[held]))
    right = probabilities.argmax(1) == tiny.train_labels[held]
    assert epoch.validation_accuracy == right.mean()
    losses = -np.log(probabilities[np.arange(12), tiny.train_labels[held]])
    assert epoch.validation_loss == pytest.approx(losses.mean(), rel=1e-5)
    spoiled = tiny.train_images.copy()
    spoiled[held] = 255
    other = jaxnorm.fit(config, dataclasses.replace(tiny, train_images=spoiled))["group", 1]
    np.testing.assert_array_equal(other.step_losses, fit.step_losses)
    assert other.epochs[0].validation_loss != epoch.validation_loss


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(tiny, scratch):
    config = Config(norm="group", dataset="tiny", epochs=2, batch_size=16, learning_rate=1e30)
    directory = RunDirectory.create(scratch / "run")
    with pytest.raises(experiment.NonFiniteLoss, match=r"seed 1.*epoch 1, step [1-5]") as error:
        experiment.run(config, tiny, directory, "x")
    assert error.value.epoch == 1
    assert error.value.step <= 5
    assert directory.epochs() == []


def test_what_cannot_be_trained_is_refused_before_training(tiny):
    with pytest.raises(UserError, match="--batch-size 71 is larger than the 70"):
        experiment.check(Config(batch_size=71), tiny)
    with pytest.raises(UserError, match="of which 10 are held out"):
        experiment.check(Config(batch_size=61, validation=10), tiny)
    with pytest.raises(UserError, match="--validation 70 leaves none"):
        experiment.check(Config(batch_size=1, validation=70), tiny)
    with pytest.raises(UserError, match="--groups 3"):
        experiment.check(Config(norm="group", batch_size=7, groups=3), tiny)
    many = dataclasses.replace(tiny, class_names=tuple(map(str, range(200))))
    with pytest.raises(UserError, match=r"51,856 parameters.*--allow-large"):
        experiment.check(Config(batch_size=7), many)
    counts = experiment.check(Config(batch_size=7, allow_large=True), many)
    assert counts == {"batch": 51_856, "group": 51_856, "layer": 52_492}


def test_the_public_names_are_there():
    for name in jaxnorm.__all__:
        assert getattr(jaxnorm, name).__module__.startswith("jaxnorm.")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jaxnorm.nonsense
