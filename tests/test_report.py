"""The report command: tables from records, others' results beside them, and the README's tables."""

import json
import re
import shutil

import pytest

from jaxnorm import cli, figures, report
from jaxnorm.records import RunDirectory


def call(*arguments) -> int:
    return cli.run(report.app, [str(argument) for argument in arguments])


@pytest.fixture
def copy(tiny_run, scratch):
    target = scratch / "tiny"
    shutil.copytree(tiny_run.path, target)
    return target


def test_a_report_has_the_table_and_every_figure(copy, capsys):
    assert call(copy) == 0
    text = (copy / "report.md").read_text()
    assert text.startswith("# tiny\n\n| norm | parameters |")
    assert "| layer | 46,220 |" in text
    for name in re.findall(r"\(figures/(.+?)\)", text):
        assert (copy / "figures" / name).exists()
    assert text.count("](figures/") == 17
    assert "report.md: 17 figures" in capsys.readouterr().out


def test_others_results_stand_beside_ours_in_points(copy, scratch, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda directory: ([], []))
    theirs = {"study": {n: {"test_accuracy": [0.5, 0.2]} for n in ("batch", "group", "layer")}}
    (scratch / "r.json").write_text(json.dumps(theirs))
    assert call(copy, "--reference", scratch / "r.json") == 0
    lines = (copy / "report.md").read_text().splitlines()
    last = [each for each in RunDirectory(copy).epochs() if each.norm == "batch"][-1]
    row = [line for line in lines if line.startswith("| batch")][1]
    assert "| 50.00% / 20.00% |" in row
    assert row.endswith(f" / {100 * (last.test_accuracy - 0.2):+.2f} |")


def test_an_unfinished_run_is_reported_as_far_as_it_goes(copy, capsys):
    metrics = copy / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3]) + lines[3][:20])
    (copy / "examples.npz").unlink()
    assert call(copy) == 0
    text = (copy / "report.md").read_text()
    assert "| layer | not trained yet |" in text
    assert "0 of 2 epochs" in text
    assert "examples.npz is missing" in text
    assert "missing: " in capsys.readouterr().err


def test_readme_tables_are_written_between_their_marks_and_nowhere_else(
    copy, scratch, capsys, monkeypatch
):
    monkeypatch.setattr(figures, "draw", lambda directory: ([], []))
    readme = scratch / "README.md"
    readme.write_text("before\n<!-- table tiny -->\nold\n<!-- end -->\nafter\n")
    assert call(copy, "--readme", readme) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table tiny -->\n\n| norm |")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert call(copy, "--readme", readme) == 0
    assert readme.read_text() == text
    readme.write_text("no marks")
    assert call(copy, "--readme", readme) == 2
    assert "<!-- table tiny -->" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("nowhere",), ("--bogus",), ("x", "--reference", "y")])
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys):
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
