"""What batch norm's running averages cost it under a constant learning rate: lag, or dropout?

    python notebooks/tools/running_averages.py runs/RUN --out running-averages.json

A running average lags behind parameters that move. It is also collected in training, where dropout
adds to the variances, which evaluation without dropout then divides by (Li et al., "Understanding
the Disharmony between Dropout and Batch Normalization by Variance Shift", 2019). So every net of
batch norm that has a checkpoint is evaluated three times: with its running averages; with the
statistics of all training images after training, dropout on, which gains what the lag cost; and the
same without dropout, which gains what dropout cost.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cyclopts
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.analysis.tables import MEAN, Table, points
from jaxnorm.bench.__main__ import save
from jaxnorm.config import UserError
from jaxnorm.data import datasets
from jaxnorm.data.datasets import Dataset
from jaxnorm.runs.environment import processor
from jaxnorm.runs.runner import load_state
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.training.fit import predict
from jaxnorm.training.probes import precise_statistics
from jaxnorm.training.step import Program, TrainState, derive_key

BATCH = 125
WAYS = ("running", "with dropout", "without dropout")


def accuracies(
    program: Program, state: TrainState, dataset: Dataset, key: jax.Array
) -> dict[str, float]:
    """The test accuracy by running averages, and by statistics computed anew in both ways."""
    state = jax.tree.map(jnp.asarray, state)
    count = min(BATCH, len(dataset.train_labels))
    whole = dataset.train_images[: len(dataset.train_labels) // count * count]
    batches = whole.reshape(-1, count, 32, 32, 3)
    anew = [precise_statistics(program, state, batches, dropout) for dropout in (key, None)]
    states = [state, *(state._replace(norm_state=statistics) for statistics in anew)]
    guesses = [
        np.asarray(predict(program, state, dataset.test_images)).argmax(1) for state in states
    ]
    return {
        way: float((guess == dataset.test_labels).mean())
        for way, guess in zip(WAYS, guesses, strict=True)
    }


def table(values: Mapping[str, Any]) -> Table:
    """The accuracies, and how many points each cause costs, with 95 % t intervals."""
    nets = values["nets"].values()
    samples = [stats.Sample(tuple(net[way] for net in nets)) for way in WAYS]
    cells = [str(len(nets)), *map(stats.accuracy_text, samples)]
    for before, after in (WAYS[:2], WAYS[1:]):
        gain = stats.Sample(tuple(net[after] - net[before] for net in nets))
        interval = f" ({' to '.join(map(points, gain.interval))})" if gain.interval else ""
        cells.append(points(gain.mean) + interval)
    head = ["n", "running averages", "anew, with dropout", "anew, without"]
    note = f"Batch norm of {values['arch']} nets, {values['caption']}: test accuracy{MEAN}, seeds "
    note += f"{', '.join(values['nets'])}; 95 % t intervals. Statistics of all training images; "
    note += f"{values['device']}; jax {values['jax']}."
    return Table("Running averages", [*head, "cost of lag, points", "of dropout"], [cells], note)


def main(
    run: Path,
    data_dir: Path | None = None,
    allow_unverified: bool = False,
    out: Path | None = None,
) -> None:
    """Evaluates the nets of a run, prints the table, and writes the figures as JSON."""
    config, nets = RunDirectory(run).info().config, {}
    dataset = datasets.load(config.dataset, data_dir, allow_unverified=allow_unverified)
    for seed in config.seed_numbers:
        try:
            program, state = load_state(run, "batch", seed)
        except UserError as error:  # records alone, without a checkpoint
            print(error)
            continue
        key = derive_key(seed, "dropout", config.epochs + 1)
        nets[str(seed)] = accuracies(program, state, dataset, key)
        print(seed, nets[str(seed)], flush=True)
    if not nets:
        raise UserError(f"{run} has no trained net of batch norm with a checkpoint")
    values = {"arch": config.arch, "caption": dataset.caption, "device": processor()}
    values |= {"jax": jax.__version__, "nets": nets}
    print(table(values).plain())
    if out:
        save(out, values)


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
