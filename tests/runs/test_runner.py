"""Training into memory and into a run directory: records, checkpoint, and what is refused."""

import dataclasses
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    StopAfter,
    Stopped,
    difference,
    epochs_of,
    logits_of,
    losses_of,
    refusal,
    run,
    train,
    without_times,
)

import jaxnorm
from jaxnorm.analysis import stats
from jaxnorm.config import Config, product, study
from jaxnorm.data import datasets as data
from jaxnorm.runs import runner
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import epoch as epochs
from jaxnorm.training import experiment
from jaxnorm.training import mesh as meshes
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.fit import Callback
from jaxnorm.training.mesh import ONE, MeshShape
from jaxnorm.training.selfcheck import self_check

BASE = {"norm": "layer", "arch": "three-layers", "dataset": "tiny", "epochs": 2}
"""70 images in batches of 35 and 70: none is ragged, and fewer programs are compiled."""


class Diary(Callback):
    """Writes down what it hears."""

    def __init__(self):
        self.heard = []

    def on_start(self, norm, seeds, steps):
        self.heard.append((norm, seeds, steps))

    def on_steps(self, epoch, done):
        self.heard.append((epoch, done))

    def on_epoch(self, config, epoch):
        self.heard.append(epoch)


def test_a_run_directory_holds_what_the_design_says(tiny_run, tiny):
    names = {path.relative_to(tiny_run.path).as_posix() for path in tiny_run.path.rglob("*")}
    kept = ("state-1.msgpack", "state-2.msgpack", "metrics.jsonl", "probes.npz", "result.npz")
    norms = ("batch", "group", "layer")
    assert {"run.json", *(f"nets/{norm}-3/{name}" for norm in norms for name in kept)} <= names
    info = tiny_run.info()
    assert info.parameters == dict.fromkeys(norms, 132)
    assert info.dataset.fingerprint == tiny.fingerprint
    assert {"jax", "jaxlib", "flax", "python"} <= info.environment.versions.keys()


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_records_agree_with_each_other(tiny_run, tiny, norm):
    epochs = [epoch for epoch in epochs_of(tiny_run) if epoch.norm == norm]
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    losses = losses_of(tiny_run, (norm, 3)).reshape(2, 5)
    chex.assert_type(losses, np.float32)
    for epoch, epoch_losses in zip(epochs, losses, strict=True):
        wanted = np.average(epoch_losses, weights=[16, 16, 16, 16, 6])
        np.testing.assert_allclose(epoch.train_loss, wanted, rtol=1e-6)
        assert round(epoch.train_accuracy * 70, 9).is_integer()
    logits, labels = logits_of(tiny_run, (norm, 3)), tiny.test_labels
    chex.assert_shape(logits, (22, 4))
    probabilities = stats.probabilities(logits)[np.arange(22), labels]
    np.testing.assert_allclose(epochs[-1].test_loss, -np.log(probabilities).mean(), rtol=1e-5)
    assert epochs[-1].test_accuracy == (logits.argmax(1) == labels).mean()


def test_a_loaded_model_predicts_what_the_run_did(tiny_run, tiny):
    for norm in ("batch", "layer"):
        predict = runner.load_model(tiny_run.path, norm, 3)
        probabilities = predict(tiny.test_images)
        chex.assert_shape(probabilities, (22, 4))
        chex.assert_type(probabilities, jnp.float32)
        wanted = stats.probabilities(logits_of(tiny_run, (norm, 3)))
        np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
        images = tiny.test_images
        for wrong in (images[0], images / 255, images[:, :28], images[:1].tolist()):
            with pytest.raises(ValueError, match=r"u8\[N, 32, 32, 3\]"):
                predict(wrong)
        one = predict(tiny.test_images[5:6])
        np.testing.assert_allclose(one[0], probabilities[5], atol=1e-6)


def test_a_model_that_is_not_there_is_refused(tiny_run, scratch):
    for norm, seed in (("batch", 4), ("rms", 3), ("../x", 3)):
        assert "has no checkpoint" in refusal(runner.load_model, tiny_run.path, norm, seed)
    assert "not a run directory" in refusal(runner.load_model, scratch, "batch", 3)
    assert "cannot be read" in refusal(runner.load_model, "a\0b", "batch", 3)


def test_fit_is_the_run_without_the_disk_and_repeats_bit_for_bit(tiny_run, tiny, monkeypatch):
    monkeypatch.setattr(RunDirectory, "write_bytes", None)
    config = dataclasses.replace(tiny_run.info().config, norm="group")
    diary = Diary()
    fitted = jaxnorm.fit(config, tiny, [diary])["group", 3]
    recorded = [epoch for epoch in epochs_of(tiny_run) if epoch.norm == "group"]
    assert list(map(without_times, fitted.epochs)) == list(map(without_times, recorded))
    np.testing.assert_array_equal(fitted.step_losses, losses_of(tiny_run, ("group", 3)))
    np.testing.assert_array_equal(fitted.logits, logits_of(tiny_run, ("group", 3)))
    probabilities = fitted.predict(tiny.test_images)
    np.testing.assert_allclose(probabilities, stats.probabilities(fitted.logits), atol=1e-6)
    steps = [(epoch, done) for epoch in (1, 2) for done in (1, 2, 3, 4, 5)]
    heard = [("group", [3], 5), *steps[:5], fitted.epochs[0], *steps[5:], fitted.epochs[1]]
    assert diary.heard == heard


def test_a_run_whose_batches_were_shared_by_devices_is_a_run_like_any_other(tiny, scratch):
    config = Config("batch", "three-layers", "tiny", 1, 70)
    assert meshes.choose(1, config.batch_size).batch == 2
    directory = run(config, tiny, scratch / "run", measures=False)
    logits = logits_of(directory, ("batch", 1))
    assert losses_of(directory, ("batch", 1)).shape == (1,)
    probabilities = runner.load_model(directory.path, "batch", 1)(tiny.test_images)
    np.testing.assert_allclose(probabilities, stats.probabilities(logits), atol=1e-6)


def test_an_epochs_line_comes_before_the_probes(tiny, scratch):
    heard = []

    class Order(Callback):
        def on_epoch(self, config, epoch):
            heard.append("epoch")

        def on_measuring(self, done, total):
            heard.append("measuring")

    config = Config("batch", "three-layers", "tiny", 1, 16, seed=3)
    run(config, tiny, scratch, [Order()], MeshShape(1, 2))
    assert heard == ["epoch", *4 * ["measuring"]]


def test_a_seed_of_a_sweep_is_that_seed_alone_bit_for_bit(tiny_run, tiny):
    config = dataclasses.replace(tiny_run.info().config, norm="group", seed=2, seeds=2)
    fits = jaxnorm.fit(config, tiny)
    assert list(fits) == [("group", 2), ("group", 3)]
    np.testing.assert_array_equal(fits["group", 3].step_losses, losses_of(tiny_run, ("group", 3)))
    np.testing.assert_array_equal(fits["group", 3].logits, logits_of(tiny_run, ("group", 3)))
    assert (fits["group", 2].step_losses != fits["group", 3].step_losses).all()


def test_a_weight_decay_of_a_sweep_is_that_of_the_run_alone(tiny, scratch):
    base = {**BASE, "epochs": 1, "batch_size": 35}
    configs = product(study, base, {"weight_decay": (0.0, 0.5)})
    sweep = Sweep(scratch / "s", configs)
    train(sweep, tiny, mesh=MeshShape(seed=2))
    losses = [losses_of(directory, ("layer", 1)) for directory in sweep.directories]
    assert losses[0][-1] != losses[1][-1]
    for config, of_sweep in zip(configs, losses, strict=True):
        alone = jaxnorm.fit(config, tiny, mesh=ONE)["layer", 1]
        np.testing.assert_array_equal(of_sweep, alone.step_losses)


def test_seeds_that_train_in_one_program_are_the_seeds_alone(tiny, scratch, monkeypatch):
    norm = "batch"  # whose statistics must not mix the seeds
    config = Config(
        norm, "three-layers", "tiny", 1, 35, learning_rate=0.001, seed=3, seeds=3, validation=22
    )
    alone = jaxnorm.fit(config, tiny, mesh=ONE)
    monkeypatch.setattr(epochs, "nets_at_once", lambda program, batch_size: 2)
    diary = Diary()
    directory = run(config, tiny, scratch / "run", [diary], ONE, measures=False)
    # the second in a program of two places
    started = [heard for heard in diary.heard if isinstance(heard, tuple) and heard[0] == norm]
    assert started == [(norm, [3, 4], 2), (norm, [5], 2)]
    lines = {epoch.seed: epoch for epoch in epochs_of(directory)}
    for seed in config.seed_numbers:
        fit = alone[norm, seed]
        np.testing.assert_allclose(losses_of(directory, (norm, seed)), fit.step_losses, rtol=2e-4)
        np.testing.assert_allclose(logits_of(directory, (norm, seed)), fit.logits, atol=2e-3)
        for field in ("train_loss", "test_loss", "validation_loss"):
            mine, wanted = (getattr(one, field) for one in (lines[seed], fit.epochs[0]))
            assert mine == pytest.approx(wanted, rel=1e-3)
        predicted = runner.load_model(directory.path, norm, seed)(tiny.test_images)
        np.testing.assert_allclose(predicted, fit.predict(tiny.test_images), atol=2e-3)


def test_held_out_images_are_evaluated_and_never_trained_on(tiny):
    """Nor have they a part in the mean and deviation: spoiled, they change nothing of the net."""
    config = Config("batch", "three-layers", "tiny", 1, 35, validation=22)
    rows, held = data.hold_out(tiny.train_labels, 22, seed=1)
    fit = jaxnorm.fit(config, tiny, mesh=ONE)["batch", 1]
    assert fit.step_losses.shape == (2,)  # of 48 images
    (epoch,) = fit.epochs
    probabilities = np.asarray(fit.predict(tiny.train_images[held]))
    correct = probabilities.argmax(1) == tiny.train_labels[held]
    assert epoch.validation_accuracy == correct.mean()
    losses = -np.log(probabilities[np.arange(22), tiny.train_labels[held]])
    assert epoch.validation_loss == pytest.approx(losses.mean(), rel=1e-5)
    spoiled = tiny.train_images.copy()
    spoiled[held] = 255
    data_of_255 = dataclasses.replace(tiny, train_images=spoiled)
    other = jaxnorm.fit(config, data_of_255, mesh=ONE)["batch", 1]
    np.testing.assert_array_equal(other.step_losses, fit.step_losses)
    assert other.epochs[0].validation_loss != epoch.validation_loss
    mean, deviation = data.channel_statistics(tiny.train_images[rows])
    np.testing.assert_allclose(other.state.standard[0], 255 * np.array(mean), rtol=1e-6)
    np.testing.assert_allclose(other.state.standard[1], 1 / (255 * np.array(deviation)), rtol=1e-6)


def test_what_cannot_be_trained_is_refused_before_training(tiny):
    many = dataclasses.replace(tiny, class_names=tuple(map(str, range(200))))
    for config, dataset, message in (
        (Config(batch_size=71), tiny, "batch_size=71 is larger than the 70"),
        (Config(batch_size=61, validation=10), tiny, "of which 10 are held out"),
        (Config(batch_size=1, validation=70), tiny, "validation=70 leaves none"),
        (Config(norm="group", batch_size=7, groups=3), tiny, "groups=3"),
        (Config(batch_size=7, precision="tf32"), tiny, "precision=tf32 needs an NVIDIA GPU"),
        (Config(batch_size=7), many, "51,856 parameters"),
        (Config(batch_size=7), many, "allow_large"),
    ):
        assert message in refusal(experiment.check, config, dataset)
    counts = experiment.check(Config(batch_size=7, allow_large=True), many)
    assert counts == {"batch": 51_856, "group": 51_856, "layer": 52_492}


def test_the_public_names_are_there():
    for name in jaxnorm.__all__:
        assert getattr(jaxnorm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jaxnorm.nonsense


def test_a_sweep_that_is_killed_while_it_grows_goes_on_growing(tiny, scratch):
    configs = product(study, {**BASE, "batch_size": 35}, {"learning_rate": (0.01, 0.002)})
    train(Sweep(scratch / "s", configs), tiny)
    grown = [dataclasses.replace(config, seeds=2) for config in configs]
    with pytest.raises(Stopped):
        train(Sweep(scratch / "s", grown), tiny, [StopAfter(1)])
    sweep = Sweep.open(scratch / "s")  # as `--resume` without any other flag
    assert sweep.configs == grown
    fewer = Sweep(scratch / "s", configs)
    assert "seeds=1 conflicts with the run" in refusal(train, fewer, tiny)
    assert Sweep.open(scratch / "s").configs == grown
    train(sweep, tiny)
    assert [len(epochs_of(directory)) for directory in sweep.directories] == [4, 4]


def test_a_sweep_stopped_twice_trains_nothing_twice(tiny, scratch):
    """And each of its runs is the run alone, bit for bit."""
    configs = product(study, BASE, {"batch_size": (35, 70), "learning_rate": (0.01, 0.002)})
    sweep = Sweep(scratch / "s", configs)
    heard, lines = [], {}
    for stop in (3, 2, 99):
        callback = StopAfter(stop)
        try:
            train(sweep, tiny, [callback])
        except Stopped:
            assert stop < 99
        heard += callback.heard
        for directory in sweep.directories:
            for epoch in epochs_of(directory) if directory.exists() else ():
                key = directory.path.name, epoch.epoch
                assert lines.setdefault(key, epoch) == epoch  # its times too
    assert len(heard) == 8
    assert all((config, epoch) in heard for config in configs for epoch in (1, 2))
    assert len(lines) == 8
    # Alone, the two devices do not share its batches of 35: they cannot be halved.
    alone = run(configs[1], tiny, scratch / "alone", measures=False)
    assert difference(sweep.directories[1], alone) == ""
    losses = [losses_of(directory, ("layer", 1)) for directory in sweep.directories]
    assert losses[0][0] == losses[1][0]
    assert (losses[0][1:] != losses[1][1:]).all()


def test_a_net_whose_loss_is_not_finite_is_left_out_and_the_others_go_on(tiny, scratch):
    rates = {"batch_size": (35,), "learning_rate": (0.01, 1e30)}
    sweep = Sweep(scratch / "s", product(study, BASE, rates))
    callback = StopAfter(99)
    train(sweep, tiny, [callback])
    (warning,) = callback.warnings
    assert "batch size 35, learning rate 1e+30: the training loss of layer norm" in warning
    assert [len(epochs_of(directory)) for directory in sweep.directories] == [2, 0]


def test_bfloat16_trains_near_float32_and_is_recorded(tiny, scratch):
    config = Config("layer", "three-layers", "tiny", 1, 35)
    low = dataclasses.replace(config, precision="bfloat16")
    self_check(Experiment([low], tiny, ONE))
    directory = run(low, tiny, scratch / "run", mesh=ONE, measures=False)
    assert directory.info().config.precision == "bfloat16"
    losses = losses_of(directory, ("layer", 1))
    wanted = jaxnorm.fit(config, tiny, mesh=ONE)["layer", 1].step_losses
    assert (losses != wanted).all()
    np.testing.assert_allclose(losses, wanted, rtol=0.02)
    _, state = runner.load_state(directory.path, "layer", 1)
    assert state.params["C1"]["kernel"].dtype == np.float32


def test_a_schedule_that_ends_does_not_grow_by_epochs():
    ends = Config("layer", "three-layers", "tiny", 3, 16, schedule="one-cycle")
    runner.check_grown(ends, dataclasses.replace(ends, seeds=5), Path("x"))
    said = refusal(runner.check_grown, ends, dataclasses.replace(ends, epochs=9), Path("x"))
    assert "the one-cycle learning rate of the run in x ends with" in said
    relaxes = Config("layer,renorm", "matched")
    said = refusal(runner.check_grown, relaxes, dataclasses.replace(relaxes, epochs=29), Path("x"))
    assert "the limits of renorm norm of the run in x are for epochs" in said
