"""The command, as a user calls it: output, exit codes, and nothing left behind by a mistake."""

import dataclasses
import datetime
import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from helpers import SMALL, call, difference, epochs_of, losses_of

import jaxnorm
from jaxnorm import cli, job, report, run
from jaxnorm.analysis import figures, results
from jaxnorm.config import (
    NORMS,
    OF_NORMS,
    OF_RECIPE,
    Config,
    NetId,
    Setting,
    Text,
    UserError,
    product,
    study,
)
from jaxnorm.data import cache
from jaxnorm.data import datasets as data
from jaxnorm.model.fast import convolution
from jaxnorm.runs import callbacks, environment, runner, signals
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import NetFolder
from jaxnorm.storage.sweep import Sweep


@pytest.mark.slow
def test_help_names_every_setting_and_loads_no_jax():
    code = "import sys, jaxnorm.run; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "jaxnorm.run", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for field in (*dataclasses.fields(run.Settings), *dataclasses.fields(run.Options)):
        assert f"--{field.name.replace('_', '-')} " in done.stdout.replace("\n", " "), field.name
    for name in NORMS:
        assert f" {name}: " in done.stdout


def test_every_setting_has_a_flag_and_its_own_default():
    """None or () stand for the recipe's, or for one value."""
    flags = {field.name: field.default for field in dataclasses.fields(run.Settings)}
    assert flags.keys() == {field.name for field in dataclasses.fields(Config)} - {
        "usual_batch",
        "untuned",
    }
    recipes = {*OF_RECIPE, *OF_NORMS}
    assert {name for name, default in flags.items() if default in (None, ())} == recipes
    given = {name: default for name, default in flags.items() if default not in (None, ())}
    assert given == {name: getattr(Config(), name) for name in given}


def test_summary_prints_the_layer_tables_and_trains_nothing(inside, capsys):
    assert call("--summary") == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["total"]] == ["45,776", "45,776", "46,412"]
    assert ["c3", "34\N{MULTIPLICATION SIGN}34\N{MULTIPLICATION SIGN}8", "5", "256", "0"] in rows
    assert list(inside.iterdir()) == []


def test_a_terminal_that_knows_no_signs_shows_others(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call("--summary", "--norm", "layer") == 0
    terminal.seek(0)
    assert "30?30?4" in terminal.read()


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
        ("--out", "gs://bucket/run"),
        ("--out", "~nosuchuser/run"),
        ("--resume", "s3://bucket/run"),
        ("--data-dir", "~nosuchuser/tfds"),
        ("--archive", "gs://bucket/cifar-10-binary.tar.gz"),
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
    assert "JAX" not in captured.err
    assert not captured.out
    assert sorted(inside.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--norm", "batch", "group"), "'group' belongs to no flag;"),
        (("norm=layer",), "'norm=layer' belongs to no flag;"),
        (("--lr", "0.1"), "there is no flag --lr (did you mean --learning-rate?);"),
        (("--epoch=3",), "there is no flag --epoch (did you mean --epochs?);"),
        (("--random_seed", "3"), "there is no flag --random_seed (did you mean --seed?);"),
        (("--optimizer", "adam"), "there is no flag --optimizer;"),
    ],
)
def test_what_is_no_flag_is_told_where_the_flags_are(arguments, wrong, capsys):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert wrong in error
    assert error.endswith("; --help lists what each flag takes\n")


def test_a_read_only_directory_is_refused(inside, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert call("--dataset", "digits", "--out", "new/run") == 2
    assert "writable" in capsys.readouterr().err
    assert list(inside.iterdir()) == []


def test_a_working_directory_that_is_gone_is_said(inside, monkeypatch, capsys):
    (inside / "gone").mkdir()
    monkeypatch.chdir(inside / "gone")
    (inside / "gone").rmdir()
    assert call("--dataset", "digits", "--out", inside / "x") == 2
    assert capsys.readouterr().err.startswith("error: the working directory is gone: ")


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(
    inside, tiny_by_name, sweep, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(inside))
    path = sweep("made").path
    assert call("--out=~/made", "--dataset", "digits") == 2
    assert f"--out {path} is already used" in capsys.readouterr().err
    assert call("--resume=~/made", "--summary") == 0
    monkeypatch.setattr(figures, "FIGURES", ())
    assert cli.run(report.app, ["~/made", "~/made", "--out", "~/page.html"]) == 0
    assert (inside / "page.html").exists()
    with pytest.raises(UserError, match="has no checkpoint of layer norm, seed 1"):
        runner.load_model("~/made", "layer", 1)


def test_the_cache_is_left_out_where_the_user_has_no_home(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache, "default_cache_dir", lambda: None)
    before = jax.config.jax_compilation_cache_dir
    job.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_variable_that_jax_does_not_take_is_named(inside, monkeypatch, capsys):
    def refuse(*_):
        raise ValueError('Invalid value "many" for JAX flag jax_num_cpu_devices')

    monkeypatch.setattr(job, "start", refuse)
    assert call("--dataset", "digits") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: JAX does not take the environment: Invalid value")
    assert error.count("\n") == 1


def test_runs_that_begin_in_one_second_have_folders_of_their_own(
    inside, tiny_by_name, monkeypatch, capsys
):
    now = SimpleNamespace(now=lambda: datetime.datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr(job, "datetime", SimpleNamespace(datetime=now))

    def stop(sweep, *_):
        sweep.folder.write_text("begun", "")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "run", stop)
    for _ in range(3):
        assert call(*SMALL, "--skip-self-check") == 1
    name = "20260102-030405-three-layers-layer-tiny"
    assert f"--resume runs/{name}-3" in capsys.readouterr().err
    made = sorted(path.name for path in (inside / "runs").iterdir())
    assert made == [name, f"{name}-2", f"{name}-3"]


EVERY_FIGURE = figures.FIGURES


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
    assert lines[4].startswith("tiny; three-layers nets, 1 epoch, batch 35, seed 1, n = 1; cpu")
    assert lines[5].startswith("the report is a run/report.html; 13 figures")
    assert captured.err == ""
    (epoch,) = epochs_of(RunDirectory("a run"))
    assert f"{epoch.test_accuracy:.2%}" in lines[3]
    assert epoch.validation_loss is None
    assert call(*SMALL, "--out", "a run") == 2


def test_several_seeds_say_which_and_how_long_it_takes(inside, tiny_by_name, capsys):
    flags = (*SMALL, "--skip-self-check", "--seeds", "2", "--validation", "35", "--tensorboard")
    assert call(*flags, "--out", "x") == 0
    captured = capsys.readouterr().out
    lines = captured.splitlines()
    assert lines[1].startswith("   layer  seed 1  epoch  1/1  train loss ")
    assert "validation accuracy" in lines[1]
    assert lines[1].endswith(" min left") or lines[1].endswith("under a minute left")
    assert lines[2].startswith("   layer  seed 2  epoch  1/1")
    assert lines[2].endswith("under a minute left")  # of measuring it, and of the report
    assert "n = 2 seeds (1 to 2), mean \N{PLUS-MINUS SIGN} standard deviation" in captured
    names = {path.name for path in (inside / "x" / "tensorboard").iterdir()}
    assert names == {"layer-1", "layer-2"}
    assert (inside / "x" / "report.html").exists()


def test_the_time_left_in_words():
    assert callbacks._time_left(20) == ", under a minute left"
    assert callbacks._time_left(150) == ", about 2 min left"
    assert callbacks._time_left(3660) == ", about 1 h 1 min left"


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


def test_without_probes_a_run_is_whole_and_stays_so(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--skip-self-check", "--no-probes", "--out", "x") == 0
    assert "report.html; 2 figures" in capsys.readouterr().out
    net = NetFolder(RunDirectory("x"), NetId("layer", 1))
    result = (net.path / "result.npz").stat()
    assert not net.measured()
    assert "probes.npz is missing" in (inside / "x" / "report.html").read_text()
    assert call("--resume", "x") == 0
    assert (net.path / "result.npz").stat().st_mtime_ns == result.st_mtime_ns


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


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("latex could not be found"), 1, "RuntimeError: latex could not be found"),
        (UserError("examples.npz is damaged"), 1, "(examples.npz is damaged)"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (signals.Stopped(15), 143, "terminated"),
    ],
)
def test_a_report_that_fails_after_training_looks_like_no_lost_run(
    inside, tiny_by_name, monkeypatch, capsys, error, code, text
):
    def fail(*_):
        raise error

    monkeypatch.setattr(runner, "run", lambda sweep, *_: True)
    monkeypatch.setattr(Sweep, "ended", lambda *_: True)
    monkeypatch.setattr(results, "save_examples", fail)
    assert call(*SMALL, "--skip-self-check", "--out", "a run") == code
    printed = capsys.readouterr().err
    assert text in printed
    way_on = "the nets are trained and safe in a run: python -m jaxnorm.report 'a run' makes it\n"
    assert printed.endswith(way_on)
    assert "--resume" not in printed
    assert printed.count("\n") == 1


def test_how_to_report_a_sweep_makes_its_table(inside):
    hint = job._how_to_report(Sweep("s", product(study, {}, {"batch_size": (35, 70)})))
    assert hint.endswith("python -m jaxnorm.run --resume s makes it")


def test_where_matplotlib_does_not_start_nothing_is_trained(
    inside, tiny_by_name, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(*SMALL) == 2
    assert "Matplotlib, which draws the report, does not start" in capsys.readouterr().err
    assert list(inside.iterdir()) == []


def test_a_wrong_operator_stops_it_unless_the_check_is_skipped(
    inside, tiny_by_name, monkeypatch, capsys
):
    """One gradient with the wrong sign; the run that is trained all the same says so."""
    original = convolution._kernel_gradient
    monkeypatch.setattr(convolution, "_kernel_gradient", lambda *arguments: -original(*arguments))
    wrong = (*SMALL, "--momentum", "0.913", "--out", "x")
    assert call(*wrong) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: one training step of layer norm")
    assert printed.count("\n") == 1
    assert not (inside / "x").exists()
    assert call(*wrong, "--skip-self-check", "--quiet") == 0
    assert RunDirectory("x").info().environment.self_check == "skipped (--skip-self-check)"
    assert "skipped" in (inside / "x" / "report.md").read_text()


def test_what_a_recipe_turns_on_a_flag_turns_off(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "start", lambda configs, *_: asked.extend(configs) or 0)
    assert call("--recipe", "tuned") == 0
    assert call("--recipe", "tuned", "--no-nesterov", "--no-weight-standardization") == 0
    assert [config.nesterov for config in asked] == [True, False]
    assert [config.weight_standardization for config in asked] == [True, False]


def test_settings_become_flags_in_errors_and_what_looks_like_one_stays():
    text = Text(Setting("batch_size", 71), " is larger: give ", Setting("out"), ", or size=123; ")
    text = Text(*text.parts, Setting("allow_large", True), " trains 'seed=4,batch=2'")
    assert text == "batch_size=71 is larger: give out=, or size=123; allow_large=True trains " + (
        "'seed=4,batch=2'"
    )
    wanted = "--batch-size 71 is larger: give --out, or size=123; --allow-large trains "
    assert cli.as_flags(text) == cli.as_flags(UserError(*text.parts)) == wanted + "'seed=4,batch=2'"
    assert cli.as_flags(ValueError("size=123")) == "size=123"


def test_deterministic_asks_xla_and_the_run_says_what_is_promised(
    inside, tiny_by_name, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert call(*SMALL, "--deterministic", "--skip-self-check", "--quiet", "--out", "x") == 0
    flags = "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_FLAGS"] == flags
    now = RunDirectory("x").info().environment
    assert now.deterministic
    assert now.repeatable.startswith("bit for bit")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert call("--resume", "x", "--quiet", "--skip-self-check") == 0
    assert os.environ["XLA_FLAGS"] == flags  # before JAX would have started
    assert "not promised" in environment.repeatable("gpu", True)
    assert "--deterministic" in environment.repeatable("gpu", False)


def test_the_bar_shows_what_is_done_on_a_terminal_alone(capsys, monkeypatch):
    bar = callbacks.Bar(quiet=False)
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
        progress = re.compile(r"[a-z ,0-9:]+ \(\d+ s\)")  # every five seconds, no warning
        assert all(map(progress.fullmatch, done.stderr.decode().splitlines())), done.stderr
        compiled.append(sorted((inside / "cache" / "jaxnorm" / "compiled").glob("*/*-cache")))
    assert compiled[0]
    assert compiled[0] == compiled[1]
    cold, warm = (RunDirectory(inside / name) for name in ("cold", "warm"))
    first, second = epochs_of(cold)
    assert second.train_loss < first.train_loss
    assert second.test_accuracy > 0.5
    assert losses_of(cold, ("batch", 1)).shape == (90,)
    assert difference(cold, warm) == ""


@pytest.mark.slow
def test_layer_norm_reads_digits_under_every_seed():
    """The newcomer's table: the norm whose last epoch jumps most, with the digits' own settings."""
    fits = jaxnorm.fit(study(norm="layer", dataset="digits", seeds=3), data.load("digits"))
    assert min(fit.epochs[-1].test_accuracy for fit in fits.values()) > 0.95
