"""The check that this machine computes what it should, in seconds, before training.

Compilers err: jaxlib 0.10.2 silently sums wrongly on a CPU (jax-ml/jax#39103), and 0.10.1 does if
two reductions are fused. So the known case is run, and one step of the very program that will
train, a full batch and the ragged one, and its evaluation are compared with those of a net of
Flax's and XLA's own operators, in float32.
"""

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as waiting
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jaxnorm.config import Precision, Setting, Text
from jaxnorm.data import cache
from jaxnorm.data.datasets import Dataset
from jaxnorm.data.download import Progress
from jaxnorm.model import arithmetic
from jaxnorm.training import epoch as epochs
from jaxnorm.training import mesh as meshes
from jaxnorm.training.epoch import Chunk, augmented, epoch_keys
from jaxnorm.training.experiment import Experiment, Group, compiled_settings
from jaxnorm.training.step import (
    Program,
    TrainState,
    crop_and_flip,
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
_VARIABLES = ("XLA_", "DNNL_", "ONEDNN_", "TF_XLA_", "TF_ENABLE_")
"""How the variables begin that compiled code can depend on."""
_ONCE: Any = {"xla_backend_optimization_level": 0}
"""For the plain step, which runs once: it takes neither the time nor the rewrites of the program
that it checks.
"""


class WrongNumbers(ArithmeticError):
    """This installation computes wrongly: what disagreed, and by how much."""

    def __init__(self, *parts: str | Setting) -> None:
        super().__init__(Text(*parts))


@dataclass(frozen=True, eq=False)
class _Check:
    """The programs that train and evaluate a group's one net, and the plain net's."""

    group: Group

    @functools.cached_property
    def plain(self) -> Program:
        """The net of Flax's and XLA's own operators, in float32."""
        model = self.group.program.model.clone(fast=False, precision="float32")
        return replace(self.group.program, model=model)

    @functools.cached_property
    def plain_step(self) -> Any:
        """The plain net's step, of a full batch and of a ragged one that is filled up."""
        program = self.plain

        def step(state, images, labels, number, rate, decay, count):
            seed, epoch, step = number
            key, of_images = (jax.random.fold_in(key, step) for key in epoch_keys(seed, epoch))
            if program.augments:
                rows = jnp.arange(len(labels))
                images = augmented(images, rows, *crop_and_flip(of_images, len(labels)))
            return train_step(
                program, state, images, labels, key, rate, decay, axis=None, count=count
            )

        return jax.jit(step, compiler_options=_ONCE)

    @functools.cached_property
    def plain_logits(self) -> Any:
        """The plain net's evaluation of images."""

        def logits(state: TrainState, images: Any) -> Any:
            return self.plain.model.apply(state.variables, standardize(state, images))

        return jax.jit(logits, compiler_options=_ONCE)

    @functools.cached_property
    def lowered(self) -> list[Any]:
        """All programs as JAX gives them to the compiler; calling one later compiles no more."""
        group = self.group
        states = group.states([None])
        initial = jax.tree.map(lambda leaf: leaf[0], meshes.fetch(states))
        chunks, of_epoch = group.chunks(1)
        lowered = []
        for chunk in {chunk.batches.shape: chunk for chunk in chunks}.values():
            plain = _plain_inputs(group, initial, chunk, of_epoch, epoch=1)
            lowered.append(self.plain_step.lower(*plain))
            lowered.append(epochs.train_nets.lower(*group.arguments(states, chunk, of_epoch)))
        test = group.experiment.placed(group.mesh)[2:]
        lowered.append(epochs.evaluate_nets.lower(group.program, group.mesh, states, *test))
        images = np.zeros((EVALUATED, 32, 32, 3), np.uint8)
        return [*lowered, self.plain_logits.lower(initial, images)]

    @functools.cached_property
    def name(self) -> str:
        """The name of a pass: the SHA-256 of all that it depends on."""
        depends = [jax.__version__, jaxlib.version.__version__, cache.machine_name()]
        depends += [sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))]
        depends += [Path(__file__).read_bytes()]
        depends += [str(self.group.mesh), jax.local_device_count()]
        depends += [lowered.as_text() for lowered in self.lowered]
        return hashlib.sha256(repr(depends).encode()).hexdigest()


@arithmetic.standard()
def self_check(
    experiment: Experiment,
    progress: Progress = lambda what, done, total: None,
    passes: Path | None = None,
    recheck: bool = False,
) -> tuple[int, int]:
    """Checks, before anything is trained, that this installation computes the nets of a sweep
    rightly, by the programs that will train them. Raises `WrongNumbers`.

    On a CPU a pass is noted in the folder `passes`, and the programs of a net that passed before
    are not checked again, unless to `recheck` is asked for; accelerators, whose compilers tune
    themselves, always are. Returns how many nets were checked, and of how many.
    """
    checks: dict[tuple, _Check] = {}
    for group in experiment.groups():
        key = group.norm, compiled_settings(group.config)
        checks.setdefault(key, _Check(replace(group, nets=group.nets[:1])))
    if jax.default_backend() != "cpu":
        passes = None
    left = [check for check in checks.values() if recheck or not _passed(passes, check)]
    if not left:
        return 0, len(checks)
    done = itertools.count()

    def tick(what: str) -> None:
        """Reports which of a net's five steps is next."""
        progress(f"checking the arithmetic: {what}", next(done), 5 * len(left))

    tick("compiling")
    if passes is not None:
        for check in left:
            with contextlib.suppress(OSError):
                passes.joinpath(check.name).unlink(missing_ok=True)
    pool = ThreadPoolExecutor(max(2, jax.local_device_count()))
    try:
        compiling = [[pool.submit(low.compile) for low in check.lowered] for check in left]
        check_compiler()
        noisy = replace(experiment, dataset=with_noise(experiment.dataset))
        for number, (check, compiled) in enumerate(zip(left, compiling, strict=True)):
            if number:
                tick("compiling")
            while waiting(compiled, timeout=0.5).not_done:
                progress("checking the arithmetic: compiling", 5 * number, 5 * len(left))
            for program in compiled:
                program.result()
            _check_group(check, replace(check.group, experiment=noisy), tick)
            if passes is not None:
                _note(passes, check)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return len(left), len(checks)


def _passed(passes: Path | None, check: _Check) -> bool:
    """Returns whether a pass is noted; a note that is damaged, or another's, is none."""
    if passes is None:
        return False
    try:
        return (passes / check.name).read_text() == f"passed {check.name}\n"
    except (OSError, ValueError):
        return False


def _note(passes: Path, check: _Check) -> None:
    """Notes a pass, whole or not at all; if that fails, the next start checks again."""
    temporary = passes / f"{check.name}.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.write_text(f"passed {check.name}\n")
        temporary.replace(passes / check.name)


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


def _check_group(check: _Check, group: Group, tick: Callable[[str], None]) -> None:
    """Compares every place of the program, in each of which the group's one net trains."""
    tick("a full batch")
    states = group.states([None])
    initial = jax.tree.map(lambda leaf: leaf[0], meshes.fetch(states))
    allowed = ALLOWED[group.program.model.precision]
    for batch, what in ((0, "a ragged batch"), (-1, "evaluation")):  # the first and the last
        problem = ""
        for epoch in range(1, TRIES + 1):
            problem = _compare_step(check, group, initial, epoch, batch)
            if not problem:
                break
        else:
            raise _wrong(f"one training step of {group.norm} norm", problem)
        tick(what)
    images = np.resize(group.experiment.dataset.test_images, (EVALUATED, 32, 32, 3))
    wanted = np.asarray(check.plain_logits(initial, images))
    for logits in group.evaluate(states)[0].logits:
        error = _relative(logits[:EVALUATED], wanted[: len(logits)], 0)
        if error > 10 * allowed[0]:  # logits of the initial net nearly cancel
            problem = f"logits are {100 * error:.3g}% off"
            raise _wrong(f"the evaluation of {group.norm} norm", problem)


def _compare_step(check: _Check, group: Group, initial: TrainState, epoch: int, batch: int) -> str:
    """Says in what a step of the training program and the plain step differ, on the first batch of
    an epoch (0) or the last (-1); empty for nothing.

    Of AdamW and Muon the moments are compared, and not what they make of parameters: AdamW moves
    one as far if its gradient is nearly zero, and Muon scales the least directions of a gradient
    up, rounding and all.
    """
    chunks, of_epoch = group.chunks(epoch)
    start = 0 if batch == 0 else chunks[-1].stop - 1
    chunk = chunks[batch]._replace(start=start, stop=start + 1)
    plain = _plain_inputs(group, initial, chunk, of_epoch, epoch)
    wanted_state, loss, _ = jax.device_get(check.plain_step(*plain))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, wanted_state))):
        raise ArithmeticError(
            f"the first step of {group.norm} norm gives numbers that are not finite, in plain "
            "float32 too: is learning_rate= too large, or does the norm or its gradient divide by "
            "zero?"
        )
    states, steps = meshes.fetch(group.train_chunk(group.states([None]), chunk, of_epoch))
    allowed, problem = ALLOWED[group.program.model.precision], ""
    for k, losses in enumerate(steps.losses):
        ours = losses[chunk.start], jax.tree.map(lambda leaf, k=k: leaf[k], states)
        sides = ours, (loss, wanted_state), (loss, initial)
        if group.program.optimizer != "sgd":
            sides = ((value, state._replace(params=())) for value, state in sides)
        ours, wanted, (_, before) = sides
        kept = group.program.model.norm_momentum
        problem = problem or _disagreement(ours, wanted, before, *allowed, kept)
    return problem


def _plain_inputs(
    group: Group, initial: TrainState, chunk: Chunk, of_epoch: tuple, epoch: int
) -> tuple:
    """Returns what the plain step takes for the first batch of a chunk."""
    data, batches = group.experiment.dataset, meshes.fetch(chunk.batches)[0]
    rows, step = batches[chunk.start], chunk.first_step + chunk.start
    count = chunk.last
    if count is not None and chunk.start < len(batches) - 1:
        count = len(rows)
    number, rate = (group.nets[0].seed, epoch, step), of_epoch[1][0, step]
    images, labels = data.train_images[rows], data.train_labels[rows]
    return initial, images, labels, number, rate, group.config.weight_decay, count


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
    momentum: float = 0.9,  # of running averages
) -> str:
    """Says what differs most beyond what is allowed; empty if nothing does."""
    errors = {"the loss": (_relative(ours[0], plain[0], 0), forward)}
    trees = (jax.device_get(tree) for tree in (ours[1], plain[1], initial))
    leaves = map(jax.tree_util.tree_leaves_with_path, trees)
    arrays: dict[str, list[tuple]] = {}
    for (path, got), (_, wanted), (_, before) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=" ")
        if np.issubdtype(np.asarray(got).dtype, np.integer):
            if not np.array_equal(got, wanted):  # a norm's counter
                return f"{name}, a count, is off"
        elif name.startswith("norm_state"):
            # A norm's state is compared as a whole: if kernels sum to zero a mean is nearly
            # zero, and its error is to be small beside the deviation. And by what the batch adds
            # to it: a variance that is near the initial one hardly moves.
            name, before = name.rpartition(" ")[0], momentum * before
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
