"""The command: `python -m jaxnorm.run --norm layer`. Flags in, exit code out."""

import contextlib
import dataclasses
import datetime
import importlib
import itertools
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from cyclopts import App, Group, Parameter

from jaxnorm import cli
from jaxnorm.config import (
    OF_RECIPE,
    RECIPES,
    RECORDED,
    SWEPT,
    Config,
    UserError,
    from_json,
    product,
    valid_text,
)

if TYPE_CHECKING:
    from jaxnorm.analysis.results import Run
    from jaxnorm.data.datasets import Dataset
    from jaxnorm.storage.sweep import Sweep
    from jaxnorm.training.experiment import Experiment

    Finish = Callable[[Sweep, list[Run], bool], None]
    """What is done with a trained sweep, its runs' records, and whether to be quiet."""

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.run",
    help=(
        "Train a small CNN under batch, group or layer normalization and write a run directory: "
        "metrics, predictions, checkpoints, figures. Several batch sizes, learning rates or weight "
        "decays are a sweep: a run directory for each of their combinations."
    ),
    help_format="plaintext",
)


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
    distributed
        This process is one of a job of several, which Slurm, Open MPI, Kubernetes, a cloud TPU or
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe. Process 0 writes
        the results.
    deterministic
        On an accelerator, ask XLA for operations that give the same bits again, if it has them;
        they are slower. On a CPU they do anyway.
    skip_self_check
        Train without checking first that this installation computes rightly; the run says so.
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
    distributed: bool = False
    deterministic: bool = False
    skip_self_check: bool = False
    tensorboard: bool = False
    quiet: bool = False
    summary: bool = False


def _settings_class() -> type:
    """The settings of `Config`, with several values of those that a sweep takes."""
    hints, fields = get_type_hints(Config), []
    for field in dataclasses.fields(Config):
        kind, default = hints[field.name], field.default
        if field.name in RECORDED:
            continue
        if field.name in SWEPT:
            value = get_args(kind)[0] if get_args(kind) else kind
            several = Parameter(consume_multiple=True, negative_iterable=())
            kind, default = Annotated[tuple[value, ...], several], ()
        elif field.name in OF_RECIPE:  # which may be undone
            kind, default = Annotated[kind | None, Parameter(negative_bool="no-")], None
        if hints[field.name] is int:
            kind = Annotated[kind, cli.WHOLE]
        fields.append((field.name, kind, dataclasses.field(default=default)))
    settings = dataclasses.make_dataclass("Settings", fields, frozen=True)
    settings.__module__, settings.__doc__ = __name__, Config.__doc__
    return settings


if TYPE_CHECKING:
    Settings = Config
else:
    Settings = _settings_class()
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
    return start(configs_of(*split(settings)), options, report)


def split(settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are given: those that all runs share, and the values of the swept ones."""
    named = {name: value for name, value in vars(settings).items() if value not in (None, ())}
    return named, {name: named.pop(name) for name in SWEPT if name in named}


def configs_of(named: dict[str, Any], swept: dict[str, Any]) -> list[Config]:
    """Returns the settings of each run, by the recipe that is named."""
    named = dict(named)
    return product(RECIPES[named.pop("recipe")], named, swept)


def start(configs: list[Config], options: Options, finish: "Finish") -> int:
    """Trains a sweep in this process, or as one of a job of several; returns the exit code."""
    if options.resume:
        from jaxnorm.storage.sweep import folder_of

        options = dataclasses.replace(options, resume=folder_of(options.resume))
    try:
        options = _prepare_jax(options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"JAX does not take the environment: {error}") from None
    if options.summary:
        if options.resume:
            from jaxnorm.storage.sweep import Sweep

            configs = _grown(configs, Sweep.open(options.resume).configs, options)
        _print_summary(configs[0], options)
        return 0
    from jaxnorm.runs import multihost
    from jaxnorm.training import mesh

    mesh.use_all_cores()
    if not options.distributed:
        mesh.check_devices()
        return _train(configs, options, finish)
    multihost.join()
    cli.before_failing(multihost.leave)
    with multihost.watched(_how_to_resume(options.resume or options.out, options)):
        return _train(configs, options, finish)


def _prepare_jax(options: Options) -> Options:
    """Sets what JAX and XLA read when they start; returns the options, deterministic if the run to
    resume is.
    """
    # XLA logs as errors, each time it loads, that its own tuning hints are no processor features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.resume:
        from jaxnorm.storage.sweep import Sweep

        with contextlib.suppress(OSError, UserError):  # it is refused later
            if Sweep.open(options.resume).directories[0].info().deterministic:
                options = dataclasses.replace(options, deterministic=True)
    if options.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        from jaxnorm.data.cache import default_cache_dir, machine_name, private_directory

        cache = default_cache_dir()  # None where the user has no home
        directory = cache and private_directory(cache / "compiled" / machine_name())
        if directory is not None:
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return options


def _train(requested: list[Config], options: Options, finish: "Finish") -> int:
    """Checks, trains and reports a new sweep or one that resumes. A run is a sweep of one."""
    from jaxnorm.model import summary
    from jaxnorm.runs import callbacks, multihost, runner
    from jaxnorm.storage.sweep import Sweep
    from jaxnorm.training.experiment import Experiment, mesh_for
    from jaxnorm.training.mesh import MeshShape

    shared = dataclasses.replace(options, data_dir=None, archive=None)  # each host has its own
    multihost.agree(command=repr((requested, shared)))
    out = options.resume or options.out or _default_out(requested[0])
    process_0 = multihost.is_process_0()
    task = multihost.from_process_0(lambda: _what_to_train(requested, out, options))
    configs = [from_json(Config, json.dumps(values)) for values in task["configs"]]
    if task["unverified"]:
        options = dataclasses.replace(options, allow_unverified=True)
    if options.tensorboard:
        callbacks.require_tensorboard()
    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    for config in configs:
        mesh_for(configs, config, mesh)
    # What is wrong whatever the data is, is said before a download.
    summary.check_nets(dataclasses.replace(configs[0], allow_large=True), num_classes=10)
    # Process 0 may import an archive, or write a cache, that the others find.
    dataset = multihost.in_every_process(lambda: _load(configs[0], options) if process_0 else None)
    dataset = multihost.in_every_process(lambda: dataset or _load(configs[0], options))
    multihost.agree(data=dataset.fingerprint)
    experiment = Experiment(configs, dataset, mesh)
    finished = {tuple(net) for net in task["finished"]}
    new = process_0 and not options.resume
    out = multihost.in_every_process(lambda: _made(out, options, configs[0]) if new else out)
    if process_0 and not options.quiet:
        counts = len(dataset.train_labels), len(dataset.test_labels)
        images = "{:,} training and {:,} test images".format(*counts)
        print(f"{dataset.caption}: {images}, from {dataset.source}")
    is_checked = not options.skip_self_check and len(finished) < len(experiment.nets)
    if is_checked:
        _check(experiment, out, options)
    with cli.advising(_how_to_resume(out, options)):
        sweep = Sweep.create(out, configs, _command()) if new else Sweep(out, configs)
        board = callbacks.TensorBoard(sweep) if options.tensorboard and process_0 else None
        callback: Any = cli.Terminal(configs, options.quiet, process_0, board)
        skipped = "skipped (--skip-self-check)" if options.skip_self_check else "not made"
        about = ("passed" if is_checked else skipped, options.deterministic)
        try:
            runner.run(sweep, experiment, _command(), callback, *about)
        finally:
            if board is not None:
                board.close()
    if process_0:
        _report(sweep, dataset, options, finish)
    return 0


def _check(experiment: "Experiment", out: Path, options: Options) -> None:
    """Checks the programs that will train; if they are wrong, a new run directory goes again."""
    from jaxnorm.training.selfcheck import self_check

    try:
        with _bar(options) as bar:
            self_check(experiment, bar.at)
    except BaseException:  # a signal too
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is new, and so empty
        raise


def _report(sweep: "Sweep", dataset: "Dataset", options: Options, finish: "Finish") -> None:
    """Makes the report of trained nets; whatever stops it, nothing that was trained is lost."""
    with cli.reporting(_how_to_report(sweep)):
        from jaxnorm.analysis import sweeps  # Matplotlib takes a second to load

        finish(sweep, sweeps.runs_of(sweep, dataset), options.quiet)


def _what_to_train(requested: list[Config], out: Path, options: Options) -> dict[str, Any]:
    """What the other processes need to know of the run directory, which they may not see."""
    from jaxnorm.runs.runner import check_sources
    from jaxnorm.storage.directory import RunDirectory
    from jaxnorm.storage.sweep import Sweep

    try:
        importlib.import_module("matplotlib")
    except (ImportError, ValueError) as error:  # not installed, or not with these settings
        raise UserError(f"Matplotlib, which draws the report, does not start: {error}") from None
    if not options.resume:
        RunDirectory.check_unused(out)
        configs = [dataclasses.asdict(config) for config in requested]
        return {"configs": configs, "unverified": False, "finished": []}
    sweep = Sweep.open(out)
    infos = [directory.info() for directory in sweep.directories if directory.exists()]
    for info in infos:
        check_sources(info, out, info.config.norms)
    grown = _grown(requested, sweep.configs, options)
    return {
        "configs": [dataclasses.asdict(config) for config in grown],
        "unverified": any(info.dataset.verified is False for info in infos),
        "finished": list(Sweep(out, grown).finished()),
    }


def _grown(new: Sequence[Config], old: Sequence[Config], options: Options) -> list[Config]:
    """The settings of the runs to resume, with the flags of the command line put in.

    Raises `UserError` for a flag that conflicts with them.
    """
    from jaxnorm.runs.runner import check_grown

    if options.out is not None:
        raise UserError("out= conflicts with resume=, which goes on in the run's own directory")
    given = cli.given()
    for name in given & set(SWEPT):
        now, before = (dict.fromkeys(str(getattr(c, name)) for c in cs) for cs in (new, old))
        if now.keys() != before.keys():
            raise UserError(
                f"{name}={' '.join(now)} conflicts with the run to resume, which has "
                f"{' '.join(before)}: leave it out, or start a new run"
            )
    named = given & {field.name for field in dataclasses.fields(Config)} - set(SWEPT)
    changes = {name: getattr(new[0], name) for name in named}
    grown = [dataclasses.replace(config, **changes) for config in old]
    for before, now in zip(old, grown, strict=True):
        check_grown(before, now, options.resume or Path())
    return grown


def _load(config: Config, options: Options) -> "Dataset":
    from jaxnorm.data import datasets

    unverified, places = options.allow_unverified, (options.data_dir, options.archive)
    try:
        with _bar(options) as bar:
            return datasets.load(
                config.dataset,
                *places,
                allow_unverified=unverified,
                test_split=config.test_split,
                progress=bar.at,
            )
    except UserError as error:
        if options.resume and config.dataset.lower().endswith(".npz"):
            error.add_note("if the file of the run is elsewhere now, give --dataset PATH")
        raise


def _bar(options: Options) -> contextlib.closing[cli.Bar]:
    """A progress bar, shown in process 0 unless quiet; a signal stops the work that moves it."""
    from jaxnorm.runs import multihost

    return contextlib.closing(cli.Bar(options.quiet or not multihost.is_process_0()))


def report(sweep: "Sweep", runs: Sequence["Run"], quiet: bool) -> None:
    """Writes every run's report and the sweep's table and figure, and prints the table."""
    from jaxnorm.analysis import page, sweeps, tables

    if len(runs) == 1:
        part = page.write(runs[0].directory)
        where = f"the report is {sweep.folder.path / 'report.html'}; {len(part.charts)} figures"
        print(tables.results(runs[0]).plain())
    else:
        path = shlex.quote(str(sweep.folder.path))
        where = f"the table is {path}/sweep.md; reports: python -m jaxnorm.report {path}"
        print(sweeps.write(sweep.folder, "sweep", [sweeps.results(runs)], sweeps.draw(runs)))
    if not quiet:
        print(where)


def report_tuning(sweep: "Sweep", runs: Sequence["Run"], quiet: bool) -> None:
    """Writes what each norm won with, as tables and two figures, and prints the tables."""
    from jaxnorm.analysis import sweeps

    tables = [sweeps.tuning(runs), sweeps.every_trial(runs)]
    print(sweeps.write(sweep.folder, "tuning", tables, sweeps.draw_tuning(runs)))
    if not quiet:
        print(f"the tables and two figures are in {sweep.folder.path}")


def _default_out(config: Config) -> Path:
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    norm = config.norm.replace(":", ".")
    path = Path("runs") / f"{started}-{config.arch}-{norm}-{Path(config.dataset).stem}"
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([path], numbered) if not path.exists())


def _made(out: Path, options: Options, config: Config) -> Path:
    """Makes the folder of a new run; if nobody named it, one that no other run has taken."""
    from jaxnorm.storage.directory import RunDirectory

    if options.out:
        return RunDirectory.create(out).path
    out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):  # another run began in the same second
            (out := _default_out(config)).mkdir(mode=0o700)
            return out


def _command() -> str:
    return valid_text(shlex.join([*cli.program(), *cli.arguments()]))


def _how_to_report(sweep: "Sweep") -> str:
    """What to do if the report fails: of a sweep, resuming it makes the tables of all its runs."""
    several = len(sweep.configs) > 1
    command = [*cli.program(), "--resume"] if several else ["python", "-m", "jaxnorm.report"]
    path = sweep.folder.path
    return f"the nets are trained and safe in {path}: {shlex.join([*command, str(path)])} makes it"


def _how_to_resume(out: Path | None, options: Options) -> str:
    command = [*cli.program(), "--resume", str(out or "RUN")]
    if options.data_dir:
        command += ["--data-dir", str(options.data_dir)]
    if options.distributed:
        command.append("--distributed")
    return f"what is complete is kept; resume it with: {shlex.join(command)}"


def _print_summary(config: Config, options: Options) -> None:
    from jaxnorm.analysis import tables
    from jaxnorm.model import summary

    known = config.dataset in ("cifar10", "digits")
    classes = 10 if known else len(_load(config, options).class_names)
    summary.check_nets(config, classes)
    for norm in config.norms:
        print(tables.layers(dataclasses.replace(config, norm=norm), classes).plain() + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(app))
