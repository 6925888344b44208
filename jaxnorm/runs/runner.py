"""Trains the runs of a sweep to disk, or resumes them: one path, for one net or many.

After each epoch a net's checkpoint, predictions and losses are written, and then the epoch's line,
which makes it complete.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxnorm.config import Config, NetId, SweptNet, UserError, names_a_file
from jaxnorm.data.datasets import Dataset
from jaxnorm.model import arithmetic, fingerprint
from jaxnorm.records import RunInfo
from jaxnorm.runs import environment, multihost
from jaxnorm.runs.resume import checkpoint_shapes, find_progress, in_order
from jaxnorm.storage import checkpoint
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training import fit, probes
from jaxnorm.training.experiment import Experiment, program_of
from jaxnorm.training.fit import Callback, NetProgress, Trained
from jaxnorm.training.step import Program, TrainState


@arithmetic.standard()
def run(
    sweep: Sweep,
    experiment: Experiment,
    command: str = "",
    callback: Callback | None = None,
    self_check: str = "not made",
    deterministic: bool = False,
) -> None:
    """Trains every net of a sweep that is not there yet, to its last epoch, and measures it inside.
    A run that has begun resumes; one whose settings ask for more epochs or seeds grows.

    On a CPU what comes out equals an unbroken run on the same mesh bit for bit, but for the times.
    In a job of several processes all of them call it, and process 0 alone touches the disk.
    Raises `UserError`, `NonFiniteLoss` where no net's loss stays finite, and OSError.
    """
    callback, configs, nets = callback or Callback(), sweep.configs, experiment.nets
    dataset, counts = experiment.dataset, experiment.parameters
    progress: dict[SweptNet, NetProgress] = {}
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[bool, list[int]]:
            """Readies the directories; whether any had begun, and the epochs of every net."""
            stack.enter_context(sweep.locked())
            begun = any(directory.exists() for directory in sweep.directories)
            infos: list[RunInfo | None] = []
            for i, (config, directory) in enumerate(zip(configs, sweep.directories, strict=True)):
                shape = str(experiment.mesh_for(config))
                arguments = (command, self_check, deterministic, shape)
                now = environment.describe(config, dataset, counts[i], *arguments)
                info, found = _begin(directory, now, callback)
                infos.append(info)
                progress.update({SweptNet(i, *net): at for net, at in found.items()})
            sweep.record_growth()  # once nothing can be refused any more
            for info, directory in zip(infos, sweep.directories, strict=True):
                if info is not None:
                    directory.write_info(info)
            return begun, [progress[net].epochs for net in nets]

        begun, complete = multihost.from_process_0(begin)
        for net, epochs in zip(nets, complete, strict=True):
            progress.setdefault(net, NetProgress(epochs))
        if begun:
            callback.on_resume(sum(complete))
        share = multihost.arrays_from_process_0
        losses = {net: net_progress.losses for net, net_progress in progress.items()}
        for done in fit.train(experiment, callback, progress, share):
            if multihost.is_process_0():
                losses[done.net] = np.concatenate([losses[done.net], done.losses])
                save_epoch(sweep.directories[done.run], done, losses[done.net], dataset)
                if done.record.epoch == configs[done.run].epochs:
                    measure_net(sweep.directories[done.run], done, dataset, callback)
            callback.on_epoch(configs[done.run], done.record)
        for directory in sweep.directories if multihost.is_process_0() else ():
            directory.write_epochs(in_order(directory.info().config, directory.epochs()))
            measure_rest(directory, dataset, callback)


def _begin(
    directory: RunDirectory, now: RunInfo, callback: Callback
) -> tuple[RunInfo | None, dict[NetId, NetProgress]]:
    """The `run.json` to write, None if it stays as it is, and how far each net of the run is."""
    config = now.config
    if not directory.exists():
        RunDirectory.check_unused(directory.path)
        return now, {net: NetProgress() for net in config.nets}
    info = directory.info()
    check_grown(info.config, config, directory.path)
    check_sources(info, directory.path, config.norms)
    if now.dataset.fingerprint != info.dataset.fingerprint:
        what = "data"
        if now.dataset.class_names != info.dataset.class_names:
            what = "data, whose classes have other names or another order,"
        raise UserError(
            f"the {what} found is not what {directory.path} was trained on: give its data_dir=, or "
            "the dataset= file that it had"
        )
    directory.remove_half_written()
    progress = find_progress(directory, info, config, callback.on_warning)
    if all(net_progress.epochs == config.epochs for net_progress in progress.values()):
        return None, progress
    before, after = info.environment, now.environment
    alike = all(before.versions.get(name) == after.versions[name] for name in ("jax", "flax"))
    for norm, recorded in info.norm_programs.items():
        if alike and now.norm_programs.get(norm) != recorded:
            callback.on_warning(
                f"norm={norm} computes something else than when the run in {directory.path} began, "
                "though its class is the same: did what it calls change? If so, start a new run"
            )
    if (before.code, before.device) != (after.code, after.device):
        callback.on_warning(
            "the run began with other code or on other devices (compare its run.json): it resumes, "
            "but not bit for bit as it would have there"
        )
    resumed = [*info.resumed, after]
    return dataclasses.replace(info, config=config, resumed=resumed), progress


def check_grown(old: Config, new: Config, path: Path) -> None:
    """Raises `UserError` where a run's settings are not those that it had, but for more epochs or
    more seeds, or another path of a file of data, whose content is compared when it is read.
    """
    for field in dataclasses.fields(Config):
        before, now = getattr(old, field.name), getattr(new, field.name)
        if field.name == "dataset" and names_a_file(before) and names_a_file(now):
            continue
        lengthens = field.name == "epochs" and old.schedule == "constant"
        grows = lengthens or field.name == "seeds"
        if now != before and not (grows and now > before):
            if field.name == "epochs" and now > before:
                raise UserError(
                    f"epochs={now}: the {old.schedule} learning rate of the run in {path} ends "
                    f"with its epoch {before}: start a new run"
                )
            more = " or more" if grows else ""
            raise UserError(
                f"{field.name}={now} conflicts with the run in {path}, which has {before}: give "
                f"that{more}, or start a new run"
            )


def check_sources(info: RunInfo, path: Path | str, norms: Sequence[str]) -> None:
    """Raises `UserError` if one of these norms is the user's own and its source is not the one that
    the run recorded; earlier versions recorded none.
    """
    for norm in norms:
        recorded = info.norm_sources.get(norm)
        if recorded and fingerprint.source(norm) != recorded:
            raise UserError(
                f"norm={norm} is not the norm that the run in {path} was trained with: its source "
                "has changed since; put it back, or start a new run"
            )


def save_epoch(
    directory: RunDirectory, done: Trained, losses: np.ndarray, dataset: Dataset
) -> None:
    """Writes a net's epoch; the line, which makes it complete, is the last."""
    net, predictions = done.record.net, {"logits": done.logits, "labels": dataset.test_labels}
    values = {"state": done.state, "losses": losses, **predictions}
    checkpoint.save(directory, net, done.record.epoch, values)
    directory.write_net("predictions", net, **predictions)
    directory.write_net("step_losses", net, values=losses)
    directory.append_epoch(done.record)


def measure_net(
    directory: RunDirectory, done: Trained, dataset: Dataset, callback: Callback
) -> None:
    """Writes the probes of a net after its last epoch."""
    info, net = directory.info(), done.record.net
    program = program_of(info.config, net[0], len(info.dataset.class_names))
    arguments = program, done.state, dataset, done.logits, net[1]
    measured = probes.measure(*arguments, callback.on_measuring)
    directory.write_net("probes", net, epoch=np.array(done.record.epoch, np.int32), **measured)


def measure_rest(directory: RunDirectory, dataset: Dataset, callback: Callback) -> None:
    """Measures the finished nets that were not measured yet, where a checkpoint is whole."""
    last = directory.info().config.epochs
    for epoch in directory.epochs():
        net, measured = epoch.net, None
        with contextlib.suppress(UserError):  # missing or damaged
            measured = directory.probes(net, {"epoch": "iu"}).get("epoch")
        if epoch.epoch == last != measured and last in checkpoint.epochs(directory, net):
            try:
                _, state = load_state(directory.path, *net)
            except UserError as error:
                callback.on_warning(f"{net[0]} norm is not measured inside: {error}")
                continue
            logits, _ = directory.predictions(net)
            done = Trained(0, epoch, state, np.zeros(0), logits)
            measure_net(directory, done, dataset, callback)


@arithmetic.standard()
def load_state(path: Path | str, norm: str, seed: int) -> tuple[Program, TrainState]:
    """The program and the state of a net of a run after its newest complete epoch.

    Raises `UserError` where the run has no checkpoint of that norm and seed, or a damaged one.
    """
    directory, net = RunDirectory(path), NetId(norm, seed)
    info = directory.info()
    check_sources(info, path, [norm])
    complete = sum(epoch.net == net for epoch in directory.epochs())
    if net not in info.config.nets or complete not in checkpoint.epochs(directory, net):
        raise UserError(f"{path} has no checkpoint of {norm} norm, seed {seed}")
    try:
        values = checkpoint.restore(directory, net, complete, checkpoint_shapes(info, net))
    except checkpoint.Damaged as error:
        raise UserError(str(error)) from None
    program = program_of(info.config, norm, len(info.dataset.class_names))
    return program, values["state"]


def load_model(path: Path | str, norm: str, seed: int) -> Callable[[Any], jax.Array]:
    """The trained net of a run: a pure `predict(images u8[N, 32, 32, 3]) -> probabilities f32[N,
    classes]`.

    Raises `UserError` where the run has no checkpoint of that norm and seed, and where a norm of
    the user's own is not found or has changed.
    """
    program, state = load_state(path, norm, seed)

    def predict(images: Any) -> jax.Array:
        return fit.predict(program, state, images)

    return predict
