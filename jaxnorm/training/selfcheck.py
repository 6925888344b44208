"""The check that this machine computes what it should, in seconds, before training.

Compilers err: jaxlib 0.10.2 silently sums wrongly on a CPU (jax-ml/jax#39103), and 0.10.1 does if
two reductions are fused. So the known case is run, and one step of the very program that will
train, a full batch and the ragged one, and its evaluation are compared with those of a net of
Flax's and XLA's own operators, in float32.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.config import Precision, Setting, Text
from jaxnorm.data.datasets import Dataset
from jaxnorm.data.download import Progress
from jaxnorm.model import arithmetic
from jaxnorm.model.cnn import MOMENTUM
from jaxnorm.training import mesh as meshes
from jaxnorm.training.experiment import Experiment, Group, compiled_settings
from jaxnorm.training.step import (
    Program,
    TrainState,
    crop_and_flip,
    derive_key,
    standardize,
    train_step,
)

ALLOWED: dict[Precision, tuple[float, float]] = {
    "float32": (1e-4, 5e-2),
    "tf32": (1e-2, 0.25),
    "bfloat16": (5e-2, 1.0),
}
"""The largest relative errors of losses, logits and running averages, and of gradients, that pass.

Two right programs round differently, and if a pre-activation lies within rounding of zero one
lets its gradient through and the other does not: that moves gradients by a percent. In bfloat16
right programs were found 70 % off, so that only a gradient of the wrong sign or size is seen; the
values for tf32 lie between by its bits, and were not measured.
"""
TRIES = 3
"""Batches to try: one that happens to agree badly is no proof, three are."""
EVALUATED = 100
"""Test images whose logits are compared."""
_ROWS = 40_000
_ONCE: Any = {"xla_backend_optimization_level": 0}
"""For the plain step, which runs once: it takes neither the time nor the rewrites of the program
that it checks.
"""


class WrongNumbers(ArithmeticError):
    """This installation computes wrongly: what disagreed, and by how much."""

    def __init__(self, *parts: str | Setting) -> None:
        super().__init__(Text(*parts))


@arithmetic.standard()
def self_check(experiment: Experiment, progress: Progress = lambda what, done, total: None) -> None:
    """Checks, before anything is trained, that this installation computes the nets of a sweep
    rightly, by the programs that will train them. Raises `WrongNumbers`.
    """
    check_compiler()
    noisy, programs = replace(experiment, dataset=with_noise(experiment.dataset)), {}
    for group in noisy.groups():
        programs.setdefault((group.norm, compiled_settings(group.config)), group)
    done = itertools.count()

    def tick() -> None:
        """Reports that one of a program's three comparisons is next."""
        progress("checking the arithmetic", next(done), 3 * len(programs))

    for group in programs.values():
        _check_group(replace(group, nets=group.nets[:1]), tick)


def with_noise(dataset: Dataset) -> Dataset:
    """Returns the data half as bright, with noise. Over flat areas activations tie, so that two
    right programs send the gradient of a maximum to different pixels, and a plain sum of thousands
    of equal values is off by 1e-4.
    """
    random = np.random.default_rng(0)
    train, test = (
        images // 2 + random.integers(0, 128, images.shape, np.uint8)
        for images in (dataset.train_images, dataset.test_images)
    )
    return replace(dataset, train_images=train, test_images=test)


def check_compiler() -> None:
    """Runs the known miscompilation; raises `WrongNumbers` if it is there."""

    def squares(numbers: jax.Array) -> jax.Array:
        """Returns the squared length of each row (i, 0, 0), by a product with the identity."""
        rows = jnp.stack((numbers, jnp.zeros_like(numbers), jnp.zeros_like(numbers)), axis=1)
        identity = jnp.eye(3, dtype=numbers.dtype)
        return jax.vmap(lambda row: jnp.sum((identity @ row) ** 2))(rows)

    numbers = np.arange(_ROWS, dtype=np.float32)
    wrong = int((np.asarray(jax.jit(squares)(numbers)) != numbers**2).sum())
    # Products in less than float32, which accelerators may be set to, are no miscompilation.
    if wrong and jax.default_backend() == "cpu":
        raise WrongNumbers(
            f"this jaxlib sums {wrong} of {_ROWS} rows wrongly "
            "(jax-ml/jax#39103): install another version, such as 0.10.1; ",
            Setting("skip_self_check", True),
            " trains all the same",
        )


def _check_group(group: Group, tick: Callable[[], None]) -> None:
    """Compares every place of the program, in each of which the group's one net trains."""
    initial = jax.tree.map(lambda leaf: leaf[0], meshes.fetch(group.states([None])))
    model = group.program.model.clone(fast=False, precision="float32")
    plain = replace(group.program, model=model)
    plain_step = jax.jit(partial(train_step, plain), compiler_options=_ONCE)
    allowed = ALLOWED[group.program.model.precision]
    for chunk_index in (0, -1):  # the first full batch, and the ragged one
        tick()
        problem = ""
        for epoch in range(1, TRIES + 1):
            problem = _compare_step(group, plain_step, initial, epoch, chunk_index, allowed)
            if not problem:
                break
        else:
            raise _wrong(f"one training step of {group.norm} norm", problem)
    tick()
    images = jnp.asarray(np.resize(group.experiment.dataset.test_images, (EVALUATED, 32, 32, 3)))
    wanted = np.asarray(
        jax.jit(partial(_plain_logits, plain), compiler_options=_ONCE)(initial, images)
    )
    for logits in group.evaluate(group.states([None]))[0].logits:
        error = _relative(logits[:EVALUATED], wanted[: len(logits)], 0)
        if error > 10 * allowed[0]:  # logits of the initial net nearly cancel
            problem = f"logits are {100 * error:.3g}% off"
            raise _wrong(f"the evaluation of {group.norm} norm", problem)


def _compare_step(
    group: Group,
    plain_step: Any,
    initial: TrainState,
    epoch: int,
    chunk_index: int,  # of the epoch's chunks, whose first batch is taken
    allowed: tuple[float, float],
) -> str:
    """Says in what a step of the training program and the plain step differ; empty for nothing."""
    dataset, config = group.experiment.dataset, group.config
    chunks, of_epoch = group.chunks(epoch)
    chunk = chunks[chunk_index]._replace(stop=chunks[chunk_index].start + 1)
    rows = meshes.fetch(chunk.batches)[0, chunk.start]
    seed, step = group.nets[0].seed, chunk.first_step + chunk.start
    images, key = dataset.train_images[rows], derive_key(seed, "dropout", epoch, step)
    if config.augment != "none":
        places = crop_and_flip(derive_key(seed, "augment", epoch, step), len(rows))
        down, across = map(np.asarray, places)
        images = images[np.arange(len(rows))[:, None, None], down[:, :, None], across[:, None]]
    wanted_state, loss, _ = plain_step(
        jax.tree.map(jnp.asarray, initial),
        jnp.asarray(images),
        jnp.asarray(dataset.train_labels[rows]),
        key,
        of_epoch[1][0, step],
        config.weight_decay,
    )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, wanted_state))):
        raise ArithmeticError(
            f"the first step of {group.norm} norm gives numbers that are not finite, in plain "
            "float32 too: is learning_rate= too large, or does the norm or its gradient divide by "
            "zero?"
        )
    states, steps = meshes.fetch(group.train_chunk(group.states([None]), chunk, of_epoch))
    problem = ""
    for k, losses in enumerate(steps.losses):
        ours = losses[chunk.start], jax.tree.map(lambda leaf, k=k: leaf[k], states)
        problem = problem or _disagreement(ours, (loss, wanted_state), initial, *allowed)
    return problem


def _plain_logits(program: Program, state: TrainState, images: jax.Array) -> Any:
    return program.model.apply(state.variables, standardize(state, images))


def _wrong(what: str, how: str) -> WrongNumbers:
    return WrongNumbers(
        f"{what} does not come out as in plain float32 ({how}): "
        "this jaxlib, or this machine, computes wrongly; try another "
        "version of jaxlib (",
        Setting("skip_self_check", True),
        " trains all the same)",
    )


def _disagreement(
    ours: tuple[Any, TrainState],  # the loss f32[] and the state after a step
    plain: tuple[Any, TrainState],
    initial: TrainState,
    forward: float = ALLOWED["float32"][0],
    backward: float = ALLOWED["float32"][1],
) -> str:
    """Says what differs most beyond what is allowed; empty if nothing does."""
    errors = {"the loss": (_relative(ours[0], plain[0], 0), forward)}
    trees = (jax.device_get(tree) for tree in (ours[1], plain[1], initial))
    leaves = map(jax.tree_util.tree_leaves_with_path, trees)
    arrays: dict[str, list[tuple]] = {}
    for (path, got), (_, wanted), (_, before) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        if name.startswith("norm_state"):
            # A norm's state is compared as a whole: if kernels sum to zero a mean is nearly
            # zero, and its error is to be small beside the deviation. And by what the batch adds
            # to it: a variance that is near the initial one hardly moves.
            name, before = name.rpartition(" ")[0], MOMENTUM * before
        arrays.setdefault(name, []).append((got, wanted, before))
    for name, parts in arrays.items():
        # Parameters as well as momenta move by the gradient, running averages by the statistics.
        limit = forward if name.startswith("norm_state") else backward
        joined = (np.concatenate([np.ravel(x) for x in side]) for side in zip(*parts, strict=True))
        errors[name] = _relative(*joined), limit
    name, (error, allowed) = max(errors.items(), key=lambda item: item[1][0] / item[1][1])
    return "" if error <= allowed else f"{name} is {100 * error:.3g}% off"


def _relative(got: Any, wanted: Any, before: Any) -> float:
    """Returns ||got - wanted|| / ||wanted - before||, infinite if that is no number."""
    got, wanted, before = (np.asarray(array, np.float64) for array in (got, wanted, before))
    moved = np.linalg.norm(wanted - before)
    # A step so small that float32 does not hold it tells nothing.
    floor = 1e-5 * np.linalg.norm(before) + 1e-12
    error = float(np.linalg.norm(got - wanted) / max(moved, floor))
    return error if np.isfinite(error) else float("inf")
