"""The command with several runs, and with one that is there already: planned, resumed, grown."""

import shutil
import signal
from pathlib import Path

import pytest
from helpers import SMALL, call, epochs_of, write_npz

from jaxnorm import job, run
from jaxnorm.analysis import figures, sweeps
from jaxnorm.analysis.results import Run
from jaxnorm.runs import signals
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import NetFolder
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import experiment, probes, selfcheck


def forget(path):
    """Has the nets of a run train again."""
    shutil.rmtree(path / "nets")


FLAGS = (*SMALL[:2], *SMALL[6:], "--epochs", "2", "--skip-self-check")
SWEPT = ("--batch-size", "35", "70", "--learning-rate", "0.01", "0.002")


def test_resume_takes_the_runs_settings_and_refuses_others(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--skip-self-check", "--out", "a run", "--data-dir", "d") == 0
    forget(inside / "a run")
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
    assert len(epochs_of(RunDirectory("a run"))) == 1
    assert call("--resume", "a run", "--seeds", "2", "--quiet", "--skip-self-check") == 0
    assert [(e.seed, e.epoch) for e in epochs_of(RunDirectory("a run"))] == [(1, 1), (2, 1)]
    assert RunDirectory("a run").info().config.seeds == 2


def test_nothing_is_checked_where_every_net_is_finished(inside, tiny_by_name, monkeypatch, capsys):
    assert call(*SMALL, "--skip-self-check", "--out", "x") == 0
    checked = []
    monkeypatch.setattr(selfcheck, "self_check", lambda *_: checked.append(1) or (1, 1))
    assert call("--resume", "x") == 0
    assert not checked
    assert "resuming after 1 of 1 epochs" in capsys.readouterr().out
    assert call("--resume", "x", "--seeds", "2") == 0
    assert len(checked) == 1


def test_summary_shows_the_nets_of_the_run(inside, tiny_by_name, sweep, capsys):
    sweep("x", arch="residual", norm="group", nesterov=True)
    assert call("--resume", "x", "--summary") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [row[1] for row in rows if row[0] == "layer"] == ["group:"]
    assert ["total", "47,440"] in [[row[0], row[-1]] for row in rows]
    for flag, wrong in (("--arch=matched", "--arch matched"), ("--no-nesterov", "--no-nesterov")):
        assert call("--resume", "x", "--summary", flag) == 2
        assert f"{wrong} conflicts with the run in x, which has" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["run.json", "nets", ""])
def test_a_part_of_a_run_stands_for_the_run(inside, tiny_by_name, sweep, part, capsys):
    sweep("nets", norm="group", arch="matched")
    assert call("--resume", Path("nets") / part, "--summary") == 0
    assert "total" in capsys.readouterr().out
    assert call("--resume", Path("nets") / part, "--momentum", "0.8") == 2
    assert "conflicts with the run in nets, which has 0.9" in capsys.readouterr().err


def test_the_file_of_data_may_lie_elsewhere_when_a_run_resumes(inside, tiny, monkeypatch, capsys):
    write_npz("tiny.npz", tiny)
    write_npz("other.npz", tiny, test_images=tiny.test_images[::-1])
    monkeypatch.setattr(figures, "FIGURES", ())
    small = ("--dataset", "tiny.npz", *SMALL[2:], "--skip-self-check", "--out", "x")
    assert call(*small) == 0
    forget(inside / "x")
    (inside / "elsewhere").mkdir()
    monkeypatch.chdir(inside / "elsewhere")
    capsys.readouterr()
    resume = ("--resume", "../x", "--skip-self-check", "--quiet")
    assert call(*resume) == 2
    assert "no such file; if the file of the run is elsewhere" in capsys.readouterr().err
    assert call(*resume, "--dataset", "../other.npz") == 2
    assert "the data found is not what ../x was trained on" in capsys.readouterr().err
    assert call(*resume, "--dataset", "../tiny.npz") == 0
    assert len(epochs_of(RunDirectory("../x"))) == 1


def test_tensorboard_gets_the_epochs_that_were_trained_without_it(inside, tiny_by_name, sweep):
    sweep("x", norm="group,layer", seeds=1)
    assert call("--resume", "x", "--tensorboard", "--quiet") == 0
    for net in ("group-1", "layer-1"):
        (file,) = (inside / "x" / "tensorboard" / net).iterdir()
        size = file.stat().st_size
        assert call("--resume", "x", "--tensorboard", "--quiet") == 0
        assert [path.stat().st_size for path in file.parent.iterdir()] == [size]  # once


def test_resume_warns_of_what_is_damaged(inside, tiny_by_name, capsys):
    assert call(*SMALL, "--skip-self-check", "--out", "x") == 0
    result = inside / "x" / "nets" / "layer-1" / "result.npz"
    result.write_bytes(result.read_bytes()[:-9])
    capsys.readouterr()
    assert call("--resume", "x", "--skip-self-check", "--quiet") == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: x/nets/layer-1/result.npz is damaged")
    assert "kept as x/nets/layer-1/result.npz.damaged-1" in warning


def test_how_to_resume_names_where_the_data_is():
    hint = job._how_to_resume(Path("a run"), run.Options(data_dir=Path("my data")))
    assert hint.endswith("python -m jaxnorm.run --resume 'a run' --data-dir 'my data'")


def test_a_signal_stops_the_self_check(inside, tiny_by_name, capsys, monkeypatch):
    original = selfcheck.with_noise

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(selfcheck, "with_noise", signalled)
    monkeypatch.setattr(experiment.Group, "train_chunk", lambda *_: pytest.fail("trained"))
    # Another test's net may have passed before in this process.
    assert call(*SMALL, "--recheck", "--out", "new") == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert list(inside.iterdir()) == []


def test_a_signal_while_a_net_is_measured_loses_no_epoch(inside, tiny_by_name, capsys, monkeypatch):
    original = probes.look
    with monkeypatch.context() as patch:

        def signalled(*arguments):
            patch.setattr(probes, "look", original)  # a second one would end Python
            signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        patch.setattr(probes, "look", signalled)
        patch.setattr(probes, "corrupt", lambda _: pytest.fail("measured on"))
        assert call(*SMALL, "--skip-self-check", "--out", "x") == 143
    assert "resume it with" in capsys.readouterr().err
    net = Run(RunDirectory("x")).net("layer", 1)
    assert len(net.epochs()) == 1
    assert not net.measured()
    assert call("--resume", "x", "--skip-self-check", "--quiet") == 0
    assert net.measured()


def test_a_sweep_is_trained_and_resumed(inside, tiny_by_name, capsys, monkeypatch):
    original, calls = NetFolder.commit, []

    def fails_once(folder, saved):
        calls.append(1)
        if len(calls) == 3:
            raise signals.Stopped(2)
        original(folder, saved)

    monkeypatch.setattr(NetFolder, "commit", fails_once)
    assert call(*FLAGS, *SWEPT, "--out", "s") == 130
    captured = capsys.readouterr()
    assert "resume it with: python -m jaxnorm.run --resume s" in captured.err
    for given in (["35"], ["35", "7"]):
        assert call("--resume", "s", "--batch-size", *given) == 2
        wrong = f"--batch-size {' '.join(given)} conflicts with the run to resume, which has 35 70"
        assert wrong in capsys.readouterr().err
    assert call("--resume", "s", "--skip-self-check", "--batch-size", "35", "70") == 0
    assert "resuming after 2 of 8 epochs" in capsys.readouterr().out
    table = (inside / "s" / "sweep.md").read_text()
    for directory in Sweep.open("s").directories:
        config, last = directory.info().config, epochs_of(directory)[-1]
        row = f"| {config.batch_size} | {config.learning_rate:g} | {last.test_accuracy:.2%} |"
        assert row in table
    assert len(calls) == 9
    assert not list((inside / "s").glob("*.png"))  # two settings differ


def test_a_sweep_of_batch_sizes_is_drawn(inside, tiny_by_name, capsys):
    swept = ("--batch-size", "70", "35", "--linear-scaling", "--seeds", "2", "--quiet")
    assert call(*FLAGS, *swept, "--out", "s") == 0
    assert "The learning rate is multiplied by batch / 128." in capsys.readouterr().out
    runs = [Run(directory) for directory in Sweep.open("s").directories]
    assert (inside / "s" / "batch-size.png").read_bytes().startswith(b"\x89PNG")
    ((name, figure),) = sweeps.draw(runs)
    (axes,) = figure.axes
    assert (name, axes.get_xlabel()) == ("batch-size", "batch size")
    small, large = sorted((run.info.config.batch_size, run.sample("layer")) for run in runs)
    means, seeds = axes.lines
    assert list(means.get_xdata()) == [small[0], large[0]] == [35, 70]
    assert list(means.get_ydata()) == [small[1].mean, large[1].mean]
    assert list(seeds.get_ydata()) == [*small[1].values, *large[1].values]


def test_a_sweep_in_which_no_net_of_a_run_stays_finite_ends_with_its_table(
    inside, tiny_by_name, capsys
):
    swept = ("--learning-rate", "0.01", "1e30", "--batch-size", "35", "--out", "s")
    assert call(*FLAGS, *swept) == 0
    printed = capsys.readouterr()
    assert "learning rate 1e+30: the training loss of layer norm, seed 1, is nan" in printed.err
    assert "| 35 | 1e+30 | none (0 of 1) |" in (inside / "s" / "sweep.md").read_text()
    assert (inside / "s" / "learning-rate.png").exists()
