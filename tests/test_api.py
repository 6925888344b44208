"""The study from Python: what a user gets, and hears of a mistake."""

import dataclasses
import os

import numpy as np
import pytest

import jaxnorm
from jaxnorm import api
from jaxnorm.config import Config, UserError, study, tuned
from jaxnorm.runs import runner


@pytest.fixture
def quick(monkeypatch):
    """Nothing is trained, checked or kept."""
    monkeypatch.setattr(api.job, "keep_compiled", lambda: None)
    monkeypatch.setattr(api.job, "check_arithmetic", lambda *_: "skipped")
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("it was trained"))


def settings(**changes) -> Config:
    return study(arch="three-layers", dataset="tiny", epochs=1, batch_size=16, **changes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"train_labels": np.arange(70) + 1}, "train_labels[3] is 4, but the labels of 4 classes"),
        ({"test_labels": -np.ones(22, int)}, "test_labels[0] is -1, but the labels of 4 classes"),
        ({"train_images": np.zeros((70, 32, 32, 3))}, "train_images must be uint8[N, 32, 32, 3]"),
        ({"test_labels": np.zeros(21, int)}, "test_labels must be whole numbers from 0, int[22]"),
        ({"test_labels": np.zeros((22, 1), int)}, "test_labels[:, 0] converts it"),
        ({"train_labels": [0, 1]}, "train_labels is no array but a list"),
        ({"class_names": ("only",)}, "but the labels of 1 classes are 0 to 0"),
    ],
)
def test_data_of_other_shapes_types_or_labels_are_refused(tiny, changes, what):
    with pytest.raises(UserError) as error:
        jaxnorm.fit(settings(), dataclasses.replace(tiny, **changes))
    assert what in str(error.value)


def test_what_is_no_dataset_is_refused(quick, tmp_path):
    with pytest.raises(UserError, match="dataset is a str: give what"):
        jaxnorm.train(settings(), "tiny", out=tmp_path / "run")


@pytest.mark.parametrize("name", ["train_images", "test_images", "train_labels", "test_labels"])
def test_arrays_that_were_changed_do_not_pass_as_those_that_were_loaded(
    quick, tiny, tmp_path, name
):
    other = dataclasses.replace(tiny, **{name: getattr(tiny, name)[::-1].copy()})
    with pytest.raises(UserError, match="are not those that were loaded: save"):
        jaxnorm.train(settings(), other, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_of_classes_are_part_of_the_fingerprint_of_a_file(tmp_path, tiny):
    arrays = {name: getattr(tiny, name) for name in ("train_images", "train_labels")}
    arrays |= {name.replace("train", "test"): array for name, array in arrays.items()}
    np.savez(tmp_path / "own.npz", class_names=tiny.class_names, **arrays)
    own = jaxnorm.load(tmp_path / "own.npz")
    own.check_unchanged()
    with pytest.raises(UserError, match="are not those that were loaded"):
        dataclasses.replace(own, class_names=own.class_names[::-1]).check_unchanged()


def test_an_interrupted_training_says_how_it_goes_on(monkeypatch, tiny, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api.job, "keep_compiled", lambda: None)
    monkeypatch.setattr(api.job, "check_arithmetic", lambda *_: "skipped")
    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        jaxnorm.train(settings(), tiny, out=tmp_path / "run", quiet=True)
    (note,) = stopped.value.__notes__
    assert note == f"complete epochs are kept: out={str(tmp_path / 'run')!r} goes on"


def test_a_run_stays_what_it_is_in_another_directory(made_up, monkeypatch, tmp_path):
    monkeypatch.chdir(made_up.directory.path.parent)
    run = jaxnorm.Run(made_up.directory.path.name)
    os.chdir(tmp_path)
    assert len(run.metrics) == 18
    assert "batch norm ends" in run.finding


def test_a_run_without_a_finished_net_has_no_figures(sweep):
    directory = sweep(accuracies={"group": ((5,),)}, norm="group", seeds=1)
    run = jaxnorm.Run(directory.path)
    assert len(run.figures) == 0
    with pytest.raises(KeyError, match="'accuracy' is none of "):
        run.figures["accuracy"]


def test_tables_and_figures_are_legible_at_a_prompt(made_up):
    run = jaxnorm.Run(made_up.directory.path)
    assert repr(run.results) == str(run.results) == run.results.plain()
    assert repr(run.figures["accuracy"]).startswith("<Chart accuracy: ")
    assert len(repr(run.figures["accuracy"])) < 1_000


def test_words_of_an_own_norm_are_escaped_in_markdown():
    text = api.Markdown("__main__:OwnNorm norm")
    assert text._repr_markdown_() == r"\_\_main\_\_:OwnNorm norm"
    assert text == "__main__:OwnNorm norm"


@pytest.mark.parametrize("recipe", [study, tuned])
@pytest.mark.parametrize("changes", [{"norm": ["batch", "group"]}, {"optimizer": ["sgd"]}])
def test_a_setting_of_another_type_is_a_mistake_of_the_users(recipe, changes):
    with pytest.raises(UserError, match="is wrong: "):
        recipe(**changes)


def test_a_seed_is_a_number(made_up):
    with pytest.raises(UserError, match="has no checkpoint of group norm, seed '1'"):
        jaxnorm.Run(made_up.directory.path).predict("group", "1")


def test_a_norm_that_is_none_is_refused_as_such_on_the_studys_nets(tiny):
    with pytest.raises(UserError, match="norm=bacth is wrong: choose batch, group, layer, pixel"):
        jaxnorm.fit(study(norm="bacth", dataset="tiny", batch_size=16), tiny)
    with pytest.raises(UserError, match="norm=pixel has no net in the study"):
        jaxnorm.fit(study(norm="pixel", dataset="tiny", batch_size=16), tiny)


def test_the_package_lists_its_names():
    assert {"train", "Run", "study", "tuned", "norms"} <= {*dir(jaxnorm)}
    assert "importlib" not in dir(jaxnorm)
