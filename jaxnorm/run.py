"""The command: `python -m jaxnorm.run --norm layer`. Flags in, exit code out."""

import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from jaxnorm import cli
from jaxnorm.config import (
    RECIPES,
    SWEPT,
    Augment,
    Config,
    Optimizer,
    Precision,
    Recipe,
    Schedule,
    UserError,
    norms_help,
    product,
)

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.run",
    help=(
        "Train a small CNN under batch, group or layer normalization and write a run directory: "
        "metrics, predictions, checkpoints, figures. Several batch sizes, learning rates, weight "
        "decays or settings of norms are a sweep: a run directory for each of their combinations."
    ),
    help_format="plaintext",
)


_MAY_BE_UNDONE = Parameter(negative_bool="no-")


@dataclass(frozen=True)
class Options:
    """Where data lies, where results go and what is shown: nothing of it changes a result.

    Parameters
    ----------
    data_dir
        The directory of TFDS datasets. Default: TFDS_DATA_DIR or ~/tensorflow_datasets.
    archive
        The path or address of an official CIFAR-10 archive, binary or Python, or the folder that
        the Python one was unpacked to. It is imported into the data directory first.
    allow_unverified
        Use an archive whose SHA-256 is not an official one; the run and its figures then say
        "unverified data".
    out
        The run directory, new or empty. Default: runs/<time>-<arch>-<norm>-<dataset>.
    resume
        Resume this run or sweep after the newest complete epoch of every net, with its own
        settings, on any devices. With more --seeds it grows, and with more --epochs if the learning
        rate is constant; any other flag that differs is refused.
    mesh
        The devices to train on. seed=4,batch=2 trains four nets at the same time, with two devices
        for the batches of each. Default: nets first, then the batch, over all devices.
    share
        Train only a share of the nets, such as 3/8: those whose place in the order of the settings
        is 3 modulo 8; "array" takes the share from a job array of Slurm or Kubernetes. Processes
        that share a run see the same folder, and the last one to end writes the report.
    distributed
        Train the share of a process of a job, which Slurm, Open MPI, Kubernetes, a cloud TPU or
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe. If one process dies,
        all end. Process 0 writes the report.
    deterministic
        On an accelerator, ask XLA for operations that give the same bits again, if it has them;
        they are slower. On a CPU they do anyway.
    skip_self_check
        Train without checking first that this installation computes rightly; the run says so.
    recheck
        Check it, also if the same programs have passed on this machine before.
    probes
        Measure each net inside after its last epoch, for the figures of what the norms do there:
        a few seconds a net.
    tensorboard
        Write each epoch's losses and accuracies for TensorBoard, too, in the run directory's
        tensorboard/.
    quiet
        Print nothing but the table at the end, and errors.
    summary
        Print the layer table of each net (with --resume, of each net of that run) and exit.
    """

    data_dir: Annotated[Path | None, cli.PATH] = None
    archive: Annotated[str | None, cli.PATH] = None
    allow_unverified: bool = False
    out: Annotated[Path | None, cli.PATH] = None
    resume: Annotated[Path | None, cli.PATH] = None
    mesh: str | None = None
    share: str | None = None
    distributed: bool = False
    deterministic: bool = False
    skip_self_check: bool = False
    recheck: bool = False
    probes: Annotated[bool, _MAY_BE_UNDONE] = True
    tensorboard: bool = False
    quiet: bool = False
    summary: bool = False


_SEVERAL = Parameter(consume_multiple=True, negative_iterable=())


@dataclass(frozen=True)
class Settings:
    # The flags of the fields of `Config`, whose docstring is their help: those of `SWEPT` take
    # several values, and those of `OF_RECIPE` are the recipe's unless they are given.
    norm: str = Config.norm
    arch: str | None = None
    dataset: str = Config.dataset
    epochs: Annotated[int, cli.WHOLE] = Config.epochs
    batch_size: Annotated[tuple[int, ...], _SEVERAL, cli.WHOLE] = ()
    learning_rate: Annotated[tuple[float, ...], _SEVERAL] = ()
    linear_scaling: bool = Config.linear_scaling
    recipe: Recipe = Config.recipe
    schedule: Schedule | None = None
    optimizer: Optimizer | None = None
    warmup: float = Config.warmup
    momentum: float = Config.momentum
    nesterov: Annotated[bool | None, _MAY_BE_UNDONE] = None
    weight_decay: Annotated[tuple[float, ...], _SEVERAL] = ()
    dropout: float | None = None
    augment: Augment | None = None
    label_smoothing: float = Config.label_smoothing
    weight_standardization: Annotated[bool | None, _MAY_BE_UNDONE] = None
    groups: Annotated[tuple[int, ...], _SEVERAL, cli.WHOLE] = ()
    seed: Annotated[int, cli.WHOLE] = Config.seed
    seeds: Annotated[int, cli.WHOLE] = Config.seeds
    validation: Annotated[int, cli.WHOLE] = Config.validation
    precision: Precision = Config.precision
    allow_large: bool = Config.allow_large
    test_split: str = Config.test_split
    ghost_size: Annotated[tuple[int, ...], _SEVERAL, cli.WHOLE] = ()
    alpha: Annotated[tuple[float, ...], _SEVERAL] = ()
    norm_momentum: Annotated[tuple[float, ...], _SEVERAL] = ()


_TABLE = "of the table of norms:\n"
_NORMS = f"\n{indent(norms_help(), 8 * ' ')}\n"
Settings.__doc__ = str(Config.__doc__).replace(_TABLE, _TABLE + _NORMS)
NO_SETTINGS, NO_OPTIONS = Settings(), Options()
SETTINGS, OPTIONS = (
    Parameter(group=Group(title), name="*", negative_bool=())
    for title in ("Settings that decide the result", "Data, output, devices")
)


@app.default
def main(
    *,
    settings: Annotated[Settings, SETTINGS] = NO_SETTINGS,
    options: Annotated[Options, OPTIONS] = NO_OPTIONS,
) -> int:
    """Trains and reports; returns the exit code."""
    return start(configs_of(*split(settings)), options)


def split(settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are given: those that all runs share, and the values of the swept ones."""
    named = {name: value for name, value in vars(settings).items() if value not in (None, ())}
    return named, {name: named.pop(name) for name in SWEPT if name in named}


def configs_of(named: dict[str, Any], swept: dict[str, Any]) -> list[Config]:
    """Returns the settings of each run, by the recipe that is named."""
    named = dict(named)
    return product(RECIPES[named.pop("recipe")], named, swept)


def start(configs: list[Config], options: Options, tunes: bool = False) -> int:
    """Trains and reports a sweep, or a tuning; returns the exit code."""
    # XLA logs as errors, each time it loads, that its own tuning hints are no processor features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        from jaxnorm import job  # the one lazy import: `--help` answers before JAX is loaded

        return job.start(configs, options, tunes)
    except UserError:
        raise
    except ValueError as error:
        if "JAX" not in str(error):
            raise
        raise UserError(f"JAX does not take the environment: {error}") from None


if __name__ == "__main__":
    cli.leave(cli.run(app))
