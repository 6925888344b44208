"""The command, as a user calls it: output, exit codes, and nothing left behind by a mistake."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxnorm
from jaxnorm import cli, run
from jaxnorm.analysis import figures, sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.config import Config
from jaxnorm.data import datasets as data
from jaxnorm.model import ops
from jaxnorm.runs import environment, estimate, runner, signals
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import selfcheck, trainer


def call(*arguments) -> int:
    return cli.run(run.app, [str(argument) for argument in arguments])


@pytest.fixture
def inside(scratch, monkeypatch):
    """A working directory of one's own."""
    monkeypatch.chdir(scratch)
    return scratch


@pytest.mark.slow
def test_help_names_every_setting_and_loads_no_jax():
    code = "import sys, jaxnorm.run; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "jaxnorm.run", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    flags = "norm arch dataset data-dir archive epochs batch-size learning-rate momentum dropout"
    for flag in (
        *flags.split(),
        "groups",
        "seed",
        "seeds",
        "validation",
        "out",
        "tensorboard",
        "resume",
        "mesh",
        "distributed",
        "plan",
        "preallocate",
        "precision",
        "deterministic",
        "skip-self-check",
        "quiet",
        "summary",
        "allow-unverified",
    ):
        assert f"--{flag}" in done.stdout, flag


def test_summary_prints_the_layer_tables_and_trains_nothing(inside, capsys):
    assert call("--summary") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["total"]] == ["45,776", "45,776", "46,412"]
    assert ["c3", "34\N{MULTIPLICATION SIGN}34\N{MULTIPLICATION SIGN}8", "5", "256", "0"] in rows
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--norm", "weight"),
        ("--norm", "weight", "--arch", "matched"),
        ("--norm", "json:loads", "--arch", "matched"),
        ("--norm", "nowhere:Norm", "--arch", "matched"),
        ("--arch", "resnet"),
        ("--dataset", "none.npz"),
        ("--seed", "2147483648"),
        ("--dropout", "0.99999999999"),
        ("--norm", "rms"),
        ("--epochs", "0"),
        ("--epochs", "-1"),
        ("--epochs", "many"),
        ("--epochs", "1.5"),
        ("--batch-size", "16", "32.5"),
        ("--mesh", "2"),
        ("--batch-size", "1438"),
        ("--norm", "group", "--groups", "3"),
        ("--learning-rate", "nan"),
        ("--seeds", "0"),
        ("--validation", "1437"),
        ("--validation", "1420"),
        ("--archive", "no.tar.gz", "--dataset", "cifar10"),
        ("--archive", "no.tar.gz"),
        ("--dataset", "cifar11"),
        ("--out", "used"),
        ("--out", "used/file"),
        ("--out", "used/file/in"),
        ("--out", "/proc/nowhere"),
        ("--bogus",),
        ("stray",),
        ("--summary", "--norm", "group", "--groups", "5"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_exit_code_2_and_leaves_nothing(inside, arguments, capsys):
    (inside / "used").mkdir()
    (inside / "used" / "file").write_text("x")
    before = sorted(inside.rglob("*"))
    extra = () if "--dataset" in arguments or "--summary" in arguments else ("--dataset", "digits")
    assert call(*arguments, *extra) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert sorted(inside.rglob("*")) == before


def test_a_read_only_directory_is_refused(inside, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert call("--dataset", "digits", "--out", "new/run") == 2
    assert "writable" in capsys.readouterr().err
    assert list(inside.iterdir()) == []


EVERY_FIGURE = figures.FIGURES


@pytest.fixture
def tiny_by_name(tiny, monkeypatch):
    """`tiny` by whatever name; reports draw two figures, which take a fifth of the time of all."""
    monkeypatch.setattr(data, "load", lambda *_, **__: tiny)
    monkeypatch.setattr(figures, "FIGURES", (figures.together,))


SMALL = ("--dataset", "tiny", "--epochs", "1", "--batch-size", "35", "--norm", "layer")
SMALL += ("--arch", "three-layers")


def test_a_run_prints_a_line_an_epoch_and_the_table(inside, tiny_by_name, capsys, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", EVERY_FIGURE)
    assert call(*SMALL, "--out", "a run") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "tiny: 70 training and 22 test images, from drawn"
    assert lines[1].startswith("   layer  epoch  1/1  train loss ")
    for part in ("train loss", "test loss", "accuracy", "%", " s"):
        assert part in lines[1]
    assert "132" in lines[3]
    assert lines[4].startswith("tiny; three-layers nets, 1 epochs, batch 35, seed 1, n = 1; cpu")
    assert lines[5].startswith("the report is a run/report.html; 13 figures")
    assert captured.err == ""
    (epoch,) = RunDirectory("a run").epochs()
    assert f"{epoch.test_accuracy:.2%}" in lines[3]
    assert epoch.validation_loss is None
    assert call(*SMALL, "--out", "a run") == 2


def test_several_seeds_say_which_and_how_long_it_takes(inside, tiny_by_name, capsys):
    flags = (*SMALL, "--skip-self-check", "--seeds", "2", "--validation", "8", "--tensorboard")
    assert call(*flags, "--out", "x") == 0
    captured = capsys.readouterr().out
    lines = captured.splitlines()
    assert lines[1].startswith("   layer  seed 1  epoch  1/1  train loss ")
    assert "validation accuracy" in lines[1]
    assert lines[1].endswith(" min left") or lines[1].endswith("under a minute left")
    assert lines[2].startswith("   layer  seed 2  epoch  1/1")
    assert lines[2].endswith(" s")
    assert "n = 2 seeds (1 to 2), mean \N{PLUS-MINUS SIGN} standard deviation" in captured
    names = {path.name for path in (inside / "x" / "tensorboard").iterdir()}
    assert names == {"layer-1", "layer-2"}
    assert (inside / "x" / "report.html").exists()


def test_the_time_left_in_words():
    assert cli._time_left(0) == ""
    assert cli._time_left(20) == ", under a minute left"
    assert cli._time_left(150) == ", about 2 min left"
    assert cli._time_left(3660) == ", about 1 h 1 min left"


def test_without_the_tensorboard_extra_nothing_is_begun(inside, tiny_by_name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert call(*SMALL, "--tensorboard") == 2
    assert "pip install" in capsys.readouterr().err
    assert list(inside.iterdir()) == []


def test_quiet_prints_the_table_alone(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--quiet") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3  # head, norm, conditions
    assert captured.err == ""
    (made,) = (inside / "runs").iterdir()
    assert made.name.endswith("-three-layers-layer-tiny")


def test_a_loss_that_turns_nan_is_exit_code_1(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--learning-rate", "1e30", "--out", "x") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the training loss of layer norm, seed 1, is")
    assert "epoch" in error
    assert "step" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--norm", "weight"),
        ("--norm", "group", "--groups", "3"),
        ("--mesh", "2"),
        ("--mesh", "seed=99"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_whatever_the_data_is_is_said_before_a_download(
    inside, arguments, monkeypatch, capsys
):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("loaded"))
    assert call(*arguments) == 2
    assert f"error: {' '.join(arguments[-2:])}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (signals.Stopped(2), 130, "interrupted"),
        (signals.Stopped(15), 143, "terminated"),
        (ConnectionError("another process was lost"), 1, "another process was lost"),
        (OSError(28, "No space left on device", "x"), 1, "x: No space left on device"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 1, "the device failed: RESOURCE"),
    ],
)
def test_what_happens_to_a_run_has_its_exit_code(
    inside, tiny_by_name, monkeypatch, capsys, error, code, text
):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(runner, "run", stop)
    assert call(*SMALL, "--out", "x") == code
    printed = capsys.readouterr().err
    assert text in printed
    assert "resume it with: python -m jaxnorm.run --resume x" in printed
    assert printed.count("\n") == 1


def test_a_wrong_operator_stops_it_unless_the_check_is_skipped(
    inside, tiny_by_name, monkeypatch, capsys
):
    """One gradient with the wrong sign; the run that is trained all the same says so."""
    original = ops._kernel_gradient
    monkeypatch.setattr(ops, "_kernel_gradient", lambda *arguments: -original(*arguments))
    wrong = (*SMALL, "--momentum", "0.913", "--out", "x")
    assert call(*wrong) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: one training step of layer norm")
    assert printed.count("\n") == 1
    assert not (inside / "x").exists()
    assert call(*wrong, "--skip-self-check", "--quiet") == 0
    assert RunDirectory("x").info().environment.self_check == "skipped (--skip-self-check)"
    assert "skipped" in (inside / "x" / "report.md").read_text()


def test_resume_takes_the_runs_settings_and_refuses_others(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--skip-self-check", "--out", "a run", "--data-dir", "d") == 0
    (inside / "a run" / "metrics.jsonl").write_text("")
    capsys.readouterr()
    for flags, message in (
        (("--momentum", "0.8"), "--momentum 0.8 conflicts with the run in a run, which has 0.9"),
        (("--norm=batch",), "--norm batch conflicts"),
        (("--learning-rate", "0.1"), "--learning-rate 0.1 conflicts with the run to resume"),
        (("--out", "b"), "--out conflicts with --resume"),
    ):
        assert call("--resume", "a run", *flags) == 2
        assert message in capsys.readouterr().err
    assert call("--resume", "none") == 2
    assert "none/run.json is missing" in capsys.readouterr().err
    assert call("--resume", "a run", "--epochs", "1", "--skip-self-check") == 0
    captured = capsys.readouterr()
    assert "resuming after 0 of 1 epochs" in captured.out
    assert len(RunDirectory("a run").epochs()) == 1
    assert call("--resume", "a run", "--seeds", "2", "--quiet", "--skip-self-check") == 0
    assert [(e.seed, e.epoch) for e in RunDirectory("a run").epochs()] == [(1, 1), (2, 1)]
    assert RunDirectory("a run").info().config.seeds == 2


def test_resume_refuses_to_turn_off_what_the_run_has(inside, sweep, capsys):
    sweep("x", nesterov=True)
    assert call("--resume", "x", "--no-nesterov") == 2
    assert "--nesterov False conflicts with the run in x, which has True" in capsys.readouterr().err


def test_resume_warns_of_what_is_damaged(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--skip-self-check", "--out", "x") == 0
    metrics = inside / "x" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("layer", "paper"))
    capsys.readouterr()
    assert call("--resume", "x", "--skip-self-check", "--quiet") == 0
    assert capsys.readouterr().err.startswith("warning: 1 damaged and 0 other lines")


def test_how_to_resume_names_where_the_data_is():
    hint = run._how_to_resume(Path("a run"), run.Options(data_dir=Path("my data")))
    assert hint.endswith("python -m jaxnorm.run --resume 'a run' --data-dir 'my data'")


def test_what_a_recipe_turns_on_a_flag_turns_off(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "start", lambda configs, *_: asked.extend(configs) or 0)
    assert call("--recipe", "tuned") == 0
    assert call("--recipe", "tuned", "--no-nesterov", "--no-weight-standardization") == 0
    assert [config.nesterov for config in asked] == [True, False]
    assert [config.weight_standardization for config in asked] == [True, False]


def test_settings_become_flags_in_errors():
    for text, wanted in (
        ("batch_size=71 is larger", "--batch-size 71 is larger"),
        ("allow_large=True trains it", "--allow-large trains it"),
        ("out= conflicts with resume=, which", "--out conflicts with --resume, which"),
        ("mesh=seed=4,batch=2 takes 8", "--mesh seed=4,batch=2 takes 8"),
        ("the form 'seed=4,batch=2'", "the form 'seed=4,batch=2'"),
        ("archive=/a b/c.gz: no", "--archive /a b/c.gz: no"),
    ):
        assert cli.as_flags(text) == wanted


FLAGS = ("--norm", "layer", "--dataset", "tiny", "--epochs", "2", "--skip-self-check")
FLAGS += ("--arch", "three-layers")
SWEPT = ("--batch-size", "35", "70", "--learning-rate", "0.01", "0.002")


@pytest.mark.parametrize(
    ("module", "name", "flags"),
    [(selfcheck, "with_noise", FLAGS[:-3] + FLAGS[-2:]), (estimate, "groups", (*FLAGS, "--plan"))],
    ids=["self-check", "plan"],
)
def test_a_signal_stops_what_comes_before_training(
    inside, tiny_by_name, capsys, monkeypatch, module, name, flags
):
    original = getattr(module, name)

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(module, name, signalled)
    monkeypatch.setattr(trainer.Nets, "train_chunk", lambda *_: pytest.fail("trained"))
    assert call(*flags, "--batch-size", "35", "--out", "new") == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert list(inside.iterdir()) == []


def test_a_sweep_is_planned_trained_and_resumed(inside, tiny_by_name, capsys, monkeypatch):
    original, calls = runner.save_epoch, []

    def fails_once(directory, *rest):
        if directory.path.parent.name == "s":  # and not the plan's own
            calls.append(1)
            if len(calls) == 3:
                raise signals.Stopped(2)
        original(directory, *rest)

    monkeypatch.setattr(runner, "save_epoch", fails_once)
    assert call(*FLAGS, *SWEPT, "--out", "s") == 130
    captured = capsys.readouterr()
    assert "planning 4 nets" in captured.out
    rows = [line.split() for line in captured.out.splitlines()]
    assert ["layer", "35", "2", "2", "seed=2,batch=1"] in [row[:5] for row in rows]
    assert "4 nets on 2 devices: about" in captured.out
    assert "resume it with: python -m jaxnorm.run --resume s" in captured.err
    assert call("--resume", "s", "--batch-size", "35") == 2
    assert "--batch-size 35 conflicts with the run to resume, which has 35 70" in (
        capsys.readouterr().err
    )
    assert call("--resume", "s", "--skip-self-check", "--batch-size", "35", "70") == 0
    captured = capsys.readouterr()
    assert "resuming after 2 of 8 epochs" in captured.out
    assert "planning" not in captured.out
    table = (inside / "s" / "sweep.md").read_text()
    for directory in Sweep.open("s").directories:
        config, last = directory.info().config, directory.epochs()[-1]
        row = f"| {config.batch_size} | {config.learning_rate:g} | {last.test_accuracy:.2%} |"
        assert row in table
    assert len(calls) == 9
    assert call("--resume", "s", "--seeds", "2", "--plan") == 0
    assert "4 nets on 2 devices: about" in capsys.readouterr().out  # not the four that are finished
    assert call("--resume", "s", "--plan") == 0
    assert capsys.readouterr().out.startswith("every net is finished")
    assert not list((inside / "s").glob("*.png"))  # two settings differ


def test_a_sweep_of_batch_sizes_is_drawn(inside, tiny_by_name, capsys):
    swept = ("--batch-size", "70", "35", "--linear-scaling", "--seeds", "2", "--quiet")
    assert call(*FLAGS, *swept, "--out", "s") == 0
    printed = capsys.readouterr()
    assert "The learning rate is multiplied by batch / 128." in printed.out
    assert "planning" not in printed.out
    runs = [Run(directory) for directory in Sweep.open("s").directories]
    assert (inside / "s" / "batch-size.png").read_bytes().startswith(b"\x89PNG")
    ((name, figure),) = sweeps.draw(runs)
    (means, seeds), (axes,) = figure.axes[0].lines, figure.axes
    assert name == "batch-size"
    assert axes.get_xlabel() == "batch size"
    ends = {run.info.config.batch_size: run.sample("layer") for run in runs}
    assert list(means.get_xdata()) == [35, 70]
    assert list(means.get_ydata()) == [ends[35].mean, ends[70].mean]
    assert list(seeds.get_ydata()) == [*ends[35].values, *ends[70].values]


def test_a_plan_alone_trains_nothing(inside, tiny_by_name, capsys):
    assert call(*FLAGS, *SWEPT, "--seeds", "2", "--plan", "--mesh", "seed=1,batch=1") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.split()[0] == "layer"]
    assert [row[:5] for row in rows] == [
        ["layer", "35", "4", "1", "seed=1,batch=1"],
        ["layer", "70", "4", "1", "seed=1,batch=1"],
    ]
    assert [row[5:8] for row in rows] == [["4", "x", "4"], ["4", "x", "2"]]
    assert list(inside.iterdir()) == []


def test_deterministic_asks_xla_and_the_run_says_what_is_promised(
    inside, tiny_by_name, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert call(*SMALL, "--deterministic", "--skip-self-check", "--quiet", "--out", "x") == 0
    flags = "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_FLAGS"] == flags
    info = RunDirectory("x").info()
    assert info.deterministic
    assert info.repeatable.startswith("bit for bit")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert call("--resume", "x", "--quiet", "--skip-self-check") == 0
    assert os.environ["XLA_FLAGS"] == flags  # before JAX would have started
    assert "not promised" in environment.repeatable("gpu", True)
    assert "--deterministic" in environment.repeatable("gpu", False)


def test_the_bar_shows_what_is_done_on_a_terminal_alone(capsys, monkeypatch):
    bar = cli.Bar(quiet=False)
    for done in range(3):
        bar.at("reading", done, 2)
    bar.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for what in ("reading", "decoding"):
        bar.at(what, 1, 2)
    bar.close()
    error = capsys.readouterr().err
    assert "reading:  50%" in error
    assert "decoding:  50%" in error


@pytest.mark.slow
def test_digits_from_the_shell_without_tensorflow_or_network_cold_and_warm(inside, monkeypatch):
    """A process of its own, as a user has it, twice: the second loads what the first compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(inside / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # JAX sets it in this process
    code = (
        "import sys; from jaxnorm import cli, run; used = []; "
        "network = ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'); "
        "sys.addaudithook(lambda event, _: event in network and used.append(event)); "
        "code = cli.run(run.app, sys.argv[1:]); "
        "sys.exit(4 if used else 3 if 'tensorflow' in sys.modules else code)"
    )
    compiled = []
    for name in ("cold", "warm"):
        arguments = ["--norm", "batch", "--dataset", "digits", "--epochs", "2", "--out", name]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        compiled.append(sorted((inside / "cache" / "jaxnorm" / "compiled").glob("*/*-cache")))
    assert compiled[0]
    assert compiled[0] == compiled[1]
    cold, warm = (RunDirectory(inside / name) for name in ("cold", "warm"))
    first, second = cold.epochs()
    assert second.train_loss < first.train_loss
    assert second.test_accuracy > 0.5
    losses = cold.step_losses(("batch", 1))
    assert losses.shape == (90,)
    np.testing.assert_array_equal(losses, warm.step_losses(("batch", 1)))
    np.testing.assert_array_equal(
        cold.predictions(("batch", 1))[0], warm.predictions(("batch", 1))[0]
    )


@pytest.mark.slow
def test_layer_norm_reads_digits_under_every_seed():
    """The newcomer's table: the norm whose last epoch jumps most, with the digits' own settings."""
    fits = jaxnorm.fit(Config("layer", dataset="digits", seeds=3), data.load("digits"))
    assert min(fit.epochs[-1].test_accuracy for fit in fits.values()) > 0.95
