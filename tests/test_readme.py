"""The README: its tables are what its command makes of the records, its pictures exist."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from jaxnorm import figures, page, report, tables
from jaxnorm.records import RunDirectory
from jaxnorm.results import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks" / "results"


def texts_of(name):
    """What the command in the README writes there of a committed run."""
    run = Run(RunDirectory(RESULTS / name))
    part = page.RunPart(name, run, finding=tables.finding(run))
    for make in (tables.results, tables.differences, tables.values):
        part.tables[make.__name__] = make(run)
    return report.readme_texts(part, report.read_reference(RESULTS / "reference.json"))


def test_tables_equal_what_the_records_say():
    readme = (ROOT / "README.md").read_text()
    texts = texts_of("original") | texts_of("matched")
    for name in ("speed", "scaling", "seeds"):
        texts[name] = tables.speed(tables.read_benchmark(RESULTS / f"{name}.json")).markdown()
    texts["faults"] = tables.faults(tables.read_faults(RESULTS / "faults.jsonl")).markdown()
    marked = re.findall(r"<!-- table (.+?) -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    assert len(marked) >= 9
    for name, written in marked:
        assert written == f"\n{texts[name]}\n", name


@pytest.mark.parametrize("name", ["original", "matched"])
def test_the_figures_shown_equal_what_the_records_draw(name):
    """Pixel by pixel, but for a hundredth of them that another Matplotlib may draw otherwise."""
    shown = re.findall(rf"results/{name}/figures/(.+?)\.png", (ROOT / "README.md").read_text())
    assert shown
    run = Run(RunDirectory(RESULTS / name))
    drawn = {stem: figure for figures_of in figures.FIGURES for stem, figure in figures_of(run)}
    for stem in shown:
        new = imread(io.BytesIO(figures.png(drawn[stem])))
        committed = imread(RESULTS / name / "figures" / f"{stem}.png")
        assert new.shape == committed.shape
        assert (np.abs(new - committed).max(-1) > 0.1).mean() < 0.01, stem


@pytest.mark.parametrize("name", ["original", "matched"])
def test_committed_runs_are_complete_and_say_what_data_they_saw(name):
    directory = RunDirectory(RESULTS / name)
    info = directory.info()
    assert "JPEG mirror, unverified data" in info.dataset["caption"]
    run = Run(directory)
    assert list(run.finished) == info.config.nets
    for net, epochs in run.finished.items():
        assert [epoch.epoch for epoch in epochs] == list(range(1, 21))
        assert directory.step_losses(*net).shape == (20 * 391,)
        logits, labels = directory.predictions(*net)
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
