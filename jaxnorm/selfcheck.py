"""Does this machine compute what it should? Asked before training, and answered in seconds.

Compilers err: jaxlib 0.10.2 silently sums wrongly on a CPU (jax-ml/jax#39103), and 0.10.1 does
where two reductions are fused. So the known case is run, and one step of the very program that will
train is compared with the same step of a net of Flax's and XLA's own operators, in float32.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import train
from jaxnorm.config import Precision
from jaxnorm.devices import ONE

ALLOWED: dict[Precision, tuple[float, float]] = {
    "float32": (1e-4, 5e-2),
    "tf32": (1e-2, 0.25),
    "bfloat16": (5e-2, 1.0),
}
"""The largest relative errors of loss and running averages, and of gradients, that pass.

Two right programs round differently, and where a pre-activation lies within rounding of zero one
lets its gradient through and the other does not: that moves gradients by a percent. In bfloat16
right programs were found 70 % off, so that only a gradient of the wrong sign or size is seen; the
values for tf32 lie between by its bits, and were not measured.
"""
TRIES = 3
"""Batches to try: one that happens to agree badly is no proof, three are."""
_ROWS = 40_000
_ONCE: Any = {"xla_backend_optimization_level": 0}
"""Options for the plain step, which is compiled for a single use and little optimized, so that it
takes neither the time nor the rewrites of the program that it checks.
"""


class WrongNumbers(ArithmeticError):
    """This installation computes wrongly: what disagreed, and by how much."""


class Step(NamedTuple):
    """What one step from the initial state made, of one net or with a leading axis of several."""

    loss: jax.Array | np.ndarray  # f32[] or f32[K]
    state: train.TrainState


def check_compiler() -> None:
    """Runs the known miscompilation; raises `WrongNumbers` where it is there."""

    def squares(numbers: jax.Array) -> jax.Array:
        """The squared length of each row (i, 0, 0), by way of a product with the identity."""
        rows = jnp.stack((numbers, jnp.zeros_like(numbers), jnp.zeros_like(numbers)), axis=1)
        identity = jnp.eye(3, dtype=numbers.dtype)
        return jax.vmap(lambda row: jnp.sum((identity @ row) ** 2))(rows)

    numbers = np.arange(_ROWS, dtype=np.float32)
    wrong = int((np.asarray(jax.jit(squares)(numbers)) != numbers**2).sum())
    # Products in less than float32, which accelerators may be set to, are no miscompilation.
    if wrong and jax.default_backend() == "cpu":
        raise WrongNumbers(
            f"this jaxlib sums {wrong} of {_ROWS} rows wrongly (jax-ml/jax#39103): install another "
            "version, such as 0.10.1; --skip-self-check trains all the same"
        )


def check_step(
    recipe: train.Recipe,
    initial: train.TrainState,
    images: np.ndarray,  # u8[N, 32, 32, 3]
    labels: np.ndarray,  # i32[N]
    batches: np.ndarray,  # i32[S, B], rows of `images`
    dropout_key: jax.Array,
    step: Callable[[int], Step],
) -> None:
    """Compares `step(i)`, what each place of the training program makes of `batches[i]` from the
    initial state, with the plain step; raises `WrongNumbers` where each of `TRIES` batches
    disagrees.
    """
    model = recipe.model.clone(plain=True, precision="float32")
    plain = dataclasses.replace(recipe, model=model, layout=ONE)
    plain_step = jax.jit(partial(train.train_step, plain), compiler_options=_ONCE)
    worst = ""
    for i in range(min(TRIES, len(batches))):
        rows = batches[i]
        state, loss, _ = plain_step(
            jax.tree.map(jnp.asarray, initial),
            jnp.asarray(images[rows]),
            jnp.asarray(labels[rows]),
            jax.random.fold_in(dropout_key, i),
        )
        got, wanted = step(i), jax.device_get(Step(loss, state))
        places = [jax.tree.map(lambda leaf, k=k: leaf[k], got) for k in range(len(got.loss))]
        allowed = ALLOWED[recipe.model.precision]
        disagreements = [_disagreement(each, wanted, initial, *allowed) for each in places]
        worst = next(filter(None, disagreements), "")
        if not worst:
            return
    raise WrongNumbers(
        f"one training step of {recipe.model.norm} norm does not come out as in plain float32 "
        f"({worst}): this jaxlib, or this machine, computes wrongly; try another version of jaxlib "
        "(--skip-self-check trains all the same)"
    )


def _disagreement(
    ours: Step,
    plain: Step,
    initial: train.TrainState,
    forward: float = ALLOWED["float32"][0],
    backward: float = ALLOWED["float32"][1],
) -> str:
    """What differs most beyond what is allowed, in words; empty where nothing does."""
    errors = {"the loss": (_relative(ours.loss, plain.loss, 0), forward)}
    leaves = (
        jax.tree_util.tree_leaves_with_path(jax.device_get(each))
        for each in (ours.state, plain.state, initial)
    )
    for (path, got), (_, wanted), (_, before) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        # Parameters as well as momenta move by the gradient, running averages by the statistics.
        errors[name] = (
            _relative(got, wanted, before),
            forward if name.startswith("batch_stats") else backward,
        )
    name, (error, allowed) = max(errors.items(), key=lambda each: each[1][0] / each[1][1])
    return "" if error <= allowed else f"{name} is {100 * error:.3g}% off"


def _relative(got: Any, wanted: Any, before: Any) -> float:
    """||got - wanted|| / ||wanted - before||, infinite where it is no number."""
    got, wanted, before = (np.asarray(each, np.float64) for each in (got, wanted, before))
    moved = np.linalg.norm(wanted - before)
    # A step so small that float32 does not hold it tells nothing.
    floor = 1e-5 * np.linalg.norm(before) + 1e-12
    error = float(np.linalg.norm(got - wanted) / max(moved, floor))
    return error if np.isfinite(error) else float("inf")
