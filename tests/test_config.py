"""The settings: defaults of the study, checks, JSON there and back."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnorm.config import (
    ALL,
    NORMS,
    OTHER_RATE,
    RECIPES,
    TUNED_RATES,
    USUAL_RATES,
    Config,
    UserError,
    from_json,
    study,
    tuned,
    typed,
)


def test_defaults_are_the_studys():
    config = Config()
    assert config.norms == ALL == ("batch", "group", "layer")
    rates = (config.epochs, config.batch_size, config.learning_rate, config.momentum)
    assert rates == (20, 128, 0.01, 0.9)
    assert (config.dropout, config.groups, config.arch) == (0.1, 4, "original")


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_a_recipe_has_a_smaller_batch_for_digits_unless_one_is_asked_for(recipe):
    config = recipe(dataset="digits")
    assert (config.batch_size, config.schedule) == (32, "one-cycle")
    assert recipe(dataset="digits", batch_size=64).batch_size == 64
    after = dataclasses.replace(config, dataset="cifar10")  # and nothing else
    assert dataclasses.replace(after, dataset="digits") == config
    assert after.batch_size == 32


WRONG = {
    "norm": ["../weight"],
    "arch": ["a b"],
    "precision": ["float16"],
    "epochs": [0, -1, 1.5, True],
    "batch_size": [0],
    "learning_rate": [0.0, math.nan, math.inf, 1e40],
    "momentum": [1.0, -0.1],
    "dropout": [0.99999999999, "0.1"],
    "groups": [0],
    "seed": [-1, 2**31],
    "seeds": [0, 2**32],
    "validation": [-1],
    "dataset": ["", " cifar10"],
    "test_split": ["", "../x"],
    "recipe": ["best"],
    "schedule": ["step"],
    "optimizer": ["lion"],
    "warmup": [0.0],
    "weight_decay": [-1e-4],
    "augment": ["mixup"],
    "label_smoothing": [1.0],
    "nesterov": [1],
    "ghost_size": [0],
    "alpha": [0.0, 1e3],
    "norm_momentum": [1.0, -0.1],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_setting(field):
    for value in WRONG[field]:
        with pytest.raises(UserError, match=re.escape(f"{field}={value}")) as error:
            Config(**{field: value})
        assert "\n" not in str(error.value)


def test_seeds_are_consecutive_and_the_norms_of_a_seed_train_side_by_side():
    assert Config("layer,a.all:C,batch").norms == ("layer", "a.all:C", "batch")
    assert Config("all,a.b:C").norms == (*ALL, "a.b:C")
    assert Config("every").norms == tuple(NORMS)
    assert Config("every").norm == ",".join(NORMS)  # more may join the table later
    config = Config(seed=5, seeds=2, norm="all")
    assert list(config.seed_numbers) == [5, 6]
    assert config.nets == [(norm, seed) for seed in (5, 6) for norm in ALL]


@given(
    norm=st.sampled_from(["batch", "group", "layer", "all"]),
    epochs=st.integers(1, 10_000),
    learning_rate=st.floats(1e-9, 1e3),
    dropout=st.floats(0, 0.99),
    seed=st.integers(0, 2**31 - 1),
    dataset=st.text(min_size=1).filter(lambda text: text.strip() == text),
)
def test_json_there_and_back(**values):
    config = Config(**values)
    assert from_json(Config, json.dumps(dataclasses.asdict(config))) == config


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_json_with_an_unknown_or_wrong_field_is_refused_by_name(field):
    values = dataclasses.asdict(Config())
    with pytest.raises(UserError, match=f"{field}_too"):
        from_json(Config, json.dumps({**values, f"{field}_too": 1}))
    with pytest.raises(UserError, match=field):
        from_json(Config, json.dumps({**values, field: [["wrong"]]}))


@typed
class Inner:
    number: float


@typed
class Outer:
    inner: Inner
    names: list[str]
    pair: tuple[int, int]
    counts: dict[str, int]
    note: str | None = None


GOOD = {"inner": {"number": 1}, "names": ["a"], "pair": [1, 2], "counts": {"x": 3}}


def test_typed_json_is_read_all_the_way_down():
    outer = from_json(Outer, json.dumps(GOOD))
    assert outer == Outer(Inner(1.0), ["a"], (1, 2), {"x": 3})
    wrong = {
        "inner": [{}, {"number": "1"}, {"number": True}, {"number": math.inf}, 3],
        "names": ["a", [1], None],
        "pair": [[1], [1, 2, 3], [1, 2.5]],
        "counts": [{"x": 1.5}, []],
        "note": [3],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(UserError, match=name):
                from_json(Outer, json.dumps({**GOOD, name: value}))
    with pytest.raises(UserError, match="field inner is missing"):
        from_json(Outer, json.dumps({"names": []}))


NAMES = "it must be a name, or several with commas alone between them"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nonsense": 1}, "unknown field: nonsense"),
        ({"arch": "a b"}, "arch=a b is wrong: it must be a name"),
        ({"norm": "batch,"}, f"norm=batch, is wrong: {NAMES}"),
        ({"norm": "batch, group"}, f"norm=batch, group is wrong: {NAMES}"),
        ({"norm": "all,batch"}, "norm=all,batch is wrong: a norm is there twice"),
        (
            {"learning_rate": {"group": 0.1, "batch": -1.0}},
            "learning_rate.batch=-1.0 is wrong: input should be greater than 0",
        ),
        ({"epochs": 0}, "epochs=0 is wrong: input should be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_said_in_our_own_words(wrong, message):
    with pytest.raises(UserError) as error:
        from_json(Config, json.dumps(wrong))
    assert str(error.value) == message


@pytest.mark.parametrize("text", ["[1]", "null", "{", "[" * 100_000, b"\xff"], ids=len)
def test_json_that_is_no_object_is_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        from_json(Config, text)
    assert "\n" not in str(error.value)


def test_a_recipe_sets_what_is_not_asked_for():
    config = tuned()
    assert (config.arch, config.schedule, config.augment) == ("residual", "one-cycle", "crop-flip")
    assert config.nesterov is config.weight_standardization is True
    assert study() == Config()
    assert config.rate("batch") == TUNED_RATES["batch"]
    asked = tuned(weight_standardization=False, learning_rate=0.3, dropout=0.2)
    assert (asked.weight_standardization, asked.rate("group"), asked.dropout) == (False, 0.3, 0.2)


def test_linear_scaling_divides_by_the_batch_that_the_rate_is_for():
    assert tuned(batch_size=16, linear_scaling=True).rate("batch") == TUNED_RATES["batch"] / 8
    digits = {"dataset": "digits", "linear_scaling": True}
    assert [study(**digits, batch_size=size).rate("batch") for size in (32, 64)] == [0.05, 0.1]


def test_norms_of_which_a_recipe_tuned_no_rate_are_recorded():
    norm = "batch,mine:Other,mine:Norm"
    assert tuned(norm=norm).untuned == ("mine:Other", "mine:Norm")
    assert tuned(norm=norm).rate("mine:Norm") == OTHER_RATE
    under_muon = tuned(norm=norm, optimizer="muon")
    assert under_muon.untuned == tuple(norm.split(","))
    assert under_muon.learning_rate == study(optimizer="muon").learning_rate == USUAL_RATES["muon"]
    assert tuned(norm="batch", arch="attention").untuned == ("batch",)
    asked = tuned(norm=norm, optimizer="adamw", learning_rate=0.1)
    assert asked.learning_rate == 0.1
    for config in (tuned(), tuned(norm=norm, learning_rate=0.1), study(norm=norm), asked):
        assert config.untuned == ()
    with pytest.raises(UserError, match=r"call tuned\(\) instead"):
        Config(recipe="tuned")
    with pytest.raises(UserError, match="learning_rate= has no rate for mine:Norm norm"):
        dataclasses.replace(tuned(), norm="batch,mine:Norm")
