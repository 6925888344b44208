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
from helpers import SMALL, call, difference, epochs_of, error_of, losses_of

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
    settings = {field.name for field in dataclasses.fields(Config)}
    assert flags.keys() == settings - {"usual_batch", "untuned"}
    given = {name: default for name, default in flags.items() if default not in (None, ())}
    assert flags.keys() - given.keys() == {*OF_RECIPE, *OF_NORMS}
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


MISTAKES = """
--norm weight; --norm weight --arch matched; --norm json:loads --arch matched; --norm rms
--norm nowhere:Norm --arch matched; --norm group --groups 3; --summary --norm group --groups 5
--arch resnet; --dataset none.npz; --dataset cifar11; --epochs 0; --epochs many; --epochs 1.5
--batch-size 16 32.5; --batch-size 1438; --mesh 2; --learning-rate nan; --dropout 0.99999999999
--validation 1437; --validation 1420; --archive no.tar.gz --dataset cifar10; --archive no.tar.gz
--archive gs://bucket/cifar-10-binary.tar.gz; --out used; --out used/file; --out used/file/in
--out /proc/nowhere; --out gs://bucket/run; --out ~nosuchuser/run; --resume s3://bucket/run
--data-dir ~nosuchuser/tfds; --bogus; stray
"""


@pytest.mark.parametrize("line", MISTAKES.replace(";", "\n").split("\n")[1:-1], ids=str.strip)
def test_a_mistake_is_one_line_exit_code_2_and_leaves_nothing(inside, line, capsys):
    arguments = line.split()
    (inside / "used").mkdir()
    (inside / "used" / "file").write_text("x")
    before = sorted(inside.rglob("*"))
    extra = () if "--dataset" in arguments or "--summary" in arguments else ("--dataset", "digits")
    assert call(*arguments, *extra) == 2
    assert "JAX" not in error_of(capsys)
    assert sorted(inside.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--norm", "batch", "group"), "'group' belongs to no flag;"),
        (("norm=layer",), "'norm=layer' belongs to no flag;"),
        (("--lr", "0.1"), "there is no flag --lr (did you mean --learning-rate?);"),
        (("--epoch=3",), "there is no flag --epoch (did you mean --epochs?);"),
        (("--random_seed", "3"), "there is no flag --random_seed (did you mean --seed?);"),
        (("--scheduler", "cosine"), "there is no flag --scheduler (did you mean --schedule?);"),
    ],
)
def test_what_is_no_flag_is_told_where_the_flags_are(arguments, wrong, capsys):
    assert call(*arguments) == 2
    assert f"{wrong} --help lists what each flag takes\n" in error_of(capsys)


def test_a_read_only_directory_or_one_that_is_gone_is_said(inside, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        assert call("--dataset", "digits", "--out", "new/run") == 2
    assert "writable" in capsys.readouterr().err
    assert list(inside.iterdir()) == []
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
    assert call("~/made", "~/made", "--out", "~/page.html", app=report.app) == 0
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
    assert "error: JAX does not take the environment: Invalid value" in error_of(capsys)


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


def test_a_run_prints_a_line_an_epoch_and_the_table_and_a_quiet_one_the_table(
    inside, tiny_by_name, capsys
):
    assert call(*SMALL, "--out", "a run") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "tiny: 70 training and 22 test images, from drawn"
    assert re.match("   layer  epoch  1/1  train loss .*test loss .*accuracy.*%.* s", lines[1])
    assert "132" in lines[3]
    assert lines[4].startswith("tiny; three-layers nets, 1 epoch, batch 35, seed 1, n = 1; cpu")
    assert lines[5].startswith("the report is a run/report.html; 2 figures")
    assert captured.err == ""
    (epoch,) = epochs_of(RunDirectory("a run"))
    assert f"{epoch.test_accuracy:.2%}" in lines[3]
    assert epoch.validation_loss is None
    assert call(*SMALL, "--out", "a run") == 2
    error_of(capsys)
    assert call(*SMALL, "--quiet") == 0
    assert capsys.readouterr() == ("\n".join([*lines[2:5], ""]), "")
    (made,) = (inside / "runs").iterdir()
    assert made.name.endswith("-three-layers-layer-tiny")


def test_several_seeds_say_which_and_how_long_it_takes(inside, tiny_by_name, capsys):
    flags = (*SMALL, "--skip-self-check", "--seeds", "2", "--validation", "35", "--tensorboard")
    assert call(*flags, "--out", "x") == 0
    captured = capsys.readouterr().out
    first, second = captured.splitlines()[1:3]
    assert first.startswith("   layer  seed 1  epoch  1/1  train loss ")
    assert "validation accuracy" in first
    assert first.endswith((" min left", "under a minute left"))
    assert second.startswith("   layer  seed 2  epoch  1/1")
    assert second.endswith("under a minute left")  # of measuring it, and of the report
    assert "n = 2 seeds (1 to 2), mean \N{PLUS-MINUS SIGN} standard deviation" in captured
    names = {path.name for path in (inside / "x" / "tensorboard").iterdir()}
    assert names == {"layer-1", "layer-2"}


def test_the_time_left_in_words():
    words = [callbacks._time_left(seconds) for seconds in (20, 150, 3660)]
    assert words == [", under a minute left", ", about 2 min left", ", about 1 h 1 min left"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("tensorboardX", "pip install"),
        ("matplotlib", "Matplotlib, which draws the report, does not start"),
    ],
)
def test_without_what_it_will_need_nothing_is_begun(
    inside, tiny_by_name, capsys, monkeypatch, module, message
):
    monkeypatch.setitem(sys.modules, module, None)
    assert call(*SMALL, "--tensorboard") == 2
    assert message in error_of(capsys)
    assert list(inside.iterdir()) == []


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
    assert call(*SMALL, "--learning-rate", "1e30", "--skip-self-check", "--out", "x") == 1
    error = error_of(capsys, after_output=True)
    assert re.match("error: the training loss of layer norm, seed 1, is .* epoch .* step", error)


@pytest.mark.parametrize("line", ["--norm weight", "--groups 3", "--mesh 2", "--mesh seed=99"])
def test_what_is_wrong_whatever_the_data_is_is_said_before_a_download(
    inside, line, monkeypatch, capsys
):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("loaded"))
    assert call(*line.split()) == 2
    assert f"error: {line}" in capsys.readouterr().err


WHILE_TRAINING = "resume it with: python -m jaxnorm.run --resume 'a run'\n"
AFTERWARDS = "the nets are trained and safe in a run: python -m jaxnorm.report 'a run' makes it\n"
FULL = OSError(28, "No space left on device", "x")
FAILED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")


@pytest.mark.parametrize(
    ("way_on", "error", "code", "text"),
    [
        (WHILE_TRAINING, signals.Stopped(2), 130, "interrupted"),
        (WHILE_TRAINING, signals.Stopped(15), 143, "terminated"),
        (WHILE_TRAINING, FULL, 1, "x: No space left on device"),
        (WHILE_TRAINING, FAILED, 1, "the device failed: RESOURCE"),
        (AFTERWARDS, signals.Stopped(15), 143, "terminated"),
        (AFTERWARDS, FULL, 1, "No space left on device"),
        (AFTERWARDS, UserError("examples.npz is damaged"), 1, "(examples.npz is damaged)"),
        (AFTERWARDS, RuntimeError("no latex"), 1, "RuntimeError: no latex"),
    ],
)
def test_what_ends_a_run_has_its_exit_code_and_a_way_on(
    inside, tiny_by_name, monkeypatch, capsys, way_on, error, code, text
):
    """A report that fails after training looks like no lost run."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(runner, "run", fail if way_on == WHILE_TRAINING else lambda sweep, *_: True)
    monkeypatch.setattr(Sweep, "ended", lambda *_: way_on == AFTERWARDS)
    monkeypatch.setattr(results, "save_examples", fail)
    assert call(*SMALL, "--skip-self-check", "--out", "a run") == code
    printed = error_of(capsys, after_output=True)
    assert text in printed
    assert printed.endswith(way_on)
    sweep = Sweep("s", product(study, {}, {"batch_size": (35, 70)}))
    assert job._how_to_report(sweep).endswith("python -m jaxnorm.run --resume s makes it")


def test_a_wrong_operator_stops_it_unless_the_check_is_skipped(
    inside, tiny_by_name, monkeypatch, capsys
):
    """One gradient with the wrong sign; the run that is trained all the same says so."""
    original = convolution._kernel_gradient
    monkeypatch.setattr(convolution, "_kernel_gradient", lambda *arguments: -original(*arguments))
    wrong = (*SMALL, "--momentum", "0.913", "--out", "x")
    assert call(*wrong) == 1
    error = error_of(capsys, after_output=True)
    assert error.startswith("error: one training step of layer norm")
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
    text = Text(*text.parts, Setting("allow_large", True), " trains 'seed=4'")
    assert text == (
        "batch_size=71 is larger: give out=, or size=123; allow_large=True trains 'seed=4'"
    )
    wanted = "--batch-size 71 is larger: give --out, or size=123; --allow-large trains 'seed=4'"
    assert cli.as_flags(text) == cli.as_flags(UserError(*text.parts)) == wanted
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
    """A process of its own, as a user has it, twice: the second loads what the first compiled, at
    most twelve programs, and does not check them again.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(inside / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # JAX sets it in this process
    code = (
        "import sys, types; from jaxnorm import cli, run; used = []; "
        "network = ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'); "
        "sys.addaudithook(lambda event, _: event in network and used.append(event)); "
        "nets = lambda: sys.meta_path.remove(late) or __import__('nets') and None; "  # loads JAX
        "late = types.SimpleNamespace(find_spec=lambda n, *_: nets() if 'job' in n else None); "
        "sys.meta_path.insert(0, late); code = cli.run(run.app, sys.argv[1:]); "
        "sys.exit(4 if used else 3 if 'tensorflow' in sys.modules else code)"
    )
    compiled = []
    for name in ("cold", "warm"):
        arguments = ["--dataset", "digits", "--epochs", "1", *SMALL[4:], "--out", name]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert done.returncode == 0, done.stderr
        progress = re.compile(r"[a-z ,0-9:]+ \(\d+ s\)")  # every five seconds, no warning
        assert all(map(progress.fullmatch, done.stderr.decode().splitlines())), done.stderr
        compiled.append(sorted((inside / "cache" / "jaxnorm" / "compiled").glob("*/*-cache")))
    assert 0 < len(compiled[0]) <= 12, compiled[0]
    assert compiled[0] == compiled[1]
    cold, warm = (RunDirectory(inside / name) for name in ("cold", "warm"))
    checks = [each.info().environment.self_check for each in (cold, warm)]
    assert checks == ["passed", "passed before, by the same programs on this machine"]
    assert losses_of(cold, ("layer", 1)).shape == (42,)
    assert difference(cold, warm) == ""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["jaxnorm.train", "import jax"])
def test_training_from_python_twice_prints_no_errors_of_xlas(inside, monkeypatch, first):
    """XLA logs some for each program that it loads, if JAX was imported without being told not to;
    so then none is kept.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(inside / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    settings = "dataset='digits', epochs=1, arch='three-layers', batch_size=479, norm='group'"
    for name in ("cold", "warm"):
        train = f"jaxnorm.train(jaxnorm.study({settings}), out='{name}', quiet=True)"
        code = f"import jaxnorm; {first}; import nets; {train}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    kept = list((inside / "cache" / "jaxnorm" / "compiled").glob("*/*-cache"))
    assert bool(kept) == (first == "jaxnorm.train")


@pytest.mark.slow
def test_layer_norm_reads_digits_under_two_seeds():
    """The newcomer's table: the norm whose last epoch jumps most, with the digits' own settings."""
    fits = jaxnorm.fit(study(norm="layer", dataset="digits", seeds=2), data.load("digits"))
    assert min(fit.epochs[-1].test_accuracy for fit in fits.values()) > 0.95
