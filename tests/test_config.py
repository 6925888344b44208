"""The settings: defaults of the study, checks, JSON there and back."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnorm.config import ADDED, ALL, Config, UserError


def test_defaults_are_the_studys():
    config = Config()
    assert config.norms == ALL == ("batch", "group", "layer")
    assert (config.epochs, config.batch, config.learning_rate, config.momentum) == (
        20,
        128,
        0.01,
        0.9,
    )
    assert (config.dropout, config.groups, config.arch) == (0.1, 4, "original")


def test_digits_have_a_smaller_batch_unless_one_is_asked_for():
    assert Config(dataset="digits").batch == 32
    assert Config(dataset="digits", batch_size=64).batch == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm", "weight"),
        ("arch", "resnet"),
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 1e40),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("groups", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("seeds", 0),
        ("seeds", 2**32),
        ("validation", -1),
        ("dataset", ""),
        ("dataset", " cifar10"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_flag(field, value):
    with pytest.raises(UserError, match="--" + field.replace("_", "-")) as error:
        Config(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("norm", ["instance", "rms", "none"])
def test_norms_that_the_study_lacks_need_the_matched_net(norm):
    with pytest.raises(UserError, match="--arch matched"):
        Config(norm=norm)
    assert Config(norm=norm, arch="matched").norms == (norm,)


def test_seeds_are_consecutive_and_the_norms_of_a_seed_train_side_by_side():
    config = Config(seed=5, seeds=2, norm="all")
    assert list(config.seed_numbers) == [5, 6]
    assert config.nets == [(norm, seed) for seed in (5, 6) for norm in ALL]


@given(
    norm=st.sampled_from(["batch", "group", "layer", "all"]),
    epochs=st.integers(1, 10_000),
    learning_rate=st.floats(1e-9, 1e3),
    dropout=st.floats(0, 0.99),
    seed=st.integers(0, 2**32 - 1),
    dataset=st.text(min_size=1).filter(lambda text: text.strip() == text),
)
def test_json_there_and_back(**values):
    config = Config(**values)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_json_with_a_missing_unknown_or_wrong_field_is_refused_by_name(field):
    values = Config().to_json()
    without = {name: value for name, value in values.items() if name != field}
    if field in ADDED:
        assert Config.from_json(without) == Config()
    else:
        with pytest.raises(UserError, match=field):
            Config.from_json(without)
    with pytest.raises(UserError, match=f"{field}_too"):
        Config.from_json({**values, f"{field}_too": 1})
    with pytest.raises(UserError):
        Config.from_json({**values, field: ["wrong"]})


def test_json_that_is_no_object_is_refused():
    with pytest.raises(UserError, match="JSON object"):
        Config.from_json([1])


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3
