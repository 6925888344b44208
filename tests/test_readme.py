"""The README: its tables are what its command makes of the records, its pictures exist."""

import re
from pathlib import Path

import pytest

from jaxnorm import bench, report
from jaxnorm.records import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks" / "results"


@pytest.mark.parametrize("name", ["original", "matched"])
def test_tables_equal_what_the_records_say(name):
    readme = (ROOT / "README.md").read_text()
    directory = RunDirectory(RESULTS / name)
    tables = [report.results_table(directory)]
    if name == "original":
        reference = report.read_reference(RESULTS / "reference.json")
        tables.append(report.comparison_table(directory, reference))
    for table in tables:
        assert f"-->\n\n{table}\n<!-- end -->" in readme


@pytest.mark.parametrize("name", ["speed", "scaling", "seeds"])
def test_speed_tables_equal_the_committed_benchmarks(name):
    values = bench.read(RESULTS / f"{name}.json")
    assert f"-->\n\n{bench.table(values)}\n<!-- end -->" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["original", "matched"])
def test_committed_runs_are_complete_and_say_what_data_they_saw(name):
    directory = RunDirectory(RESULTS / name)
    info = directory.info()
    assert "JPEG mirror, unverified data" in info.dataset["caption"]
    for norm in ("batch", "group", "layer"):
        epochs = [epoch for epoch in directory.epochs() if epoch.norm == norm]
        assert [epoch.epoch for epoch in epochs] == list(range(1, 21))
        assert directory.step_losses(norm, info.config.seed).shape == (20 * 391,)
        logits, labels = directory.predictions(norm, info.config.seed)
        assert epochs[-1].test_accuracy == (logits.argmax(1) == labels).mean()


def test_pictures_and_files_that_it_names_exist():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme)
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_two_commands_stand_in_it():
    readme = (ROOT / "README.md").read_text()
    assert "pip install . && python -m jaxnorm.run --norm all --dataset digits" in readme
    assert "pip install '.[test]' && pytest" in readme
