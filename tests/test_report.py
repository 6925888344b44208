"""The report command: reports, several runs side by side, merging, and the README's tables."""

import json

import pytest

from jaxnorm import cli, data, figures, report
from jaxnorm.records import RunDirectory


def call(*arguments) -> int:
    return cli.run(report.app, [str(argument) for argument in arguments])


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which take the time."""
    monkeypatch.setattr(figures, "draw", lambda run: ({}, []))


def test_one_run_is_reported_in_its_own_directory(sweep, capsys, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # drawing takes the time
    path = sweep().path
    assert call(path) == 0
    assert (path / "report.html").exists()
    assert (path / "report.md").exists()
    assert "report.html: 21 figures" in capsys.readouterr().out
    assert not (path.parent / "side-by-side.html").exists()


def test_several_runs_stand_side_by_side_and_a_damaged_one_is_named(
    sweep, scratch, capsys, undrawn
):
    paths = [sweep(name, seeds=1).path for name in ("a", "b")]
    bad = sweep("bad", seeds=1).path
    (bad / "run.json").write_text("{")
    assert call(*paths, bad, "--out", scratch / "all.html") == 0
    text = (scratch / "all.html").read_text()
    assert text.count('<section id="run') >= 2
    assert "run.json cannot be read" in text
    assert "run.json cannot be read" in capsys.readouterr().err
    assert call(*paths) == 0
    assert (scratch / "side-by-side.html").exists()
    assert call(bad) == 2


def test_readme_tables_are_written_between_their_marks_and_nowhere_else(
    sweep, scratch, capsys, undrawn
):
    path = sweep("tiny", arch="original").path
    theirs = {"study": {n: {"test_accuracy": [0.5, 0.2]} for n in ("batch", "group", "layer")}}
    (scratch / "r.json").write_text(json.dumps(theirs))
    readme = scratch / "README.md"
    names = ("tiny", "tiny finding", "tiny differences", "tiny values", "tiny beside others")
    readme.write_text(
        "before\n"
        + "".join(f"<!-- table {each} -->\nold\n<!-- end -->\n" for each in names)
        + "z\n"
    )
    arguments = (path, "--readme", readme, "--reference", scratch / "r.json")
    assert call(*arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table tiny -->\n\n| norm |")
    assert text.endswith("<!-- end -->\nz\n")
    assert "old\n" not in text
    for part in ("With the study", "| group \N{MINUS SIGN} layer |", "| seed |", "| study |"):
        assert part in text
    assert call(*arguments) == 0
    assert readme.read_text() == text
    readme.write_text("no marks")
    assert call(*arguments) == 2
    assert "<!-- table tiny -->" in capsys.readouterr().err
    readme.write_text("<!-- table other -->\n<!-- end -->\n")
    assert call(*arguments) == 2
    assert "'other'" in capsys.readouterr().err
    readme.write_text(text)
    (path / "metrics.jsonl").write_text("rubbish\n")
    assert call(path, "--readme", readme) == 2
    assert "has a table 'tiny'" in capsys.readouterr().err
    assert readme.read_text() == text


def test_runs_made_apart_are_put_together_measured_and_reported(
    tiny, scratch, monkeypatch, undrawn
):
    from jaxnorm import experiment
    from jaxnorm.config import Config

    monkeypatch.setattr(data, "load", lambda *_, **__: tiny)
    paths = []
    for seed in (3, 2):
        config = Config("layer", "matched", "tiny", 1, 16, seed=seed)
        directory = RunDirectory.create(scratch / str(seed))
        experiment.run(config, tiny, directory, f"seed {seed}")
        paths.append(directory.path)
    assert call(*paths, "--merge", scratch / "both") == 0
    both = RunDirectory(scratch / "both")
    assert both.info().config.nets == [("layer", 2), ("layer", 3)]
    assert both.effects("layer", 2)["layers"].size == 8
    assert "n = 2" in (both.path / "report.md").read_text()
    assert call(*paths, "--merge", scratch / "both") == 2
    assert call(paths[0], paths[0], "--merge", scratch / "other") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nowhere",),
        ("--bogus",),
        ("x", "--reference", "y"),
        ("--merge", "x", "--bench", "y"),
        ("--faults", "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys):
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
