"""How far an unfinished run is, and bringing its records back to exactly that.

An epoch of a net is complete when its line is in `metrics.jsonl`; what a killed process wrote of
the next one is taken away. Where a record of a complete epoch is damaged, the epoch before it
counts.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxnorm import checkpoints, train
from jaxnorm.config import Config, Norm, UserError
from jaxnorm.records import Epoch, Net, RunDirectory, agree


class Begun(NamedTuple):
    """How far a net is."""

    epochs: int
    """Epochs that are complete."""
    state: train.TrainState | None
    """After them; None for the initial one, and for that of a finished net without checkpoints."""
    losses: np.ndarray
    """f32[epochs * steps]"""


NOTHING = Begun(0, None, np.zeros(0, np.float32))


def rewind(
    directory: RunDirectory,
    recipes: Mapping[Norm, train.Recipe],
    train_count: int,
    warn: Callable[[str], None],
) -> dict[Net, Begun]:
    """Finds how far each net of a run is, and takes away what is on disk beyond that.

    `warn` is told of what is damaged. Raises `UserError` where a line is no epoch's record.
    """
    config = directory.info().config
    lines: dict[Net, list[Epoch]] = {net: [] for net in config.nets}
    strays = 0
    for line in directory.epochs():
        own = lines.get((line.norm, line.seed))
        if own is not None and line.epoch == len(own) + 1 <= config.epochs:
            own.append(line)
        else:
            strays += 1
    if strays:
        warn(
            f"{strays} lines of metrics.jsonl are not of this run, or do not follow on another; "
            "they are dropped"
        )
    begun = {}
    for (norm, seed), own in lines.items():
        found = _newest(directory, config, recipes[norm], seed, own, train_count)
        if found.epochs < len(own):
            where = f"on from epoch {found.epochs}" if found.epochs else "back to the start"
            warn(
                f"{norm} norm, seed {seed}: what is on disk of epoch {len(own)} is damaged; going "
                f"{where}"
            )
        begun[norm, seed] = found
    kept = [each for net, own in lines.items() for each in own[: begun[net].epochs]]
    directory.rewind(_in_order(kept, config), {net: each.losses for net, each in begun.items()})
    for net, each in begun.items():
        checkpoints.forget_after(directory.checkpoints(*net), each.epochs)
    return begun


def put_in_order(directory: RunDirectory) -> None:
    """Sorts the lines of a run into one order, whichever nets trained at the same time: all norms
    of a seed before the next seed, and each net's epochs one after the other.
    """
    directory.rewind(_in_order(directory.epochs(), directory.info().config), {})


def _in_order(epochs: Sequence[Epoch], config: Config) -> list[Epoch]:
    place = {net: number for number, net in enumerate(config.nets)}
    return sorted(epochs, key=lambda each: (place[each.norm, each.seed], each.epoch))


def _newest(
    directory: RunDirectory,
    config: Config,
    recipe: train.Recipe,
    seed: int,
    lines: Sequence[Epoch],
    train_count: int,
) -> Begun:
    """The newest epoch of a net of which the line, the losses and the checkpoint are whole, and if
    it is the last the predictions too.
    """
    norm, path = recipe.model.norm, directory.checkpoints(recipe.model.norm, seed)
    steps = -(-(train_count - config.validation) // config.batch)
    try:
        losses = directory.step_losses(norm, seed)
    except UserError:
        losses = NOTHING.losses
    complete = min(len(lines), len(losses) // steps)
    if complete == config.epochs:
        try:
            whole = agree(*directory.predictions(norm, seed), lines[-1])
        except UserError:
            whole = False
        if whole and not path.is_dir():  # runs that were put together have no checkpoints
            return Begun(complete, None, losses[: complete * steps])
        complete -= not whole
    if complete == 0 or not path.is_dir():
        return NOTHING
    shapes = train.init_state.eval_shape(recipe, seed)._asdict()
    for epoch in reversed(checkpoints.epochs(path)):
        if 0 < epoch <= complete:
            with contextlib.suppress(checkpoints.Damaged):
                state = train.TrainState(**checkpoints.restore(path, epoch, shapes))
                return Begun(epoch, state, losses[: epoch * steps])
    return NOTHING
