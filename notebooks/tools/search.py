"""The search for a better tuned recipe: what each change gives on held-out training images.

    python notebooks/tools/search.py train "Muon" --optimizer muon --norm batch --epochs 10 --seed 1
    python notebooks/tools/search.py time "Muon" --optimizer muon --norm batch

Both take changes of the recipe as flags, each with a value, and add a line to
`results/search.jsonl`. `train` trains one net on 45,000 images and judges it on the 5,000 others of
the training set; the test set has no part in it. `time` measures a training step with the change
beside one of the recipe, in turns. The recipe's own lines have the name "recipe".
"""

import json
import statistics
import sys
import time as clocks
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cyclopts
import jax
import numpy as np

from jaxnorm import UserError, fit, load, tuned
from jaxnorm.analysis import stats
from jaxnorm.analysis.tables import MEAN, Table, points
from jaxnorm.model import arithmetic
from jaxnorm.model.summary import count_parameters
from jaxnorm.runs.environment import git_revision, processor
from jaxnorm.training.experiment import program_of
from jaxnorm.training.fit import Callback, NonFiniteLoss
from jaxnorm.training.step import derive_key, init_state, standard_of, train_step

LINES = Path(__file__).resolve().parents[1] / "results" / "search.jsonl"
HELD_OUT, STEPS, ROUNDS = 5_000, 6, 8
RECIPE = "recipe"
app = cyclopts.App(help=__doc__)


class _Lines(Callback):
    def on_epoch(self, config: Any, epoch: Any) -> None:
        print(
            f"epoch {epoch.epoch} of {config.epochs}: training batches {epoch.train_accuracy:.2%}, "
            f"held out {epoch.validation_accuracy:.2%}, {epoch.train_seconds:.0f} s",
            flush=True,
        )


def _values(changes: Mapping[str, str]) -> dict[str, Any]:
    """The changes as values: JSON where it is JSON, else text."""
    values: dict[str, Any] = {}
    for flag, text in changes.items():
        try:
            values[flag.replace("-", "_")] = json.loads(text)
        except ValueError:
            values[flag.replace("-", "_")] = text
    return values


@app.command
def train(
    name: str,
    /,
    *,
    norm: str = "batch",
    epochs: int = 3,
    seed: int = 1,
    data_dir: Path | None = None,
    allow_unverified: bool = False,
    edit: str = "",
    **changes: str,
) -> None:
    """Trains a net with the changes and adds its line. `edit` says what else was changed."""
    values, fixed = _values(changes), {"norm": norm, "epochs": epochs, "seed": seed}
    config = tuned(**fixed, validation=HELD_OUT, **values)
    if len(config.nets) != 1:
        raise UserError("a line is of one net: one norm and one seed")
    if name == RECIPE and (values or edit):
        raise UserError(f"{RECIPE} is the name of the recipe without a change: choose another")
    data = load("cifar10", data_dir, allow_unverified=allow_unverified)
    net = fit(config, data, [_Lines()])[config.nets[0]]
    line = {"name": name, **fixed, "changes": values, "edit": edit, "data": data.caption}
    line |= {"validation": HELD_OUT, "parameters": net.parameters}
    line |= {"held_out": [epoch.validation_accuracy for epoch in net.epochs]}
    line |= {"train": [epoch.train_accuracy for epoch in net.epochs]}
    add({**line, "device": processor(), "jax": jax.__version__, "revision": git_revision()})


@app.command
def time(name: str, /, *, norm: str = "batch", **changes: str) -> None:
    """Times training steps with the changes and without, in turns, on one device and without crops
    and flips, and adds a line: the median of the ratios, by image. An edit of the code would change
    both sides.
    """
    random, values, sides = np.random.default_rng(0), _values(changes), []
    with arithmetic.standard():
        for config in (tuned(norm=norm), tuned(norm=norm, **values)):
            count, program = config.batch_size, program_of(config, norm, 10)
            images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            labels = random.integers(0, 10, count).astype(np.int32)
            state = init_state(program, 1, standard_of([0.5] * 3, [0.25] * 3))
            sides.append((partial(_steps, program, state, images, labels), count))
        seconds: list[list[float]] = [[], []]
        for turn in range(ROUNDS + 1):  # the first one compiles
            for place, (make_steps, count) in enumerate(sides):
                began = clocks.perf_counter()
                jax.block_until_ready(make_steps())
                seconds[place] += [(clocks.perf_counter() - began) / count] * (turn > 0)
    ratios = [changed / recipe for recipe, changed in zip(*seconds, strict=True)]
    line = {"name": name, "norm": norm, "changes": values}
    line |= {"parameters": count_parameters(program.model)}
    line |= {"step": statistics.median(ratios), "steps": sorted(ratios)}
    add({**line, "device": processor(), "jax": jax.__version__, "revision": git_revision()})


@partial(jax.jit, static_argnums=0)
def _steps(program: Any, state: Any, images: Any, labels: Any) -> Any:
    """Makes a few steps of training on one batch."""

    def step(number: Any, state: Any) -> Any:
        key = derive_key(1, "dropout", 1, number)
        return train_step(program, state, images, labels, key, 0.01, 5e-4)[0]

    return jax.lax.fori_loop(0, STEPS, step, state)


def add(line: Mapping[str, Any]) -> None:
    """Appends a line, and prints it."""
    text = json.dumps(line)
    with LINES.open("a") as file:
        file.write(text + "\n")
    print(text)


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each change, norm and number of epochs: accuracy on held-out images, and what it
    gained over the recipe by the same seeds. Of two lines of one net the later counts.
    """
    nets: dict[tuple[int, str, str], dict[int, Mapping[str, Any]]] = {}
    steps = {(line["name"], line["norm"]): line["step"] for line in lines if "step" in line}
    for line in lines:
        if "held_out" in line:
            of_change = nets.setdefault((line["epochs"], line["norm"], line["name"]), {})
            of_change[line["seed"]] = line
    rows = []
    for (epochs, norm, name), of_change in sorted(nets.items(), key=lambda item: item[0][:2]):
        recipe = nets.get((epochs, norm, RECIPE), {})
        ends = stats.Sample(tuple(net["held_out"][-1] for net in of_change.values()))
        fits = stats.Sample(tuple(net["train"][-1] for net in of_change.values()))
        gains = [
            net["held_out"][-1] - recipe[seed]["held_out"][-1]
            for seed, net in of_change.items()
            if seed in recipe
        ]
        gain = "" if name == RECIPE or not gains else points(float(np.mean(gains)))
        gain += f" (n = {len(gains)})" * (0 < len(gains) < len(of_change))
        step, (first, *_) = steps.get((name, norm)), of_change.values()
        row = [f"{name}, {norm}", str(epochs), ", ".join(map(str, sorted(of_change)))]
        row += [f"{first['parameters']:,}", stats.accuracy_text(ends), stats.accuracy_text(fits)]
        rows.append([*row, gain, "" if step is None else f"{step:.2f}"])
    data = sorted({line["data"] for line in lines if "data" in line})
    devices = sorted({f"{line['device']}, jax {line['jax']}" for line in lines})
    head = ["change, norm", "epochs", "seed numbers", "parameters", "held out", "training batches"]
    note = (
        f"Accuracy after the last epoch on {HELD_OUT:,} held-out training images{MEAN}; gain over "
        "the recipe by the same seeds, in points; a step's time as a multiple of the recipe's. "
        f"{', '.join(data)}; {'; '.join(devices)}."
    )
    return Table("The search", [*head, "gain", "step"], rows, note)


if __name__ == "__main__":
    try:
        app()
    except (UserError, NonFiniteLoss) as error:
        sys.exit(f"error: {error}")
