"""The report command: reports, and several runs side by side."""

import json
import os

import pytest

from jaxnorm import cli, report
from jaxnorm.analysis import figures


def call(*arguments) -> int:
    return cli.run(report.app, [str(argument) for argument in arguments])


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which take the time."""
    monkeypatch.setattr(figures, "draw", lambda run: ([], []))


def test_one_run_is_reported_in_its_own_directory(sweep, capsys, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # drawing takes the time
    path = sweep().path
    assert call(path) == 0
    assert (path / "report.html").exists()
    assert (path / "report.md").exists()
    assert "report.html: 23 figures" in capsys.readouterr().out
    assert not (path.parent / "side-by-side.html").exists()
    assert call(path, "--out", path.parent / "alone.html") == 0
    assert (path.parent / "alone.html").read_text() == (path / "report.html").read_text()


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
    printed = capsys.readouterr()
    assert "run.json cannot be read" in printed.err
    assert "all.html: 2 of 3 runs side by side" in printed.out
    assert call(*paths) == 0
    assert (scratch / "side-by-side.html").exists()
    assert call(bad) == 2
    capsys.readouterr()
    assert call(*paths, "--out", scratch) == 2
    printed = capsys.readouterr()
    assert f"--out {scratch} is a folder: name a file" in printed.err
    assert not printed.out


def test_a_name_that_is_not_utf_8_is_reported(sweep, undrawn):
    path = sweep(os.fsdecode(b"run\xff"), seeds=1).path
    assert call(path) == 0
    for name in ("report.md", "report.html"):
        assert "run\\udcff" in (path / name).read_text()
    assert call(path, path, "--out", path / "page.html") == 0


def test_runs_of_one_folder_name_have_a_row_each(sweep, scratch, undrawn):
    paths = []
    for name in ("a", "b"):
        (scratch / name).mkdir()
        paths.append(sweep(f"{name}/run", seeds=1).path)
    assert call(*paths, "--out", scratch / "all.html") == 0
    text = (scratch / "all.html").read_text()
    assert [text.count(f'<th scope="row">{name}/run</th>') for name in ("a", "b")] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [{"arch": "of-long-ago"}, {"dropped": 1}, {"recipe": "first"}],
    ids=str,
)
def test_a_run_of_an_older_format_is_one_line(sweep, undrawn, capsys, change):
    path = sweep(seeds=1).path
    info = json.loads((path / "run.json").read_text())
    info["config"] |= change
    (path / "run.json").write_text(json.dumps(info))
    call(path)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nowhere",),
        ("--bogus",),
        ("x", "--merge", "y"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys):
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
