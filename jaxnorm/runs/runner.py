"""Trains the runs of a sweep to disk, or resumes them: one path, for one net or many, in one
process or several that share nothing except the folder.

A process takes the next group of nets that nobody else holds, locks each, loads its newest state,
and trains them to the end; after each epoch every net's state is written, which commits the epoch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnorm.config import Config, NetId, Setting, SweptNet, Text, UserError, named, names_a_file
from jaxnorm.model import arithmetic, fingerprint
from jaxnorm.records import Environment, RunInfo
from jaxnorm.runs import environment
from jaxnorm.runs.hosts import EVERY_NET, Share
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import Damaged, NetFolder, Saved
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import fit, probes
from jaxnorm.training.experiment import Experiment, Group, program_of
from jaxnorm.training.fit import Callback, NonFiniteLoss
from jaxnorm.training.step import Program, TrainState, init_state

_PATIENCE = 60
"""Seconds to wait for another process that begins or resumes the same run."""


@arithmetic.standard()
def run(
    sweep: Sweep,
    experiment: Experiment,
    now: Environment,
    callbacks: Sequence[Callback] = (),
    share: Share = EVERY_NET,
    may_exist: bool = True,
) -> None:
    """Trains every net of this share that is not there yet, to its last epoch, and measures it
    inside. A run that has begun resumes, and grows if its settings ask for more epochs or seeds;
    with `may_exist` False that is an error.

    On a CPU what comes out equals an unbroken run on the same mesh bit for bit, except for times.
    Raises `UserError`, ArithmeticError if every net of the sweep diverged, and OSError.
    """
    nets, begun = share.of(sweep.nets), _begin(sweep, experiment, now, callbacks, may_exist)
    if begun:
        last = sweep.configs[0].epochs
        complete = sum(sweep.net(net).complete(last) for net in nets)
        for callback in callbacks:
            callback.on_resume(complete)
    fit.warn_of_untuned(sweep.configs[0], callbacks)
    # In each round a net ends, is found to be held, or has a damaged state set aside.
    while True:
        nets = [net for net in nets if not sweep.ended(net)]
        group = _next_group(experiment, {net: sweep.net(net).epoch() for net in nets})
        if group is None:
            break
        with contextlib.ExitStack() as locks:
            free = [net for net in group.nets if locks.enter_context(sweep.net(net).locked())]
            held = set(group.nets) - set(free)  # by another process, which trains them to the end
            nets = [net for net in nets if net not in held]
            _train(sweep, group, free, now, callbacks)
    if not any(map(sweep.trained, sweep.nets)) and all(map(sweep.ended, sweep.nets)):
        lost = sweep.net(sweep.nets[0]).lost()
        raise ArithmeticError(lost.reason if lost else "every net diverged")


def _next_group(experiment: Experiment, waiting: Mapping[SweptNet, int]) -> Group | None:
    """Returns the next nets to train, or to finish: those that wait only for their result first."""
    for net, epoch in waiting.items():
        if epoch == experiment.configs[net.run].epochs:
            return next(experiment.groups({net: epoch - 1}))  # `groups` leaves finished nets out
    return next(experiment.groups(waiting), None)


def _train(
    sweep: Sweep,
    group: Group,
    nets: Sequence[SweptNet],
    now: Environment,
    callbacks: Sequence[Callback],
) -> None:
    """Trains these nets of a group, which are locked.

    A net that is not where it was said to be, because another process has just trained it or its
    newest state is damaged, waits for the next group.
    """
    experiment, last = group.experiment, group.config.epochs
    saved: dict[SweptNet, Saved | None] = {}
    for net in nets:
        if sweep.ended(net):
            continue
        info, folder = sweep.directories[net.run].info(), sweep.net(net)
        if info.config.epochs != last:
            raise UserError(f"{info.config.epochs} epochs are asked for since: resume the run")
        folder.set_aside_damaged(_warning(callbacks))
        loaded = folder.newest(shapes_of(info, folder.net), _warning(callbacks))
        if loaded is not None and len(loaded.epochs) > last:
            raise UserError(f"{folder.path} has more epochs than the {last} of its run.json")
        if loaded is not None and len(loaded.epochs) == last:
            _finish(folder, group, loaded, callbacks)
        elif (0 if loaded is None else len(loaded.epochs)) == group.start:
            saved[net] = loaded
    if not saved:
        return
    now = dataclasses.replace(now, mesh=str(group.mesh))
    states = [None if at is None else at.state for at in saved.values()]
    for trained in fit.train(group.of(saved, group.start), states, callbacks):
        if isinstance(trained, NonFiniteLoss):
            sweep.net(trained.net).lose(trained.epoch, str(trained))
            if len(experiment.nets) > 1:
                fit.warn_of_lost(trained, experiment.configs[trained.net.run], callbacks)
            continue
        folder, before = sweep.net(trained.net), saved[trained.net]
        saved[trained.net] = after = _after(before, trained, now, experiment)
        folder.commit(after)
        for callback in callbacks:
            callback.on_epoch(experiment.configs[trained.run], trained.record)
    for net, at in saved.items():
        if at is not None and len(at.epochs) == last:
            _finish(sweep.net(net), group, at, callbacks)


def _after(
    before: Saved | None, trained: fit.Trained, now: Environment, experiment: Experiment
) -> Saved:
    """Returns all that belongs to the epoch that a net has just trained."""
    epochs, environments, losses = [], [], np.zeros(0, np.float32)
    if before is not None:
        epochs, environments, losses = before.epochs, before.environments, before.losses
    if now not in environments:
        environments = [*environments, now]
    return Saved(
        epochs=[*epochs, trained.record],
        environments=environments,
        state=trained.state,
        losses=np.concatenate([losses, trained.losses]),
        logits=trained.logits,
        labels=experiment.dataset.test_labels,
    )


def _finish(
    folder: NetFolder,
    group: Group,
    saved: Saved,
    callbacks: Sequence[Callback],
) -> None:
    """Measures a net after its last epoch, if that is asked for, and writes its result."""

    def progress(done: int, total: int) -> None:
        for callback in callbacks:
            callback.on_measuring(done, total)

    measured: dict[str, Any] | None = None
    if group.experiment.measures:
        data, mesh = group.experiment.dataset, group.mesh
        inside = probes.measure(group.program, saved, data, folder.net.seed, mesh, progress)
        measured = {"epoch": np.array(len(saved.epochs), np.int32), **inside}
    folder.finish(saved, measured)
    if not folder.trained(len(saved.epochs)):
        raise UserError(f"{folder.path}: its result is too large to be read back")


def _warning(callbacks: Sequence[Callback]) -> Callable[[str], None]:
    def warn(text: str) -> None:
        for callback in callbacks:
            callback.on_warning(text)

    return warn


def _begin(
    sweep: Sweep,
    experiment: Experiment,
    now: Environment,
    callbacks: Sequence[Callback],
    may_exist: bool,
) -> bool:
    """Writes what says which runs these are, under a lock; returns whether any had begun.

    Everything is checked before anything is written, so that a command that is refused changes
    nothing. Raises `UserError`.
    """
    with sweep.folder.locked(patience=_PATIENCE) as free:
        if not free:
            raise UserError(f"{sweep.folder.path} is being written to by another process")
        if sweep.exists() and not may_exist:
            raise UserError(
                Setting("out", sweep.folder.path),
                " is already used: another process has just begun a run "
                "there; choose another directory",
            )
        news: list[tuple[RunDirectory, RunInfo]] = []
        begun, of_sweep = False, sweep.info(now.command)
        for config, directory in zip(sweep.configs, sweep.directories, strict=True):
            info = environment.describe(config, experiment, now)
            if directory.exists():
                begun, before = True, directory.info()
                _check_resumed(directory, before, info, _warning(callbacks))
                if before.config == config:
                    continue
                info = dataclasses.replace(before, config=config)
            news.append((directory, info))
        sweep.write_info(of_sweep)
        for directory, info in news:
            directory.write_json("run.json", info)
        return begun


def _check_resumed(
    directory: RunDirectory, before: RunInfo, info: RunInfo, warn: Callable[[str], None]
) -> None:
    """Raises `UserError` if a run cannot go on with these settings, data and norms; warns if it
    will not be bit for bit as it would have been.
    """
    check_grown(before.config, info.config, directory.path)
    check_sources(before, directory.path, info.config.norms)
    if info.dataset.fingerprint != before.dataset.fingerprint:
        what = "data"
        if info.dataset.class_names != before.dataset.class_names:
            what = "data, whose classes have other names or another order,"
        raise UserError(
            f"the {what} found is not what {directory.path} was trained on: give its ",
            Setting("data_dir"),
            ", or the ",
            Setting("dataset"),
            " file that it had",
        )
    if info.config.epochs > before.config.epochs:
        for net in before.config.nets:
            folder = NetFolder(directory, net)
            last = before.config.epochs
            if folder.trained(last) and not folder.complete(info.config.epochs):
                raise UserError(
                    Setting("epochs", info.config.epochs),
                    f": {named(net.norm)}, seed {net.seed}, of {directory.path} is "
                    "finished and has no whole state to go on from; start a "
                    "new run",
                )
    if all(NetFolder(directory, net).ended(info.config.epochs) for net in info.config.nets):
        return
    then, now = before.environment, info.environment
    alike = all(then.versions.get(name) == now.versions[name] for name in ("jax", "flax"))
    for norm, recorded in before.norm_programs.items():
        if alike and info.norm_programs.get(norm) != recorded:
            warn(
                Text(
                    Setting("norm", norm),
                    " computes something else than when the run in "
                    f"{directory.path} began, though its class is the same: did "
                    "what it calls change? If so, start a new run",
                )
            )
    if (then.code, then.device, then.mesh) != (now.code, now.device, now.mesh):
        warn(
            "the run began with other code, on other devices or on another mesh (compare its "
            "run.json): it resumes, but not bit for bit as it would have there"
        )


def check_grown(old: Config, new: Config, path: Path) -> None:
    """Raises `UserError` if a run's settings are not those that it had, except for more epochs or
    more seeds, or another path of a file of data, whose content is compared when it is read.
    """
    for field in dataclasses.fields(Config):
        before, now = getattr(old, field.name), getattr(new, field.name)
        if field.name == "dataset" and names_a_file(before) and names_a_file(now):
            continue
        relaxes = "renorm" in old.norms  # over shares of all steps, see `program_of`
        lengthens = field.name == "epochs" and old.schedule == "constant" and not relaxes
        grows = lengthens or field.name == "seeds"
        if now != before and not (grows and now > before):
            if field.name == "epochs" and now > before:
                ends = f"the {old.schedule} learning rate of the run in {path} ends with its epoch"
                if old.schedule == "constant":
                    ends = f"the limits of renorm norm of the run in {path} are for epochs up to"
                raise UserError(Setting("epochs", now), f": {ends} {before}: start a new run")
            more = " or more" if grows else ""
            raise UserError(
                Setting(field.name, now),
                f" conflicts with the run in {path}, which has {before}: "
                f"give that{more}, or start a new run",
            )


def check_sources(info: RunInfo, path: Path | str, norms: Sequence[str]) -> None:
    """Raises `UserError` if one of these norms is the user's own and its source is not the one that
    the run recorded.
    """
    for norm in norms:
        recorded = info.norm_sources.get(norm)
        if recorded and fingerprint.source(norm) != recorded:
            raise UserError(
                Setting("norm", norm),
                f" is not the norm that the run in {path} was trained "
                "with: its source has changed since; put it back, or start "
                "a new run",
            )


def shapes_of(info: RunInfo, net: NetId) -> Saved:
    """Returns what the arrays of a net's state are compared with, without any memory."""
    classes, count = len(info.dataset.class_names), info.dataset.test_count
    program = program_of(info.config, net.norm, classes, info.dataset.train_count)
    state: Any = init_state.eval_shape(program, net.seed, np.zeros((2, 3), np.float32))
    logits: Any = jax.ShapeDtypeStruct((count, classes), np.float32)
    labels: Any = jax.ShapeDtypeStruct((count,), np.int32)
    return Saved([], [], state, np.zeros(0, np.float32), logits, labels)


@arithmetic.standard()
def load_state(path: Path | str, norm: str, seed: int) -> tuple[Program, TrainState]:
    """Returns the program and the state of a net of a run after its newest epoch.

    Raises `UserError` if the run has no state of that norm and seed, or a damaged one.
    """
    directory, net = RunDirectory(path), NetId(norm, seed)
    info = directory.info()
    check_sources(info, path, [norm])
    folder = NetFolder(directory, net)
    if net not in info.config.nets or not folder.epoch():
        raise UserError(f"{path} has no checkpoint of {named(norm)}, seed {seed!r}")
    try:
        saved = folder.read(folder.epoch(), shapes_of(info, net))
    except Damaged as error:
        raise UserError(str(error)) from None
    classes, count = len(info.dataset.class_names), info.dataset.train_count
    return program_of(info.config, norm, classes, count), saved.state


def load_model(path: Path | str, norm: str, seed: int) -> Callable[[Any], jax.Array]:
    """Returns the trained net of a run: a pure `predict(images u8[N, 32, 32, 3]) -> probabilities
    f32[N, classes]`.

    Raises `UserError` if the run has no checkpoint of that norm and seed, and if a norm of the
    user's own is not found or has changed.
    """
    program, state = load_state(path, norm, seed)

    def predict(images: Any) -> jax.Array:
        return fit.predict(program, state, images)

    return predict
