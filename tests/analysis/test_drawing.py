"""How figures look: every norm is told apart, whatever was drawn before or is configured."""

import matplotlib
import pytest
from matplotlib.figure import Figure

from jaxnorm.analysis import drawing, figures
from jaxnorm.analysis.results import Run

STUDY = ("batch", "group", "layer", "pixel", "instance", "rms", "none")


def test_any_number_of_norms_is_told_apart_in_colour_and_without():
    norms = [*STUDY, *(f"mine:Norm{number}" for number in range(30))]
    looks = [drawing.looks(norms)[norm] for norm in norms]
    assert len({look.colour for look in looks}) == len(norms)
    lines = [(look.marker, str(line)) for look in looks for line in (look.line, look.second)]
    assert len(set(lines)) == 2 * len(norms)


def test_a_norms_look_depends_on_the_norms_of_its_run_alone():
    first = drawing.looks(["mine:A", "batch"])
    drawing.looks(["mine:B", "mine:C"])
    assert drawing.looks(["batch", "mine:A"]) == first
    assert first["batch"] == drawing.looks([])["batch"]
    assert first["mine:A"].colour not in {drawing.looks([])[norm].colour for norm in STUDY}


@pytest.mark.parametrize("count", [2, 13])
def test_a_legend_shows_names_that_begin_with_an_underscore(count):
    norms = ["_mine:Norm", *(f"mine:Norm{number}" for number in range(1, count))]
    axes = Figure().subplots()
    for look in drawing.looks(norms).values():
        if look.label.strip() in norms:
            axes.plot([0, 1], [0, 1], **look.keywords)
    drawing.legend(axes)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text().strip() for text in legend.get_texts()] == norms


def test_norms_beside_a_place_do_not_reach_the_next_one():
    assert list(drawing.spread(3, 0.2)) == pytest.approx([-0.2, 0, 0.2])
    many = drawing.spread(13, 0.2)
    assert many[-1] - many[0] < 0.85


def test_figures_are_drawn_whatever_matplotlibrc_asks_for(sweep, monkeypatch):
    """LaTeX is asked for and is not there."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(figures, "FIGURES", (figures.together,))
    run = Run(sweep(norm="batch", seeds=1))
    plain, _ = figures.draw(run)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red"}):
        charts, missing = figures.draw(run)
        assert matplotlib.rcParams["text.usetex"]
    assert missing == []
    assert charts == plain
