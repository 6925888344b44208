"""The report command: reports, and several runs side by side."""

import json
import os
from functools import partial

import helpers
import numpy as np
import pytest
from helpers import error_of

from jaxnorm import report
from jaxnorm.analysis import figures, inside

call = partial(helpers.call, app=report.app)


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which take the time."""
    monkeypatch.setattr(figures, "draw", lambda run: ([], []))


def test_one_run_is_reported_in_its_own_directory(sweep, capsys, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (figures.together,))
    path = sweep(seeds=1).path
    assert call(path) == 0
    assert (path / "report.html").exists()
    assert (path / "report.md").exists()
    assert "report.html: 2 figures" in capsys.readouterr().out
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


def test_out_overwrites_no_record(sweep, scratch, capsys, undrawn):
    path = sweep(seeds=1).path
    record = (path / "run.json").read_bytes()
    for out, wrong in ((scratch, "is a folder: name a file"), (path / "run.json", "is no page")):
        assert call(path, "--out", out) == 2
        assert f"--out {out} {wrong}" in error_of(capsys)
    assert (path / "run.json").read_bytes() == record


def test_a_name_that_is_not_utf_8_is_reported(sweep, undrawn):
    path = sweep(os.fsdecode(b"run\xff"), seeds=1).path
    assert call(path) == call(path, path, "--out", path / "page.html") == 0
    for name in ("report.md", "report.html"):
        assert "run\\udcff" in (path / name).read_text()


def test_runs_of_one_folder_name_have_a_row_each(sweep, scratch, undrawn):
    for name in ("a", "b"):
        (scratch / name).mkdir()
    paths = [sweep(f"{name}/run", seeds=1).path for name in ("a", "b")]
    assert call(*paths, "--out", scratch / "all.html") == 0
    text = (scratch / "all.html").read_text()
    assert [text.count(f'<th scope="row">{name}/run</th>') for name in ("a", "b")] == [1, 1]


def rewritten(path, file="run.json", **changes):
    """Changes fields of a record's JSON, or arrays of a record."""
    if file.endswith(".npz"):
        np.savez(path / file, **{**np.load(path / file), **changes})
        return
    info = json.loads((path / file).read_text())
    for name, value in changes.items():
        place, _, field = name.rpartition("__")
        (info[place] if place else info)[field] = value
    (path / file).write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"config__dropped": 1}, 2), ({"config__recipe": "first"}, 2), ({"config__arch": "gone"}, 0)],
    ids=str,
)
def test_unknown_settings_of_an_older_run_are_one_line_and_an_unknown_net_is_reported(
    sweep, undrawn, capsys, changes, code
):
    path = sweep(seeds=1).path
    rewritten(path, **changes)
    assert call(path) == code
    if code:
        error_of(capsys)
    assert not capsys.readouterr().err


def test_the_seeds_that_a_difference_takes_are_printed_and_nothing_is_written(sweep, capsys):
    path = sweep().path
    before = sorted(path.rglob("*"))
    assert call(path, "--detect", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    deviation = 100 * (7 / 3) ** 0.5 / 22
    assert [line.split()[3] for line in lines[2:5]].count(f"{deviation:.2f}") == 2
    assert call("--detect", "0.5", "--deviation", "1") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-5:-3] == ["1.00", "34"]
    assert sorted(path.rglob("*")) == before


PROBES = "nets/group-1/probes.npz"
SIZES = {"sizes": np.array([4, 8], np.int32)}
LONGER = {"kernels": np.array(["x"] * 2_000), "gradients": np.ones(2_000, "f4")}
LONGER |= {"initial_gradients": np.ones(2_000, "f4")}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"config__seeds": 3_333}, "9,996 of 9,999 nets are not finished, so they are left out"),
        ({"config__seeds": 10_000}, "names 3 norms and 30,000 nets: no more than 100 and 10,000"),
        ({"dataset__test_count": 10**9}, "is not one of 1,000,000,000 test images"),
        ({"dataset__train_count": 10**9}, "has not the losses of every batch"),
        ({"file": PROBES, **SIZES}, "the probes of group norm, seed 1, do not fit those of"),
        ({"file": PROBES, **LONGER}, "the probes of group norm, seed 1, do not fit those of"),
        ({"file": "examples.npz", "train_labels": np.arange(20) + 4}, "a label is none of"),
    ],
    ids=["nets", "many nets", "test images", "training images", "sizes", "kernels", "labels"],
)
def test_a_record_that_does_not_fit_run_json_is_one_line_and_stops_no_other_run(
    sweep, capsys, monkeypatch, changes, line
):
    drawn = (figures.seeds, figures.curves, inside.inside, inside.depth, figures.training_images)
    monkeypatch.setattr(figures, "FIGURES", drawn)
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # drawing takes the time
    good, bad = sweep("good", seeds=1).path, sweep("bad\x1b[2J", seeds=1).path
    rewritten(bad, **changes)
    assert call(bad, good) == 0
    printed = capsys.readouterr()
    lines = [one for one in printed.err.splitlines() if line in one]
    assert len(lines) == 1
    assert lines[0].startswith("missing: ")
    assert len(printed.err.splitlines()) <= 3
    assert "good/report.html: 8 figures" in printed.out
    pages = [path.read_text() for path in good.parent.glob("**/*.html")]
    assert max(map(len, pages)) < 1_000_000
    assert "\x1b" not in "".join([*pages, printed.err, printed.out])


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nowhere",),
        ("--bogus",),
        ("x", "--merge", "y"),
        ("--detect", "0.3"),
        ("--deviation", "0.3"),
        ("--deviation", "1", "--detect", "nan"),
        ("--deviation", "0", "--detect", "1"),
        ("--deviation", "1", "--detect", "1", "--out", "x.html"),
        ("nowhere", "--detect", "1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys):
    assert call(*arguments) == 2
    error_of(capsys)
