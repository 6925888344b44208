"""How far an unfinished run is, and bringing its records back to exactly that.

An epoch of a net is complete when its line is in `metrics.jsonl`; what a killed process wrote of
the next one is written again. A record that cannot be read raises OSError. A record that is wrong
is set aside, never deleted, and the epoch before it counts.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxnorm.config import Config, NetId, UserError
from jaxnorm.records import Epoch, RunInfo, belongs
from jaxnorm.storage import checkpoint
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.training.experiment import program_of
from jaxnorm.training.fit import NetProgress
from jaxnorm.training.step import TrainState, init_state


def find_progress(
    run: RunDirectory, info: RunInfo, config: Config, warn: Callable[[str], None]
) -> dict[NetId, NetProgress]:
    """Finds how far each net of a run is, and makes the lines of `metrics.jsonl` be just that.

    `config` may have more epochs or seeds than the run had. `warn` is told of what is set aside.
    """
    lines, wrong = run.read_epochs()
    kept: dict[NetId, list[Epoch]] = {net: [] for net in config.nets}
    for line in sorted(lines, key=lambda line: line.epoch):
        before = kept.get(line.net)
        if before is not None and line.epoch == len(before) + 1 <= config.epochs:
            before.append(line)
    strays = len(lines) - sum(map(len, kept.values()))
    if wrong or strays:
        aside = run.set_aside("metrics.jsonl")
        warn(
            f"{len(wrong)} damaged and {strays} other lines of metrics.jsonl do not follow on one; "
            f"they are kept in {aside}"
        )
    progress, lost = {}, []
    for net, epochs in kept.items():
        progress[net] = _progress_of(run, info, config, net, epochs, warn)
        complete = progress[net].epochs
        if complete < len(epochs):
            text = f"resumes after epoch {complete}" if complete else "starts again"
            last = f"{net[0]} norm, seed {net[1]}: a record of epoch {len(epochs)}"
            lost.append(f"{last} is damaged; {text}")
        del epochs[complete:]
    if lost:
        run.set_aside("metrics.jsonl")
        warn("; ".join(lost))
    run.write_epochs(in_order(config, [line for epochs in kept.values() for line in epochs]))
    return progress


def in_order(config: Config, epochs: Sequence[Epoch]) -> list[Epoch]:
    """Lines in one order, whichever nets trained at the same time: all norms of a seed before the
    next seed, and each net's epochs one after the other.
    """
    place = {net: number for number, net in enumerate(config.nets)}
    return sorted(epochs, key=lambda line: (place[line.net], line.epoch))


def _progress_of(
    run: RunDirectory,
    info: RunInfo,
    config: Config,
    net: NetId,
    lines: Sequence[Epoch],
    warn: Callable[[str], None],
) -> NetProgress:
    """The newest epoch of which everything is whole; a finished net needs no checkpoint."""
    if lines and len(lines) == config.epochs:
        try:
            losses = run.step_losses(net)
            whole = len(losses) == config.epochs * config.steps(info.dataset.train_count)
            if whole and belongs(*run.predictions(net), lines[-1]):
                return NetProgress(len(lines), None, losses)
        except UserError:
            pass  # it is written again, from the checkpoint
    for epoch in reversed(checkpoint.epochs(run, net)):
        if epoch > len(lines):
            continue
        try:
            values = checkpoint.restore(run, net, epoch, checkpoint_shapes(info, net))
        except checkpoint.Damaged as error:
            warn(f"{error}; it is kept as {checkpoint.set_aside(run, net, epoch)}")
            continue
        logits, labels = values["logits"], values["labels"]
        if belongs(logits, labels, lines[epoch - 1]):
            run.write_net("step_losses", net, values=values["losses"])
            run.write_net("predictions", net, logits=logits, labels=labels)
            return NetProgress(epoch, values["state"], values["losses"])
    if lines and len(lines) == info.config.epochs < config.epochs:
        raise UserError(
            f"epochs={config.epochs}: {net[0]} norm, seed {net[1]}, of {run.path} is finished and "
            "has no whole checkpoint to go on from; start a new run"
        )
    return NetProgress()


def checkpoint_shapes(info: RunInfo, net: NetId) -> dict:
    """A tree like what a net's checkpoint holds."""
    classes, count = len(info.dataset.class_names), info.dataset.test_count
    program = program_of(info.config, net[0], classes)
    shapes = init_state.eval_shape(program, net[1], np.zeros((2, 3), np.float32))
    state: TrainState = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    logits = np.zeros((count, classes), np.float32)
    labels, losses = np.zeros(count, np.int32), np.zeros(0, np.float32)
    return {"state": state, "losses": losses, "logits": logits, "labels": labels}
