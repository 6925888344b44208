"""The start-up check: right programs pass, and each wrong operator is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.config import Config, study, tuned
from jaxnorm.data.datasets import load
from jaxnorm.model.cnn import ARCHS, Layer
from jaxnorm.model.fast import norm
from jaxnorm.training import epoch as epochs
from jaxnorm.training import selfcheck
from jaxnorm.training import step as train
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.mesh import ONE, MeshShape

CONFIG = Config(arch="three-layers", dataset="tiny", batch_size=32, epochs=1)
EVEN = dataclasses.replace(CONFIG, norm="layer", batch_size=35)
"""Without a ragged batch, so that fewer programs are compiled."""


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({"norm": "batch"}, MeshShape(batch=2)),
        ({"norm": "layer", "seeds": 2, "validation": 6}, ONE),
        *(
            pytest.param(changes, MeshShape(batch=2), marks=pytest.mark.slow)
            for changes in (
                {"norm": "renorm", "optimizer": "muon"},
                {"norm": "frn", "optimizer": "adamw"},
                {"norm": "dyt,derf", "seeds": 2},
                {"norm": "ghost,evonorm-s0", "batch_size": 14, "ghost_size": 7},
            )
        ),
    ],
)
def test_a_right_installation_passes(tiny, monkeypatch, changes, mesh):
    """Also if devices share a batch, and if two nets in one program are trained in pieces."""
    monkeypatch.setattr(epochs, "nets_at_once", lambda *_: 2)
    selfcheck.self_check(Experiment([dataclasses.replace(CONFIG, **changes)], tiny, mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "arch", "precision"),
    [
        (study, "every-kind", "bfloat16"),
        (tuned, "residual", "float32"),
        (tuned, "attention", "float32"),
        (study, "attending", "bfloat16"),
    ],
)
def test_a_residual_net_passes_on_digits(recipe, arch, precision):
    """Its last batch has 29 images, over which XLA rounds a maximum's input in two ways; and the
    variances behind standardized kernels are near the initial averages.
    """
    config = recipe(norm="batch", arch=arch, dataset="digits", precision=precision)
    selfcheck.self_check(Experiment([config], load("digits")))


@pytest.mark.slow
def test_means_near_zero_and_flat_images_pass(monkeypatch):
    """Kernels that sum to zero over the digits' flat background, in three grey channels; and a
    maximum over many pixels that are the same.
    """
    blocks = (Layer("C1", "block", 4, padding=1), Layer("C2", "block", 8, padding=1))
    net = (*blocks, Layer("GP", "mean-max"), Layer("c3", "head"))
    monkeypatch.setitem(ARCHS, "two-blocks", lambda norm: net)
    config = tuned(norm="batch", arch="two-blocks", dataset="digits", epochs=1, seed=2)
    selfcheck.self_check(Experiment([config], load("digits")))


def test_a_wrong_operator_is_refused(tiny, monkeypatch):
    """A seventh of some sums left out, as jaxlib 0.10.1 once did. The momentum differs because JAX
    keeps what it traced by program.
    """
    sums_of = norm.channel_sums
    monkeypatch.setattr(norm, "channel_sums", lambda *a: [sums * (6 / 7) for sums in sums_of(*a)])
    config = dataclasses.replace(EVEN, momentum=0.81)
    with pytest.raises(selfcheck.WrongNumbers, match="one training step of layer norm") as raised:
        selfcheck.self_check(Experiment([config], tiny))
    assert "off" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_of_three_batches_one_that_agrees_is_enough(tiny, monkeypatch):
    """Two of the first chunk agree badly, and none of the last."""
    answers = iter(["bad", "bad", "", ""])
    monkeypatch.setattr(selfcheck, "_compare_step", lambda *_: next(answers))
    selfcheck.self_check(Experiment([EVEN], tiny))
    assert list(answers) == []


def test_a_wrong_evaluation_is_refused(tiny, monkeypatch):
    """After steps that are right, which are not made here."""
    original = epochs._logits
    monkeypatch.setattr(epochs, "_logits", lambda *arguments: -original(*arguments))
    monkeypatch.setattr(selfcheck, "_compare_step", lambda *_: "")
    config = dataclasses.replace(EVEN, momentum=0.83)
    with pytest.raises(selfcheck.WrongNumbers, match="the evaluation of layer norm"):
        selfcheck.self_check(Experiment([config], tiny))


def test_a_wrong_ragged_batch_is_refused(tiny, monkeypatch):
    """After a full batch that is right, which is not trained on here."""
    step, compare = epochs.train_step, selfcheck._compare_step

    def wrong(*arguments):
        state, loss, correct = step(*arguments)
        return state, loss * 1.1, correct

    def only_the_last(check, group, initial, epoch, batch):
        return batch and compare(check, group, initial, epoch, batch)

    monkeypatch.setattr(epochs, "train_step", wrong)
    monkeypatch.setattr(selfcheck, "_compare_step", only_the_last)
    config = dataclasses.replace(CONFIG, norm="layer", momentum=0.84)
    with pytest.raises(selfcheck.WrongNumbers, match="the loss is 10% off"):
        selfcheck.self_check(Experiment([config], tiny))


def test_a_pass_is_noted_and_no_other_note_is_believed(tiny, monkeypatch, tmp_path):
    """Neither a damaged one, nor that of other programs, nor one made under other flags of XLA."""
    checked = []
    monkeypatch.setattr(selfcheck, "_check_group", lambda *arguments: checked.append(arguments))
    other = dataclasses.replace(EVEN, momentum=0.85)

    def check(config=EVEN, passes=tmp_path, **options):
        made = selfcheck.self_check(Experiment([config], tiny), passes=passes, **options)
        assert made == (len(checked), 1)
        checked.clear()
        return made[0]

    assert check()
    (note,) = tmp_path.iterdir()
    assert not check()
    assert check(passes=None)
    whole = note.read_text()
    assert check(other)
    (foreign,) = set(tmp_path.iterdir()) - {note}
    for text in ("", whole[:-1], whole.replace("passed", "failed"), foreign.read_text()):
        note.write_text(text)
        assert check()
        assert note.read_text() == whole
    assert check(recheck=True)
    assert note.read_text() == whole
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_check_group", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check(recheck=True)
    assert check()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert check()


def test_the_known_miscompilation_is_refused(monkeypatch):
    selfcheck.check_compiler()
    original = jax.jit

    def wrong(function):
        """Leaves the last row out, as jaxlib 0.10.2 does some."""
        return lambda *arguments: original(function)(*arguments).at[-1].set(0)

    monkeypatch.setattr(selfcheck.jax, "jit", wrong)
    with pytest.raises(selfcheck.WrongNumbers, match="sums 1 of 40000 rows wrongly"):
        selfcheck.check_compiler()


def step(loss, params, batch_stats):
    norm_state = {"n": {"mean": jnp.array([1e-7]) * loss, "var": batch_stats}}
    return np.float32(loss), train.TrainState({"c": params}, norm_state, (), ())


@pytest.mark.parametrize(
    ("loss", "params", "batch_stats", "message"),
    [
        (2.0, [1.1, 0.9], [0.10], ""),
        (2.0001, [1.101, 0.9], [0.100001], ""),  # rounding, and one ReLU that flipped
        (2.001, [1.1, 0.9], [0.10], "the loss is 0.05% off"),
        (2.0, [0.9, 1.1], [0.10], "params c is 200% off"),
        (2.0, [1.1, 0.89], [0.10], "params c is 7.07% off"),
        (2.0, [1.1, 0.9], [0.1001], "norm_state n is 0.1% off"),
        (2.0, [np.nan, 0.9], [0.10], "params c is inf% off"),
        (np.nan, [1.1, 0.9], [0.10], "the loss is inf% off"),
    ],
)
def test_what_disagrees_is_named(loss, params, batch_stats, message):
    before = step(0, np.ones(2), np.zeros(1))[1]
    plain = step(2.0, jnp.array([1.1, 0.9]), jnp.array([0.1]))
    ours = step(loss, jnp.array(params), jnp.array(batch_stats))
    assert selfcheck._disagreement(ours, plain, before) == message


def test_counters_are_compared_apart():
    """Far more steps in the state than running averages move by."""
    states = [
        train.TrainState({}, {"n": {"mean": jnp.array([mean]), "step": jnp.int32(count)}}, (), ())
        for mean, count in ((0.0, 900), (0.1, 901), (0.2, 901), (0.1, 900))
    ]
    before, plain, other, late = ((np.float32(1), state) for state in states)
    assert selfcheck._disagreement(plain, plain, before[1]) == ""
    assert selfcheck._disagreement(other, plain, before[1]) == "norm_state n is 100% off"
    assert selfcheck._disagreement(late, plain, before[1]) == "norm_state n step, a count, is off"


def test_running_averages_are_off_by_what_the_batch_adds_to_them():
    """A batch whose variance is 1.01 hardly moves an average of 1: it adds a tenth of 1.01."""
    before, plain, ours = (
        step(2.0, jnp.ones(2), jnp.array([0.9 + 0.1 * variance])) for variance in (1, 1.01, 1.02)
    )
    assert selfcheck._disagreement(ours, plain, before[1], forward=5e-2) == ""
    assert selfcheck._disagreement(ours, plain, before[1]) == "norm_state n is 0.99% off"
