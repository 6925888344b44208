"""The report: one file, valid, escaped, complete, and as far as the records go."""

import base64
import dataclasses
import html
import re
import shlex
import shutil

import html5lib
import pytest
from helpers import remove_nets

from jaxnorm.analysis import figures, page, tables
from jaxnorm.analysis.results import Run
from jaxnorm.config import NetId
from jaxnorm.storage.net import NetFolder


def parse(text):
    """The page as a tree; raises at the first error of HTML."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def test_the_page_is_one_valid_file_and_the_markdown_names_every_figure(sweep, unpainted):
    directory = sweep()
    part = page.write(directory)
    assert part.missing == []
    text = (directory.path / "report.html").read_text()
    tree = parse(text)
    (first,) = (element for element in tree.iter("div") if element.get("class") == "first")
    assert [element.text for element in first.iter("p")] == [part.headline]
    assert [image.get("alt") for image in first.iter("img")] == [part.accuracy[0].text]
    painted = base64.b64encode(b"a PNG").decode()
    addresses = [image.get("src") for image in tree.iter("img")]
    assert addresses == [f"data:image/png;base64,{painted}"] * len(part.charts)
    assert not re.findall(r"https?:|<script|<link|@import|url\(|srcset", text)
    assert "default-src 'none'" in text
    assert [element.text for element in tree.iter("h3")] == [
        *("Results", "All norms together", "Batch norm", "Group norm", "Layer norm"),
        "How it was made",
    ]
    without_mirrors = [make for make in tables.TABLES if make is not tables.mirrored]
    assert len(list(tree.iter("caption"))) == len(without_mirrors)
    names = {element.get("id") for element in tree.iter() if element.get("id")}
    links = [element.get("href") for element in tree.iter("a")]
    assert links
    assert all(link[0] == "#" and link[1:] in names for link in links)
    scrolled = [element for element in tree.iter("div") if element.get("class") == "scroll"]
    assert {element.get("tabindex") for element in scrolled} == {"0"}
    alts = [image.get("alt") for image in tree.iter("img")]
    assert all(alts)
    wrong = sum(min(10, 22 - correct) for correct in (16, 15, 12)) * 2
    wrong += len(part.run.mistakes["mistakes-common"])
    assert sum(alt.count("; true: ") for alt in alts) == wrong
    text = (directory.path / "report.md").read_text()
    assert text.startswith("# sweep\n\nWith one net in which only the norm differs, ")
    assert text.count("](figures/") == len(part.charts) == 23
    for name in re.findall(r"\(figures/(.+?)\)", text):
        assert (directory.path / "figures" / name).exists()
    assert (directory.path / "metrics.csv").read_text() == part.run.csv()


HOSTILE = ('<script>alert("x")</script>', "a\" onerror='b", "{{ 7 * 7 }} &amp;", "\u202e\u00fc|`")


def test_names_are_text_and_never_mark_up(sweep, tiny, unpainted):
    hostile = dataclasses.replace(tiny, class_names=HOSTILE, source=HOSTILE[0], name=HOSTILE[1])
    directory = sweep("<img src=x>", dataset=hostile, norm="batch", seeds=1)
    page.write(directory)
    text = (directory.path / "report.html").read_text()
    tree = parse(text)
    assert not list(tree.iter("script"))
    assert {image.get("src")[:5] for image in tree.iter("img")} == {"data:"}
    assert not [element for element in tree.iter() if element.get("onerror")]
    heads = {element.text for element in tree.iter("th")}
    assert set(HOSTILE) <= heads
    assert "<script" not in (directory.path / "report.md").read_text().replace("\\<", "")


def test_an_unfinished_run_is_reported_as_far_as_it_goes(sweep, unpainted):
    rows = {"batch": ((11, 16), (9,), (9,)), "group": ((9, 15),) * 3, "layer": ((5, 12),) * 3}
    directory = sweep(accuracies=rows)
    remove_nets(directory, "group-2")
    remove_nets(directory, "layer-2")
    NetFolder(directory, NetId("layer", 2)).lose(1, "the loss is not finite")
    (directory.path / "nets" / "group-3" / "result.npz").write_bytes(b"rubbish")
    (directory.path / "examples.npz").unlink()
    part = page.write(directory)
    for lost in (
        "batch norm, seed 2: 1 of 2 epochs are missing, so this net is left out",
        "group norm, seed 2: 2 of 2 epochs are missing, so this net is left out",
        "layer norm, seed 2, diverged in epoch 1, so this net is left out",
        "group-3/result.npz is damaged",
        "examples.npz is missing",
    ):
        assert sum(lost in line for line in part.missing) == 1
    assert not any("seed 1" in line for line in part.missing)
    tree = parse((directory.path / "report.html").read_text())
    items = [element.text for element in tree.iter("li")]
    assert set(part.missing) <= set(items)
    assert "batch norm ends at 72.7%" in part.finding  # 16 of 22, of seed 1 alone
    assert "- group norm, seed 2: 2 of 2 epochs are" in (directory.path / "report.md").read_text()


def test_a_net_that_was_killed_before_its_result_is_named(sweep, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    rows = {"batch": ((5, 9, 9), (5, 9))}
    directory = sweep(accuracies=rows, norm="batch", seeds=2, epochs=3)
    info = directory.info()
    remove_nets(directory, "batch-1")
    config = dataclasses.replace(info.config, epochs=2)
    directory.write_json("run.json", dataclasses.replace(info, config=config))
    assert page.read(directory).missing[1:] == [
        "batch norm, seed 1: 2 of 2 epochs are missing, so this net is left out",
        "batch norm, seed 2: its result is missing, so this net is left out",
    ]


@pytest.mark.parametrize("gone", ["nets", "nets/batch-1/result.npz", "examples.npz"])
def test_whatever_is_missing_or_damaged_there_is_a_page(sweep, gone, unpainted):
    directory = sweep(norm="batch", seeds=2)
    path = directory.path / gone
    for file in [path] if path.is_file() else path.rglob("*.npz"):
        file.write_bytes(b"rubbish")
    assert any(gone in line for line in page.write(directory).missing)
    parse((directory.path / "report.html").read_text())
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert page.write(directory).missing
    parse((directory.path / "report.html").read_text())


def test_folders_of_one_name_are_told_apart_by_the_shortest_ends_of_their_paths(scratch):
    paths = [scratch / name for name in ("a/run", "b/run", "b/c/other", "d/e/x", "f/e/x")]
    assert page.distinct(paths) == ["a/run", "b/run", "other", "d/e/x", "f/e/x"]


def test_several_runs_stand_on_one_page(sweep, scratch, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    runs = [Run(sweep(f"b{size}", batch_size=size, seeds=2)) for size in (4, 16)]
    parts = [page.read(run.directory) for run in runs]
    page.write_together(scratch / "both.html", parts, ["x <y> is missing"])
    tree = parse((scratch / "both.html").read_text())
    assert "Last test accuracy, side by side" in {element.text for element in tree.iter("caption")}
    assert "x <y> is missing" in {element.text for element in tree.iter("li")}


def test_the_page_is_there_before_its_figures_and_says_how_they_come(sweep, unpainted):
    directory = sweep()
    part = page.gather(Run(directory))
    page.write_first(part)
    first = (directory.path / "report.html").read_text()
    parse(first)
    assert "<img" not in first
    command = f"python -m jaxnorm.report {shlex.quote(str(directory.path))}"
    assert command in html.unescape(first)
    assert part.finding in html.unescape(first)
    page.finish(part)
    whole = (directory.path / "report.html").read_text()
    assert "being drawn" not in whole
    page.write(directory)
    assert (directory.path / "report.html").read_text() == whole
