"""The README: its tables are what its command makes of the records, its pictures exist."""

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import fill_pages
import matplotlib
import numpy as np
import pytest
from answer import OTHERS, Answer
from matplotlib.image import imread

from jaxnorm.analysis import figures, stats, sweeps, tables
from jaxnorm.analysis.results import Run
from jaxnorm.config import RECIPES, TUNED_RATES, UserError
from jaxnorm.storage.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks" / "results"
DRAWN_BY = "3.11"
"""The Matplotlib that drew the committed figures."""


def test_every_marked_table_equals_what_the_records_say():
    values, marked = fill_pages.texts(), 0
    for page in fill_pages.PAGES:
        text = page.read_text()
        assert fill_pages.fill(text, values) == text, page.name
        marked += len(fill_pages.MARKED.findall(text))
    assert marked >= 9


@pytest.mark.parametrize("name", fill_pages.RUNS)
def test_the_figures_shown_equal_what_the_records_draw(name):
    """Pixel by pixel, but for a hundredth of them."""
    text = "".join(page.read_text() for page in fill_pages.PAGES)
    shown = sorted(set(re.findall(rf"results/{name}/figures/(.+?)\.png", text)))
    assert shown
    run = Run(RunDirectory(RESULTS / name))
    drawn = {}
    for figures_of in figures.FIGURES:
        with contextlib.suppress(UserError):  # of mistakes, whose logits a run need not keep
            drawn |= figures_of(run)
    for stem in shown:
        assert_same_picture(drawn[stem], RESULTS / name / "figures" / f"{stem}.png")


def assert_same_picture(figure, committed):
    new, old = imread(io.BytesIO(figures.png(figure))), imread(committed)
    assert new.shape == old.shape
    if not matplotlib.__version__.startswith(f"{DRAWN_BY}."):
        pytest.skip(f"needs Matplotlib {DRAWN_BY}: another one lays out text otherwise")
    assert (np.abs(new - old).max(-1) > 0.1).mean() < 0.01, committed


def test_the_front_pages_pictures_are_what_the_records_draw():
    answer = Answer()
    drawn = answer.figures()
    tuned = answer.tuned
    norms, rates, sizes = drawn["answer"].axes
    ends = {
        line.get_ydata()[0]: line.get_xdata() for line in norms.lines if line.get_marker() == "."
    }
    places = [label.get_text() for label in norms.get_yticklabels()]
    for norm in ("batch", "group", "layer"):
        np.testing.assert_array_equal(ends[places.index(norm) + 0.2], tuned.sample(norm).values)
    assert [axes.get_xlabel() for axes in (rates, sizes)] == ["learning rate", "batch size"]
    for line, norm in zip(drawn["curves"].axes[1].lines, ("batch", "group", "layer"), strict=True):
        assert line.get_label() == norm
        assert line.get_ydata()[-1] == tuned.sample(norm).mean
    for name, figure in drawn.items():
        assert_same_picture(figure, RESULTS / f"{name}.png")
    ((name, figure),) = sweeps.draw(answer.batch_sizes)
    assert_same_picture(figure, RESULTS / "batch-size" / f"{name}.png")


def test_the_ten_mistakes_of_a_norm_are_mistakes_of_its_net_shown_with_their_classes():
    axes, run = Answer().mistakes().axes[0], Answer().tuned
    words = [text.get_text().split("\n") for text in axes.texts if "\n" in text.get_text()]
    assert len(words) == len(axes.images) == 30
    assert all(true != predicted for true, predicted in words)
    for row, norm in enumerate(("batch", "group", "layer")):
        numbers = run.mistakes[f"mistakes-drawn-{norm}"]
        predicted = run.logits[norm][numbers].argmax(-1)
        pairs = zip(run.labels[numbers], predicted, strict=True)
        names = [[run.class_names[label] for label in pair] for pair in pairs]
        assert names == words[10 * row : 10 * row + 10]


def test_what_the_front_page_says_of_the_study_is_so():
    readme = (ROOT / "README.md").read_text()
    study, _ = json.loads((RESULTS / "reference.json").read_text()).values()
    ends = [f"{100 * study[norm]['test_accuracy'][-1]:.2f}" for norm in ("batch", "group", "layer")]
    assert "ended at {} %, group norm at {} and\nlayer norm at {}".format(*ends) in readme
    nets = RunDirectory(RESULTS / "original").info().layers
    kernels = {norm: sum(layer.kernel for layer in nets[norm]) for norm in nets}
    assert kernels == {"batch": 45_296, "group": 45_296, "layer": 12_524}
    share = f"{100 * kernels['layer'] / kernels['batch']:.0f} %"
    assert f"leave its kernels {share}" in readme


def test_the_front_page_says_three_sentences_of_one_interval_each():
    sentences = Answer().finding().splitlines()
    assert len(sentences) == 3
    for sentence in sentences:
        assert len(sentence.removeprefix("- ").split()) <= 35
        assert len(re.findall(r"\([^)]* to [^)]*\)", sentence)) == 1


def test_the_tables_of_other_norms_hold_every_net_of_each():
    runs = [Run(RunDirectory(RESULTS / name)) for name in OTHERS]
    lasts = {net: epochs[-1].test_accuracy for run in runs for net, epochs in run.finished.items()}
    table = fill_pages.by_seed(runs)
    cells = {
        (norm, int(seed)): cell
        for seed, *row in table.rows
        for norm, cell in zip(table.head[1:], row, strict=True)
        if cell
    }
    assert cells == {net: f"{last:.2%}" for net, last in lasts.items()}
    joined = fill_pages.joined([tables.results(run) for run in runs])
    assert [row[0] for row in joined.rows] == list(dict.fromkeys(norm for norm, _ in lasts))


@pytest.mark.parametrize("name", [*fill_pages.RUNS, *OTHERS])
def test_committed_runs_are_complete_and_say_what_data_they_saw(name):
    directory = RunDirectory(RESULTS / name)
    info = directory.info()
    assert "JPEG mirror, unverified data" in info.dataset.caption
    run = Run(directory)
    assert len({tuple(nets) for nets in run.summaries.values()}) == 1  # the same seeds: pairs
    assert list(run.finished) == info.config.nets
    for net, epochs in run.finished.items():
        assert [epoch.epoch for epoch in epochs] == list(range(1, 21))
        assert run.step_losses(*net).shape == (20 * 391,)
        one = run.predictions[net]
        assert epochs[-1].test_accuracy == (one.predicted == one.labels).mean()


@pytest.mark.parametrize("name", [*fill_pages.RUNS, *OTHERS])
def test_a_committed_run_was_trained_with_its_recipe_as_it_is_today(name):
    config = RunDirectory(RESULTS / name).info().config
    named = {field: getattr(config, field) for field in ("norm", "arch", "seed", "seeds")}
    today = RECIPES[config.recipe](**named)
    assert [today.rate(norm) for norm in config.norms] == [config.rate(n) for n in config.norms]
    # Rates of norms that it did not train may have been tuned since.
    assert dataclasses.replace(today, learning_rate=config.learning_rate) == config


def test_the_tuned_run_over_seeds_and_images_is_what_another_program_found():
    """Computed apart from this package, by the residuals of the table: points, and p-values."""
    run = Run(RunDirectory(RESULTS / "tuned"))
    both = [pair.crossed for pair in run.differences]
    ends = [[100 * end for end in (one.mean, *one.interval)] for one in both]
    wanted = [[0.4287, 0.1620, 0.6955], [0.5437, 0.1653, 0.9222], [0.1150, -0.1479, 0.3779]]
    np.testing.assert_allclose(ends, wanted, atol=6e-5)
    ps = [one.equivalence_p for one in both]
    np.testing.assert_allclose(ps, [0.291334, 0.599280, 0.004219], atol=1e-6)
    assert [pair.equivalent for pair in run.differences] == [False, False, True]
    spreads = [stats.spread(np.array(list(nets.values()))) for nets in run.correct.values()]
    parts = [[100 * x for x in (one.seen, one.independent, one.left)] for one in spreads]
    wanted = [[0.3118, 0.2409, 0.1979], [0.2242, 0.2503, 0], [0.2213, 0.2475, 0]]
    np.testing.assert_allclose(parts, wanted, atol=6e-5)
    chances = [pair.sample.next_above_zero for pair in run.differences]
    np.testing.assert_allclose(chances, [0.903674, 0.858641, 0.633904], atol=1e-6)


def test_the_recipes_learning_rates_are_what_the_tuning_found():
    tunings = Answer().tunings
    trials_of = sweeps.trials(tunings)
    best = {norm: max(trials, key=lambda t: t.accuracy).rate for norm, trials in trials_of.items()}
    assert best == TUNED_RATES
    assert len({tuple(trial.rate for trial in trials) for trials in trials_of.values()}) == 1
    assert not any(trial.failed for trials in trials_of.values() for trial in trials)
    for name, figure in sweeps.draw_tuning(tunings):
        assert_same_picture(figure, RESULTS / "tuning" / f"{name}.png")


def test_pictures_and_files_that_pages_name_exist():
    link = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
    links = [
        page.parent / to.partition("#")[0]
        for page in fill_pages.PAGES
        for to in [*link.findall(page.read_text()), *re.findall(r'src="(.+?)"', page.read_text())]
    ]
    assert len(links) > 15
    assert [link for link in links if not link.exists()] == []


def test_the_front_page_is_short_and_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 7_000
    assert "pip install . && python -m jaxnorm.run --norm all --dataset digits" in readme
    assert "pip install '.[test]' && pytest" in readme
