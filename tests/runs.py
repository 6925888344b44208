"""What two runs must have in common to be the same bit for bit."""

import dataclasses

import jax
import numpy as np

from jaxnorm import checkpoints, experiment, train


def without_times(epoch):
    return dataclasses.replace(epoch, train_seconds=0.0, test_seconds=0.0)


def difference(ours, wanted) -> str:
    """What differs between two finished runs, but for the times; empty where nothing does."""
    config = wanted.info().config
    if ours.info().config != config:
        return "settings"
    if list(map(without_times, ours.epochs())) != list(map(without_times, wanted.epochs())):
        return "metrics"
    for net in config.nets:
        if ours.step_losses(*net).tobytes() != wanted.step_losses(*net).tobytes():
            return f"step losses of {net}"
        if any(
            a.tobytes() != b.tobytes()
            for a, b in zip(ours.predictions(*net), wanted.predictions(*net), strict=True)
        ):
            return f"predictions of {net}"
        states = [jax.tree.leaves(newest(each, *net)) for each in (ours, wanted)]
        if any(
            np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(*states, strict=True)
        ):
            return f"parameters of {net}"
    return ""


def newest(directory, norm, seed):
    """The state in a net's newest checkpoint."""
    info = directory.info()
    data = info.dataset
    recipe = experiment.make_recipe(
        info.config, data["mean"], data["deviation"], len(data["class_names"]), norm
    )
    shapes = train.init_state.eval_shape(recipe, seed)._asdict()
    return checkpoints.restore(directory.checkpoints(norm, seed), info.config.epochs, shapes)
