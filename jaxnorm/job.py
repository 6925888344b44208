"""A job of `run` or `tune`, once its flags are read: data, self-check, training, report. It loads
JAX, whose environment `run.py` has prepared by then.
"""

import contextlib
import dataclasses
import datetime
import importlib
import itertools
import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxnorm import cli
from jaxnorm.config import SWEPT, Config, Setting, UserError, valid_text
from jaxnorm.data import cache, datasets
from jaxnorm.data.datasets import Dataset
from jaxnorm.model import summary
from jaxnorm.runs import callbacks, environment, hosts, runner
from jaxnorm.runs.hosts import Share
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.sweep import Sweep, folder_of
from jaxnorm.training import mesh as meshes
from jaxnorm.training import selfcheck
from jaxnorm.training.experiment import Experiment, mesh_for
from jaxnorm.training.fit import Callback
from jaxnorm.training.mesh import MeshShape

if TYPE_CHECKING:
    from jaxnorm.analysis.results import Run
    from jaxnorm.run import Options


def start(requested: list[Config], options: "Options", tunes: bool = False) -> int:
    """Trains and reports a new sweep or one that resumes, or a tuning; a run is a sweep of one.
    Returns the exit code.
    """
    if options.resume:
        options = dataclasses.replace(options, resume=folder_of(options.resume))
    if options.summary:
        return print_summary(requested, options)
    options = _deterministic(options)
    keep_compiled()
    meshes.use_all_cores()
    share = _share(options)
    out = options.resume or options.out or unused_out(requested[0])
    joins = share.count > 1 and not options.resume and out.is_dir()
    joins = joins and Sweep(out, requested).exists()
    resumes = options.resume is not None or joins
    configs, infos = requested, []
    if resumes:
        old = Sweep.open(out)
        infos = [folder.info() if folder.exists() else None for folder in old.directories]
        configs = grown(requested, old.configs, options)
        for info in filter(None, infos):
            runner.check_sources(info, out, info.config.norms)
    elif share.count == 1 or not out.is_dir():
        RunDirectory.check_unused(out)
    mesh = _check_settings(configs, options)
    unverified = any(info and info.dataset.verified is False for info in infos)
    dataset = _load(configs[0], options, unverified)
    before = [info.environment.mesh if info else None for info in infos]
    experiment = Experiment(configs, dataset, mesh, before, measures=options.probes)
    if not resumes and share.count == 1:
        out = _made(out, options, requested[0])
    sweep = Sweep(out, configs)
    if not options.quiet:
        counts = len(dataset.train_labels), len(dataset.test_labels)
        images = "{:,} training and {:,} test images".format(*counts)
        print(f"{dataset.caption}: {images}, from {dataset.source}")
    nets = share.of(sweep.nets)
    checked = "skipped (--skip-self-check)" if options.skip_self_check else "not made"
    if not options.skip_self_check and not all(map(sweep.ended, nets)):
        checked = check_arithmetic(experiment, out, options.quiet, options.recheck)
    with cli.advising(_how_to_resume(out, options)):
        now = environment.environment(_command(), checked, options.deterministic)
        with contextlib.ExitStack() as stack:
            terminal = callbacks.Terminal(configs, len(nets), options.quiet, cli.as_flags)
            hear: list[Callback] = [stack.enter_context(contextlib.closing(terminal))]
            if options.tensorboard:
                board = callbacks.TensorBoard(sweep, nets)
                hear.insert(0, stack.enter_context(contextlib.closing(board)))  # before a stop
            stack.enter_context(_loading_analysis())
            runner.run(sweep, experiment, now, hear, share, resumes or share.count > 1)
        if options.distributed:
            hosts.leave()
    if options.distributed and share.index:
        return 0
    with cli.reporting(_how_to_report(sweep)):
        ended = _report(sweep, dataset, tunes, options.quiet)
    return cli.FAILED if options.distributed and not ended else 0


def _deterministic(options: "Options") -> "Options":
    """Asks XLA, which has not started yet, for operations that repeat, if the flag or the run to
    resume does; returns the options.
    """
    if options.resume:
        with contextlib.suppress(OSError, UserError):  # it is refused later
            if Sweep.open(options.resume).directories[0].info().environment.deterministic:
                options = dataclasses.replace(options, deterministic=True)
    if options.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    return options


def keep_compiled() -> None:
    """Keeps compiled programs in the user's private cache, unless JAX's own variable says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache_dir = cache.default_cache_dir()  # None if the user has no home
        directory = cache_dir and cache.private_directory(
            cache_dir / "compiled" / cache.machine_name()
        )
        if directory is not None:
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _share(options: "Options") -> Share:
    """Returns which nets are this process's; joins the job if it is one of several."""
    if options.share and options.distributed:
        raise UserError(
            Setting("share"),
            " and ",
            Setting("distributed", True),
            " conflict: a job's processes have a share each already",
        )
    if (options.distributed or options.share) and not options.out and not options.resume:
        raise UserError(
            "processes that share a run must name its folder, the same for all: give ",
            Setting("out"),
            " or ",
            Setting("resume"),
        )
    share = Share.parse(options.share) if options.share else hosts.EVERY_NET
    if options.distributed:
        share = hosts.join()
    meshes.check_devices()
    return share


def _check_settings(configs: Sequence[Config], options: "Options") -> MeshShape | None:
    """Raises `UserError` for what is wrong whatever the data is, before a download; returns the
    mesh that was asked for.
    """
    try:
        importlib.import_module("matplotlib")  # the rest of it is loaded when it draws
    except (ImportError, ValueError) as error:  # not installed, or not with these settings
        raise UserError(f"Matplotlib, which draws the report, does not start: {error}") from None
    if options.tensorboard:
        callbacks.require_tensorboard()
    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    for config in configs:
        mesh_for(configs, config, mesh)
        summary.check_nets(dataclasses.replace(config, allow_large=True), num_classes=10)
    return mesh


def check_arithmetic(experiment: Experiment, out: Path, quiet: bool, recheck: bool = False) -> str:
    """Checks the programs that will train, those that passed before only if they are to be checked
    again; returns what the run says of it. If they are wrong, a new run directory goes again.
    """
    folder = cache.default_cache_dir()
    passes = cache.private_directory(folder / "self-check") if folder else None
    try:
        with contextlib.closing(callbacks.Bar(quiet)) as bar:
            checked, nets = selfcheck.self_check(experiment, bar.at, passes, recheck)
    except BaseException:  # a signal too
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is new, and so empty
        raise
    before = "before, by the same programs on this machine"
    if not checked:
        return f"passed {before}"
    return "passed" if checked == nets else f"passed; {nets - checked} of {nets} nets {before}"


@contextlib.contextmanager
def _loading_analysis() -> Iterator[None]:
    """Loads what the report needs, Matplotlib and SciPy, while the block compiles and trains."""

    def load() -> None:
        with contextlib.suppress(Exception):  # the report raises it again
            importlib.import_module("jaxnorm.analysis.figures")
            importlib.import_module("jaxnorm.analysis.page")

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _report(sweep: Sweep, dataset: Dataset, tunes: bool, quiet: bool) -> bool:
    """Makes the report if every net has ended and no other process makes it just now; returns
    whether every net has ended.
    """
    left = sum(not sweep.ended(net) for net in sweep.nets)
    if left:
        if not quiet:
            print(
                f"{left} of {len(sweep.nets)} nets are trained by other processes, or have none: "
                "the last one to end makes the report"
            )
        return False
    with sweep.folder.locked("reporting") as free:
        if not free:
            if not quiet:
                print("another process makes the report")
            return True
        from jaxnorm.analysis import results  # see `_loading_analysis`

        runs = [results.Run(directory) for directory in sweep.directories]
        for run in runs:
            results.save_examples(run, dataset)
        where = _write(sweep, runs, tunes, quiet)
        if not quiet:
            print(where)
    return True


def _write(sweep: Sweep, runs: Sequence["Run"], tunes: bool, quiet: bool) -> str:
    """Writes the report and prints its table; returns where it is."""
    from jaxnorm.analysis import page, sweeps, tables

    with contextlib.closing(callbacks.Bar(quiet)) as bar:
        if len(runs) == 1 and not tunes:
            part = page.gather(runs[0])
            page.write_first(part)
            print(tables.results(runs[0]).plain(), flush=True)
            bar.show("drawing the figures")
            figures = len(page.finish(part).charts)
            return f"the report is {sweep.folder.path / 'report.html'}; {figures} figures"
        bar.show("drawing the figures")
        path, write = shlex.quote(str(sweep.folder.path)), sweeps.write
        if tunes:
            shown = [sweeps.tuning(runs), sweeps.every_trial(runs)]
            table = write(sweep.folder, "tuning", shown, sweeps.draw_tuning(runs))
            where = f"the tables and two figures are in {sweep.folder.path}"
        else:
            table = write(sweep.folder, "sweep", [sweeps.results(runs)], sweeps.draw(runs))
            where = f"the table is {path}/sweep.md; reports: python -m jaxnorm.report {path}"
        bar.close()
        print(table)
        return where


def grown(new: Sequence[Config], old: Sequence[Config], options: "Options") -> list[Config]:
    """Returns the settings of the runs to resume, with the flags of the command line put in.

    Raises `UserError` for a flag that conflicts with them.
    """
    if options.resume and options.out is not None:
        raise UserError(
            Setting("out"),
            " conflicts with ",
            Setting("resume"),
            ", which goes on in the run's own directory",
        )
    given = cli.given()
    for name in given & set(SWEPT):
        now, before = (dict.fromkeys(str(getattr(c, name)) for c in cs) for cs in (new, old))
        if now.keys() != before.keys():
            raise UserError(
                Setting(name, " ".join(now)),
                " conflicts with the run to resume, which has "
                f"{' '.join(before)}: leave it out, or start a new run",
            )
    named = given & {field.name for field in dataclasses.fields(Config)} - set(SWEPT)
    changes = {name: getattr(new[0], name) for name in named}
    grown = [dataclasses.replace(config, **changes) for config in old]
    for before, now in zip(old, grown, strict=True):
        runner.check_grown(before, now, options.resume or options.out or Path())
    return grown


def _load(config: Config, options: "Options", unverified: bool = False) -> Dataset:
    try:
        with contextlib.closing(callbacks.Bar(options.quiet)) as bar:
            bar.show("reading the data")
            return datasets.load(
                config.dataset,
                options.data_dir,
                options.archive,
                allow_unverified=options.allow_unverified or unverified,
                test_split=config.test_split,
                progress=bar.at,
            )
    except UserError as error:
        if options.resume and config.dataset.lower().endswith(".npz"):
            error.add_note("if the file of the run is elsewhere now, give --dataset PATH")
        raise


def unused_out(config: Config) -> Path:
    """Returns the folder of a new run that nobody named."""
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    norm = config.norm.replace(":", ".")
    path = Path("runs") / f"{started}-{config.arch}-{norm}-{Path(config.dataset).stem}"
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([path], numbered) if not path.exists())


def _made(out: Path, options: "Options", config: Config) -> Path:
    """Makes the folder of a new run; if nobody named it, one that no other run has taken."""
    if options.out:
        return RunDirectory.create(out).path
    out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):  # another run began in the same second
            (out := unused_out(config)).mkdir(mode=0o700)
            return out


def _command() -> str:
    return valid_text(shlex.join([*cli.program(), *cli.arguments()]))


def _how_to_report(sweep: Sweep) -> str:
    """Returns advice for a failed report: resuming a sweep makes the tables of all its runs."""
    several = len(sweep.configs) > 1
    command = [*cli.program(), "--resume"] if several else ["python", "-m", "jaxnorm.report"]
    path = sweep.folder.path
    return f"the nets are trained and safe in {path}: {shlex.join([*command, str(path)])} makes it"


def _how_to_resume(out: Path, options: "Options") -> str:
    command = [*cli.program(), "--resume", str(out)]
    if options.data_dir:
        command += ["--data-dir", str(options.data_dir)]
    if not options.probes:
        command.append("--no-probes")
    if options.share:
        command += ["--share", options.share]
    if options.distributed:
        command.append("--distributed")
    return f"what is complete is kept; resume it with: {shlex.join(command)}"


def print_summary(requested: list[Config], options: "Options") -> int:
    """Prints the layers of each net, also of a run to resume; returns the exit code."""
    from jaxnorm.analysis import tables

    configs = requested
    if options.resume:
        configs = grown(configs, Sweep.open(options.resume).configs, options)
    config = configs[0]
    known = config.dataset in ("cifar10", "digits")
    classes = 10 if known else len(_load(config, options).class_names)
    totals = summary.check_nets(config, classes)
    for norm in config.norms:
        net = summary.summarize(summary.net_of(config, norm, classes))
        print(tables.layers({norm: net}, totals).plain() + "\n")
    return 0
