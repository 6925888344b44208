"""Where things go: one of each is added in its one place, and found in Markdown and HTML."""

import dataclasses
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SOON, Evil, call, epochs_of, error_of, init, losses_of, train, write_npz
from matplotlib.figure import Figure

from jaxnorm import config, job, report, run
from jaxnorm.analysis import figures, tables
from jaxnorm.analysis.results import Run
from jaxnorm.config import Config, Norm, UserError
from jaxnorm.data import datasets
from jaxnorm.model import summary
from jaxnorm.model.cnn import CNN
from jaxnorm.runs import runner
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import probes, step
from jaxnorm.training.experiment import Experiment, program_of
from jaxnorm.training.fit import Callback, fit

NET = "three-layers"
"""A net that `nets` adds by one entry in `ARCHS`."""


@pytest.fixture
def own_data(tiny, scratch):
    """The tiny set as a file of the user's own."""
    write_npz(scratch / "mine.npz", tiny)
    return scratch / "mine.npz"


def test_an_own_norm_net_and_data_go_through_run_resume_and_report(
    own_data, scratch, capsys, monkeypatch
):
    path = own_data.rename(scratch / "caf\udce9.npz")  # no UTF-8
    out = scratch / "run"
    settings = ("--norm", "own_norm:OwnNorm", "--arch", NET, "--batch-size", "35")
    flags = (*settings, "--dataset", path, "--skip-self-check")
    monkeypatch.setattr(figures, "FIGURES", (figures.curves,))
    assert call(*flags, "--epochs", "1", "--out", out) == 0
    moved = path.rename(scratch / "moved.npz")
    resume = ("--resume", out, "--epochs", "2", "--skip-self-check")
    assert call(*resume) == call(*resume, "--dataset", "digits") == 2
    missing, other = capsys.readouterr().err.splitlines()
    assert "there is no such file" in missing
    assert "--dataset digits conflicts with the run" in other
    assert call(*resume, "--dataset", moved) == 0
    assert "own_norm:OwnNorm  epoch  2/2" in capsys.readouterr().out
    assert call(out, app=report.app) == 0
    assert [epoch.epoch for epoch in epochs_of(RunDirectory(out))] == [1, 2]
    ((name, of_layers),) = runner.load_state(out, "own_norm:OwnNorm", 1)[1].norm_state.items()
    assert name == "largest"
    assert (np.asarray(of_layers["C1_norm"]["value"]) != 1).all()
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        assert "OwnNorm" in text
        assert r"the file caf\udce9.npz" in text.replace("\\\\", "\\")
        assert "three-layers nets" in text


def test_a_new_norm_is_a_class_and_its_row(own_data, scratch, capsys, monkeypatch):
    """It is in the help, and trained and reported like any other."""
    row = Norm("pairs, for a test", "own_norm:PairNorm", activates=True)
    monkeypatch.setitem(config.NORMS, "pair", row)
    assert "pair: pairs, for a test." in config.norms_help().splitlines()
    code = """if True:
        from jaxnorm import config
        config.NORMS["pair"] = config.Norm("pairs, for a test", "own_norm:PairNorm")
        from jaxnorm import cli, run
        cli.run(run.app, ["--help"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert " pair: pairs, for a test." in done.stdout
    flags = ("--norm", "layer,pair", "--arch", NET, "--dataset", own_data, "--batch-size", "35")
    flags += ("--epochs", "1", "--skip-self-check")
    assert call(*flags, "--out", scratch / "run") == 0
    assert "pair  epoch  1/1" in capsys.readouterr().out
    finished = Run(RunDirectory(scratch / "run"))
    for table in (tables.results, tables.classes, tables.parameters):
        assert "pair" in table(finished).plain()
    drawn = {name for figures_of in figures.FIGURES for name, _ in figures_of(finished)}
    assert {"curves-pair", "confusion-pair"} <= drawn
    for page in ("report.md", "report.html"):
        text = (scratch / "run" / page).read_text()
        assert "activation differ: pair has an activation of its own" in text
        assert "curves-pair" in text or "pair norm: " in text


def test_an_own_norm_is_compared_with_another_by_seed(sweep):
    accuracies = dict.fromkeys(("layer", "own_norm:OwnNorm"), ((11, 16), (13, 18)))
    directory = sweep(accuracies=accuracies, norm=",".join(accuracies), arch=NET, seeds=2)
    (pair,) = Run(directory).differences
    assert (pair.first, pair.second, pair.sample.n) == ("layer", "own_norm:OwnNorm", 2)
    text = tables.differences(Run(directory)).markdown()
    assert rf"| layer {tables.MINUS} own\_norm:OwnNorm | 2 |" in text


def test_a_norm_may_wrap_or_inherit_from_flaxs_batch_norm(tiny):
    """Both are Flax's batch norm, so they end alike; what they average is not computed again."""
    wrapped, inherited = ("own_norm:WrappedNorm", "own_norm:InheritedNorm")
    fits = fit(Config(f"{wrapped},{inherited}", NET, "tiny", 1, 35), tiny)
    one, other = (fits[norm, 1] for norm in (wrapped, inherited))
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    (averages,) = one.state.norm_state["batch_stats"].values()
    assert (np.asarray(averages["BatchNorm_0"]["mean"]) != 0).all()
    measured = probes.measure(one.program, one, tiny, 1)
    assert measured["precise_accuracy"] == measured["running_accuracy"]


def test_a_norm_that_draws_in_training_is_measured_inside(tiny):
    norm = "own_norm:DroppingNorm"
    net = fit(Config(norm, NET, "tiny", 1, 35), tiny)[norm, 1]
    measured = probes.measure(net.program, net, tiny, 1)
    assert np.isfinite(measured["gradients"]).all()


SHAPE = "it must map f32[N, H, W, C] to the same shape"


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ("own_norm:FlatNorm", f"makes float32[1, 3600] of float32[1, 30, 30, 4]: {SHAPE}"),
        ("own_norm:HalfPrecision", "makes bfloat16[1, 30, 30, 4] of float32[1, 30, 30, 4]"),
        ("own_norm:DropsTheBatch", f"of float32[2, 30, 30, 4]: {SHAPE}"),
        ("own_norm:OneImage", f"{SHAPE}, for any N (TypeError: cannot reshape"),
        ("own_norm:StateOfTheBatch", "C1_norm/means from float32[1] to float32[2]: a variable"),
        ("own_norm:Sows", "to float32[]: a variable must keep its shape and dtype"),
        ("own_norm:IntegerParameter", "parameter C1_norm/scale int32[]: it must be float32"),
        ("own_norm:KeyAsState", "keeps a random key, noise/C1_norm/key"),
        ("own_norm:NoGradient", "cannot be applied and differentiated"),
        ("own_norm:TrainField", "takes train, which is never set: give it a field use_running_a"),
        ("own_norm:RunningArgument", "takes use_running_average, which is never set"),
        ("own_norm:NoisyNorm", 'needs PRNG for "dropout"'),
        ("own_norm:Missing", "cannot be imported"),
        ("own_norm:nn", "is no flax.linen.Module"),
        ("missing_module:Norm", "start Python in the folder of its module"),
        ("weight", "choose batch, group, layer, pixel, instance, rms, none"),
    ],
)
def test_a_wrong_norm_is_one_line_that_says_what_is_expected(norm, message, scratch, capsys):
    assert call("--norm", norm, "--arch", NET, "--out", scratch / "x") == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize("norm", ["OwnNorm", "WrappedNorm", "PairNorm", "SowsAside", "Counts"])
def test_a_right_norm_passes(norm):
    assert summary.count_parameters(CNN(f"own_norm:{norm}", NET))


MINE = """
import flax.linen as nn

class Mine(nn.Module):
    @nn.compact
    def __call__(self, x):
        return doubled(x)

def doubled(x):
    return x * 2
"""
CHANGED = ("doubled(x)\n\n", "doubled(x) + 1\n\n")


@pytest.fixture
def run_of_mine(sweep, scratch, monkeypatch):
    """A run of `Mine`, of a module that the test may change."""
    monkeypatch.syspath_prepend(scratch)
    (scratch / "mine.py").write_text(MINE)
    yield sweep(accuracies={"mine:Mine": ((11, 16),)}, norm="mine:Mine", arch=NET, seeds=1)
    sys.modules.pop("mine", None)


def change_mine(scratch, old, new):
    sys.modules.pop("mine", None)
    (scratch / "mine.py").write_text(MINE.replace(old, new))


def test_a_run_takes_no_other_norm_under_the_name_of_its_own(run_of_mine, tiny, scratch, capsys):
    more = dataclasses.replace(run_of_mine.info().config, seeds=2)
    before = run_of_mine.read_bytes("run.json")
    change_mine(scratch, *CHANGED)
    with pytest.raises(UserError, match="source has changed since; put it back, or start a new"):
        train(Sweep(run_of_mine.path, [more]), tiny)
    assert call("--resume", run_of_mine.path, "--seeds", "2") == 2
    assert "error: --norm mine:Mine is not the norm that the run in" in error_of(capsys)
    assert run_of_mine.read_bytes("run.json") == before


def test_a_model_of_another_norm_or_of_one_that_is_gone_is_not_loaded(run_of_mine, scratch):
    for change, message in (
        (CHANGED, "is not the norm that the run in"),
        (("flax.linen", ""), r"cannot be imported \(SyntaxError"),
        (None, "start Python in the folder of its module"),
    ):
        if change:
            change_mine(scratch, *change)
        else:
            (scratch / "mine.py").unlink()
        with pytest.raises(UserError, match=message):
            runner.load_model(run_of_mine.path, "mine:Mine", 1)


def test_another_function_that_a_norm_calls_is_warned_of(run_of_mine, tiny, scratch):
    more, heard = dataclasses.replace(run_of_mine.info().config, seeds=2), []
    callback = Callback()
    callback.on_warning = heard.append
    change_mine(scratch, "x * 2", "x * 2.5")
    experiment, now = Experiment([more], tiny), run_of_mine.info().environment
    runner._begin(Sweep(run_of_mine.path, [more]), experiment, now, [callback], True)
    assert [text for text in heard if "norm=mine:Mine computes something else" in text]


def test_a_norm_that_is_not_finite_is_not_taken_for_a_wrong_machine(own_data, scratch, capsys):
    flags = ("--arch", NET, "--dataset", own_data, "--batch-size", "35", "--out", scratch / "x")
    assert call("--norm", "own_norm:SteepNorm", *flags) == 1
    error = capsys.readouterr().err
    assert "the first step of own_norm:SteepNorm norm gives numbers that are not finite" in error
    assert not (scratch / "x").exists()


def test_a_wrong_file_is_one_line_and_makes_and_runs_nothing(own_data, tiny, scratch, capsys):
    evil, flags = Evil(scratch / "evil"), ("--dataset", own_data, "--batch-size", "7")
    for wrong, message in (
        ({"test_images": tiny.test_images / 255}, "np.round(test_images * 255)"),
        ({"class_names": np.array(["a", "b", "c", "\ud800"])}, "is no valid text"),
        ({"train_images": np.array([evil], object)}, "holds Python objects"),
    ):
        write_npz(own_data, tiny, **wrong)
        assert call(*flags, "--out", scratch / "x") == 2
        assert message in error_of(capsys)
    assert list(scratch.iterdir()) == [own_data]


def test_a_new_setting_of_a_sweep_is_one_entry(tiny_by_name, scratch, monkeypatch, capsys):
    """As if `SWEPT` had named dropout: each run is trained with its own. (A flag of several values
    is a line in `run.Settings`.)
    """
    more, known = (*config.SWEPT, "dropout"), config.SWEPT
    for module in [module for module in sys.modules.values() if vars(module).get("SWEPT") is known]:
        monkeypatch.setattr(module, "SWEPT", more)
    base = {"norm": "layer", "arch": NET, "dataset": "tiny", "epochs": 1, "batch_size": 35}
    configs = config.product(config.study, base, {"dropout": (0.0, 0.5)})
    options = run.Options(out=scratch / "s", quiet=True, skip_self_check=True)
    assert job.start(configs, options) == 0
    assert call(scratch / "s", app=report.app) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert head.split()[:4] == ["batch", "learning", "rate", "dropout"]
    assert (scratch / "s" / "dropout.png").exists()
    losses = []
    for name, dropout in (
        ("batch-35-rate-0.01-dropout-0", 0),
        ("batch-35-rate-0.01-dropout-0.5", 0.5),
    ):
        directory = RunDirectory(scratch / "s" / name)
        assert directory.info().config.dropout == dropout
        losses.append(losses_of(directory, ("layer", 1)))
        for page in ("report.md", "report.html"):
            assert name in (directory.path / page).read_text()
    assert (losses[0] != losses[1]).all()


def test_a_new_data_set_is_one_entry(tiny, monkeypatch):
    monkeypatch.setitem(datasets.SOURCES, "mine", lambda: tiny)
    assert datasets.load("mine") is tiny


def test_a_new_table_number_and_figure_reach_every_page(sweep, monkeypatch, capsys):
    def extra(run: Run):
        """A table."""
        return tables.Table("Extra table", ["what", "how many"], [["nets", "1234"]])

    def picture(run: Run):
        """A figure."""
        figure = Figure()
        figure.suptitle("Extra figure")
        yield "extra", figure

    number = tables.Number(lambda run: "extra number", lambda run, norm: f"{norm} 5678")
    monkeypatch.setattr(tables, "TABLES", [*tables.TABLES, extra])
    monkeypatch.setattr(tables, "NUMBERS", [*tables.NUMBERS, number])
    monkeypatch.setattr(figures, "FIGURES", (picture,))
    directory = sweep(seeds=1)
    assert call(directory.path, app=report.app) == 0
    for name in ("report.md", "report.html"):
        text = (directory.path / name).read_text()
        words = ("Extra table", "1234", "extra number", "batch 5678", "Extra figure")
        assert [word for word in words if word not in text] == []
    assert "extra number" in tables.results(Run(directory)).plain()


def test_weight_decay_is_of_the_kernels_and_of_no_parameter_of_a_norm(tiny):
    norm = "own_norm:PairNorm"
    program = program_of(Config(norm, NET, "tiny", 1, 35), norm, 4)
    start, key = init(program, tiny, 1), step.derive_key(1, "dropout", 1, 0)
    data = jnp.asarray(tiny.train_images[:8]), jnp.asarray(tiny.train_labels[:8]), key
    one = jax.jit(step.train_step, static_argnums=0, **SOON)
    plain, decayed = (one(program, start, *data, 0.1, decay)[0].params for decay in (0.0, 0.5))
    for layer, before in start.params.items():
        for name, values in before.items():
            moved = jax.tree.map(lambda a, b: a - b, plain[layer][name], decayed[layer][name])
            share = 0.05 if name == "kernel" and not layer.endswith("_norm") else 0.0
            wanted = jax.tree.map(lambda values, share=share: share * values, values)
            chex.assert_trees_all_close(moved, wanted, atol=1e-6)
