"""The search for a better recipe: its lines, and what its table makes of them."""

import dataclasses
import json

import pytest
import search

from jaxnorm import UserError, load


def line(name, seed, held_out, **more):
    about = {"norm": "batch", "epochs": 3, "parameters": 48208, "validation": 5000}
    about |= {"data": "pixels", "device": "one core", "jax": "1", "train": [0.1]}
    return {"name": name, "seed": seed, "held_out": [0.1, held_out], **about, **more}


def test_a_change_gains_over_the_recipe_by_the_same_seeds_alone():
    lines = [line("recipe", 1, 0.70), line("recipe", 2, 0.80)]
    lines += [line("Muon", 2, 0.81), line("Muon", 3, 0.90), line("Muon", 2, 0.5, epochs=10)]
    lines += [{"name": "Muon", "norm": "batch", "step": 1.254, "device": "one core", "jax": "1"}]
    rows = {(row[0], row[1]): row[2:] for row in search.table(lines).rows}
    assert rows["Muon, batch", "3"][0] == "2, 3"
    assert rows["Muon, batch", "3"][-2:] == ["+1.00 (n = 1)", "1.25"]
    assert rows["Muon, batch", "10"][-2:] == ["", "1.25"]  # no net of the recipe beside it
    assert rows["recipe, batch", "3"][2] == "75.00% ± 7.07"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Muon", {"norm": "batch,group"}),
        ("Muon", {"seeds": "2"}),
        ("recipe", {"learning-rate": "0.1"}),
        ("Muon", {"learning-rates": "0.1"}),
    ],
)
def test_what_would_be_no_line_is_refused_before_any_data_is_loaded(name, changes, monkeypatch):
    monkeypatch.setattr(search, "load", None)
    with pytest.raises(UserError):
        search.train(name, **changes)


@pytest.mark.slow
def test_a_trained_net_and_a_timing_add_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "LINES", tmp_path / "search.jsonl")
    monkeypatch.setattr(search, "ROUNDS", 2)
    monkeypatch.setattr(search, "HELD_OUT", 200)
    digits = dataclasses.replace(load("digits"), name="cifar10")
    monkeypatch.setattr(search, "load", lambda *_, **__: digits)
    change = {"optimizer": "muon", "learning_rate": "0.05"}
    search.train("Muon", norm="layer", epochs=2, batch_size="32", **change)
    search.time("Muon", norm="layer", **change)
    net, timing = map(json.loads, search.LINES.read_text().splitlines())
    assert timing["changes"] == {"optimizer": "muon", "learning_rate": 0.05}
    assert net["changes"] == {**timing["changes"], "batch_size": 32}
    assert net["parameters"] == timing["parameters"] == 48208
    assert len(net["held_out"]) == 2
    assert 0.3 < net["held_out"][-1] <= 1
    assert len(timing["steps"]) == 2
    assert search.table([net, timing]).rows[0][0] == "Muon, layer"
