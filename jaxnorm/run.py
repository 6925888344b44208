"""The command: `python -m jaxnorm.run --norm layer`. Flags in, exit code out."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import App, Group, Parameter

from jaxnorm import cli
from jaxnorm.config import Config, UserError

if TYPE_CHECKING:
    from jaxnorm.data import Dataset
    from jaxnorm.devices import Layout
    from jaxnorm.observers import Observer
    from jaxnorm.records import Epoch, RunDirectory
    from jaxnorm.sweep import SweepDirectory

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.run",
    help=(
        "Train a small CNN under batch, group or layer normalization and write a run directory: "
        "metrics, predictions, checkpoints, figures. Several batch sizes or learning rates are a "
        "sweep: a run directory for each of their combinations."
    ),
    version_flags=[],
    help_format="plaintext",
)


@dataclass(frozen=True)
class Places:
    """Where data lies, where results go and what is shown: nothing of it changes a result.

    Parameters
    ----------
    data_dir
        Directory of TFDS datasets. Default: TFDS_DATA_DIR or ~/tensorflow_datasets.
    archive
        Official CIFAR-10 archive, binary or Python, a path or an address: imported into the data
        directory first.
    allow_unverified
        Use an archive whose SHA-256 is not an official one; the run and its figures then say
        "unverified data".
    out
        Run directory, new or empty. Default: runs/<time>-<arch>-<norm>-<dataset>.
    resume
        Go on with this run or sweep from the newest complete epoch of every net, with its own
        settings; a flag that says otherwise is refused. It may be on other devices.
    mesh
        Devices to train on, such as seed=4,batch=2: four nets at the same time, the batches of each
        shared by two. Default: nets first, then the batch, over all devices.
    distributed
        This process is one of a job of several, which Slurm, Open MPI, Kubernetes, a cloud TPU or
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe. The first of them
        writes the results.
    plan
        Say what would train together, in how much memory and how long, and exit.
    preallocate
        Have JAX take most of a GPU's memory at once; otherwise it takes what it needs.
    deterministic
        On an accelerator, ask XLA for operations that give the same bits again, where it has them;
        slower. On a CPU they do anyway.
    skip_self_check
        Train without checking first that this installation computes rightly; the run says so.
    no_compilation_cache
        Compile anew; otherwise compiled code is kept in the user's cache for the next start.
    tensorboard
        Write each epoch's losses and accuracies for TensorBoard, too, in the run directory's
        tensorboard/.
    quiet
        Print nothing but the table at the end, and errors.
    summary
        Print the layer table of each net and exit.
    """

    data_dir: Path | None = None
    archive: str | None = None
    allow_unverified: bool = False
    out: Path | None = None
    resume: Path | None = None
    mesh: str | None = None
    distributed: bool = False
    plan: bool = False
    preallocate: bool = False
    deterministic: bool = False
    skip_self_check: bool = False
    no_compilation_cache: bool = False
    tensorboard: bool = False
    quiet: bool = False
    summary: bool = False


_SEVERAL = {"batch_size": (int, ()), "learning_rate": (float, (Config.learning_rate,))}
"""Settings of which the command takes several values: their type, and their default."""


def _settings_class() -> type:
    """The settings of `Config`, with several values of those that a sweep takes."""
    hints, fields = get_type_hints(Config), []
    for field in dataclasses.fields(Config):
        kind, default = hints[field.name], field.default
        if field.name in _SEVERAL:
            each, default = _SEVERAL[field.name]
            several = Parameter(consume_multiple=True, negative_iterable=())
            kind = Annotated[tuple[each, ...], several]
        fields.append((field.name, kind, dataclasses.field(default=default)))
    made = dataclasses.make_dataclass("Settings", fields, frozen=True)
    made.__module__, made.__doc__ = __name__, Config.__doc__
    return made


if TYPE_CHECKING:
    Settings = Config
else:
    Settings = _settings_class()

_SETTINGS = Group("Settings that decide the result")
_PLACES = Group("Data, output, devices")
_FLAGS = {"name": "*", "negative_bool": ()}


@app.default
def main(
    *,
    settings: Annotated[Settings, Parameter(group=_SETTINGS, **_FLAGS)] = Settings(),  # noqa: B008 (frozen)
    places: Annotated[Places, Parameter(group=_PLACES, **_FLAGS)] = Places(),
) -> int:
    """Trains and reports; returns the exit code."""
    configs = _configs(settings)
    if places.summary:
        _print_summary(configs[0], places)
        return 0
    # XLA logs as errors, each time it loads, that its own tuning hints are no processor features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not places.preallocate:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if places.deterministic:
        _ask_for_deterministic_operations()
    if not places.distributed:
        return _resume(configs, places) if places.resume else _begin(configs, places)
    _keep_compiled_code(places)
    from jaxnorm import devices, job

    devices.use_all_cores()
    job.join()
    cli.before_failing(job.part)
    with job.watched(_how_to_go_on(places.resume or places.out, places)):
        return _resume(configs, places) if places.resume else _begin(configs, places)


def _configs(settings: Any) -> list[Config]:
    """The configuration of each run that the flags ask for."""
    from jaxnorm.config import product

    base = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Config)}
    swept = {name: base.pop(name) or (None,) for name in _SEVERAL}
    return product(base, swept)


def _begin(configs: list[Config], places: Places) -> int:
    """Trains a new run, or a new sweep."""
    from jaxnorm import job
    from jaxnorm.records import RunDirectory

    config = configs[0]
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{started}-{config.arch}-{config.norm}-{Path(config.dataset).name}"
    out = places.out or Path("runs") / name
    check = functools.partial(RunDirectory.check_unused, out)
    _in_first(check)  # before the data, so that a mistake is heard of at once
    job.agree(settings=repr((configs, places.mesh)))
    dataset, layout = _prepare(configs, places)
    if places.plan:
        _plan(configs, places, dataset, layout)
        return 0
    if len(configs) > 1:
        from jaxnorm.sweep import SweepDirectory

        _in_first(lambda: SweepDirectory.create(out, configs, _command()))
        return _train_sweep(configs, places, dataset, SweepDirectory(out), layout)
    _in_first(lambda: RunDirectory.create(out))
    return _train(config, places, dataset, RunDirectory(out), layout)


def _resume(given: list[Config], places: Places) -> int:
    """Goes on with a run or a sweep, by its own settings."""
    from jaxnorm import job
    from jaxnorm.records import RunDirectory
    from jaxnorm.sweep import SweepDirectory

    assert places.resume is not None
    sweep, directory = SweepDirectory(places.resume), RunDirectory(places.resume)

    def read() -> dict[str, Any]:
        """What the other processes need to know of it, which may not see the directory."""
        several = SweepDirectory.is_one(places.resume or "")
        runs = sweep.runs() if several else [directory]
        infos = [run.info() for run in runs if not several or (run.path / "run.json").exists()]
        configs = sweep.configs() if several else [infos[0].config]
        deterministic = any(info.deterministic for info in infos)
        _refuse_conflicts(given, configs, deterministic, places)
        return {
            "several": several,
            "configs": [config.to_json() for config in configs],
            "unverified": any(info.dataset["verified"] is False for info in infos),
            "deterministic": deterministic,
        }

    found = job.from_first(read)
    configs = [Config.from_json(each) for each in found["configs"]]
    unverified = places.allow_unverified or found["unverified"]
    places = dataclasses.replace(places, allow_unverified=unverified)
    if found["deterministic"] and not places.deterministic:
        places = dataclasses.replace(places, deterministic=True)
        _ask_for_deterministic_operations()
    locked = (sweep if found["several"] else directory).locked
    with contextlib.ExitStack() as stack:
        _in_first(lambda: stack.enter_context(locked()))  # before the data too
        dataset, layout = _prepare(configs, places)
        if places.plan:
            _plan(configs, places, dataset, layout)
            return 0
        if found["several"]:
            return _train_sweep(configs, places, dataset, sweep, layout)
        return _train(configs[0], places, dataset, directory, layout)


def _in_first(function: Callable[[], object]) -> None:
    """Calls it in the job's first process; what is wrong there ends all of them."""
    from jaxnorm import job

    job.together(lambda: function() if job.first() else None)


def _command() -> str:
    return shlex.join(["python", "-m", "jaxnorm.run", *cli.arguments()])


def _prepare(configs: Sequence[Config], places: Places) -> "tuple[Dataset, Layout | None]":
    """Loads the data and readies JAX; raises `UserError` for what can be known to fail."""
    from jaxnorm import job

    if places.tensorboard:
        from jaxnorm.scalars import Scalars

        Scalars.check()
    load = functools.partial(_load, configs[0], places)
    # The first may import an archive, or write a cache, that the others find.
    dataset = job.together(lambda: load() if job.first() else None)
    dataset = job.together(lambda: dataset or load())
    job.agree(data=dataset.fingerprint)
    _keep_compiled_code(places)
    from jaxnorm import devices, experiment

    devices.use_all_cores()
    layout = None if places.mesh is None else devices.Layout.parse(places.mesh)
    for config in configs:
        experiment.check(config, dataset)
        experiment.layout_of(configs, config.batch, layout)
    return dataset, layout


def _plan(
    configs: Sequence[Config], places: Places, dataset: "Dataset", layout: "Layout | None"
) -> None:
    """Measures and prints the plan."""
    from jaxnorm import job, plan

    say = _say(places)
    say(f"planning {sum(len(config.nets) for config in configs)} nets: compiling, and a few steps")
    programs = plan.plan(configs, dataset, layout)
    if job.first() and (places.plan or not places.quiet):
        print(plan.describe(programs, dataset.train_images.nbytes + dataset.test_images.nbytes))


def _say(places: Places) -> Callable[[str], None]:
    """Prints, in the first process and where it may."""
    from jaxnorm import job

    return (lambda text: None) if places.quiet or not job.first() else print


def _check(
    configs: Sequence[Config],
    places: Places,
    dataset: "Dataset",
    layout: "Layout | None",
    out: Path,
) -> str:
    """Says what the data is and checks that this installation computes rightly; what `run.json`
    says of that.
    """
    from jaxnorm import experiment

    say = _say(places)
    counts = f"{len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images"
    say(f"{dataset.caption}: {counts}, from {dataset.source}")
    if places.skip_self_check:
        return "skipped (--skip-self-check)"
    try:
        experiment.self_check(configs, dataset, layout)
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # where it is new, and so empty
        raise
    return "passed"


def _train(
    config: Config,
    places: Places,
    dataset: "Dataset",
    directory: "RunDirectory",
    layout: "Layout | None",
) -> int:
    """Checks, trains and reports."""
    from jaxnorm import effects, experiment, figures, job, page
    from jaxnorm.results import Run

    say, out = _say(places), directory.path
    checked = _check([config], places, dataset, layout, out)
    about = {"self_check": checked, "deterministic": places.deterministic}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cli.advising(_how_to_go_on(out, places)))
        if job.first():
            stack.enter_context(directory.locked())
        observer = _observer([config], places, out, stack)
        experiment.train_runs([config], dataset, [directory], _command(), observer, layout, **about)
        if not job.first():
            return 0
        say("measuring what the norms do inside the trained nets")
        effects.record(directory, dataset)
        figures.save_examples(Run(directory), dataset)
        part = page.write(directory)
    print(_final_table(directory))
    say(f"the report is {out / 'report.html'}; {len(part.pictures)} figures and the rest in {out}")
    return 0


def _train_sweep(
    configs: Sequence[Config],
    places: Places,
    dataset: "Dataset",
    sweep: "SweepDirectory",
    layout: "Layout | None",
) -> int:
    """Checks, plans and trains the runs of a sweep."""
    from jaxnorm import experiment, figures, job, tables
    from jaxnorm.results import Run

    checked = _check(configs, places, dataset, layout, sweep.path)
    about = {"self_check": checked, "deterministic": places.deterministic}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cli.advising(_how_to_go_on(sweep.path, places)))
        if job.first():
            stack.enter_context(sweep.locked())
        if not places.resume:
            _plan(configs, places, dataset, layout)
        observer = _observer(configs, places, sweep.path, stack)
        directories = sweep.runs() if job.first() else []
        experiment.train_runs(configs, dataset, directories, _command(), observer, layout, **about)
        if not job.first():
            return 0
        for directory in directories:
            figures.save_examples(Run(directory), dataset)
        table = tables.sweep([Run(directory) for directory in directories])
        sweep.write_summary(table.markdown())
    print(table.plain())
    _say(places)(
        f"the table is {sweep.path / 'sweep.md'}; a run's report: python -m jaxnorm.report "
        f"{shlex.quote(str(directories[0].path))}"
    )
    return 0


def _refuse_conflicts(
    given: Sequence[Config], own: Sequence[Config], deterministic: bool, places: Places
) -> None:
    """Raises `UserError` where a flag on the command line says otherwise than the run to resume."""
    flags = {
        token.partition("=")[0].removeprefix("--").replace("-", "_")
        for token in cli.arguments()
        if token.startswith("--")
    }
    for field in dataclasses.fields(Config):
        asked, had = (
            list(dict.fromkeys(getattr(config, field.name) for config in configs))
            for configs in (given, own)
        )
        if field.name in flags and asked != had:
            raise UserError(
                f"--{field.name.replace('_', '-')} {' '.join(map(str, asked))} conflicts with the "
                f"run to resume, which has {' '.join(map(str, had))}: leave it out, or start a new "
                "run"
            )
    if places.out is not None:
        raise UserError("--out conflicts with --resume, which goes on in the run's own directory")
    if places.deterministic and not deterministic:
        raise UserError("--deterministic conflicts with --resume, which does as the run did")


def _how_to_go_on(out: Path | None, places: Places) -> str:
    if out is None:
        return "what is complete is kept; go on with --resume and the run's directory"
    command = ["python", "-m", "jaxnorm.run", "--resume", str(out)]
    if places.data_dir:
        command += ["--data-dir", str(places.data_dir)]
    if places.distributed:
        command.append("--distributed")
    return f"what is complete is kept; go on with: {shlex.join(command)}"


def _ask_for_deterministic_operations() -> None:
    """Has XLA use no GPU operation whose result depends on the order in which threads come."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def _keep_compiled_code(places: Places) -> None:
    """Has JAX keep what it compiles, for this processor and these versions, in the user's cache."""
    if places.no_compilation_cache:
        return
    import jax

    from jaxnorm.places import default_cache_dir, private_directory

    directory = private_directory(default_cache_dir() / "compiled" / _machine())
    if directory is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _machine() -> str:
    """A short name for what compiled code depends on: the processor, and how many cores we have."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(("flags", "model"))})
    except OSError:
        features = [platform.processor()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256(f"{platform.machine()} {cores} {features}".encode()).hexdigest()[:16]


def _load(config: Config, places: Places) -> "Dataset":
    from jaxnorm import data, job

    bar = cli.Bar(places.quiet or not job.first())
    try:
        return data.load(
            config.dataset,
            places.data_dir,
            places.archive,
            allow_unverified=places.allow_unverified,
            progress=bar.at,
        )
    finally:
        bar.close()


def _observer(
    configs: Sequence[Config], places: Places, out: Path, stack: contextlib.ExitStack
) -> "Observer":
    """Who hears of the training: the terminal, and TensorBoard if it was asked for."""
    from jaxnorm import job
    from jaxnorm.observers import Observer, Observers

    if not job.first():
        return Observer()
    observer = _lines(configs, places.quiet)
    if not places.tensorboard:
        return observer
    from jaxnorm.scalars import Scalars

    scalars = Scalars(out / "tensorboard")
    stack.callback(scalars.close)
    return Observers(observer, scalars)


def _lines(configs: Sequence[Config], quiet: bool) -> "Observer":
    from jaxnorm.observers import Observer

    config, total = configs[0], sum(len(each.nets) * each.epochs for each in configs)

    class Lines(Observer):
        """A bar inside the epoch and a line after it, with the time that is left."""

        def __init__(self) -> None:
            self.what, self.steps, self.bar = "", 0, cli.Bar(quiet)
            self.before, self.done, self.clock = 0, 0, time.monotonic()
            self.config = config

        def on_nets(self, norm, seeds, steps):
            """Remembers what the bar is of."""
            self.what, self.steps = f"{norm} norm", steps
            if len(configs) > 1:
                self.what += f", {len(seeds)} nets"
            elif config.seeds > 1:
                last = f" to {seeds[-1]}" if len(seeds) > 1 else ""
                self.what += f", seed {seeds[0]}{last} of {config.seed_numbers[-1]}"

        def on_run(self, number, config):
            """Remembers what the next lines are of."""
            self.config = config

        def on_steps(self, epoch, done):
            """Moves the bar."""
            self.bar.at(f"{self.what}, epoch {epoch} of {config.epochs}", done, self.steps)

        def on_begun(self, complete):
            """Says from where a run is gone on with."""
            self.before = complete
            if not quiet:
                print(f"going on after {complete} of {total} epochs")

        def on_warning(self, text):
            """Prints it on standard error."""
            print(f"warning: {text}", file=sys.stderr)

        def on_epoch(self, epoch):
            """Prints the epoch's line in the bar's place."""
            self.bar.close()
            self.done += 1
            left = total - self.before - self.done
            seconds = (time.monotonic() - self.clock) / self.done * left
            if not quiet:
                line = _epoch_line(epoch, self.config, len(configs) > 1)
                print(line + _time_left(seconds), flush=True)

    return Lines()


def _time_left(seconds: float) -> str:
    if seconds == 0:
        return ""
    minutes = round(seconds / 60)
    if minutes < 1:
        return ", under a minute left"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f", about {hours}{minutes % 60} min left"


def _epoch_line(epoch: "Epoch", config: Config, swept: bool) -> str:
    seed = f"  seed {epoch.seed}" if config.seeds > 1 else ""
    if swept:
        seed = f"  batch {config.batch:>3}  rate {config.learning_rate:<6g}{seed}"
    held_out = ""
    if epoch.validation_loss is not None:
        held_out = f"validation accuracy {epoch.validation_accuracy:6.2%}  "
    return (
        f"{epoch.norm:>8}{seed}  epoch {epoch.epoch:>2}/{config.epochs}  "
        f"train loss {epoch.train_loss:.4f}  accuracy {epoch.train_accuracy:6.2%}  {held_out}"
        f"test loss {epoch.test_loss:.4f}  accuracy {epoch.test_accuracy:6.2%}  "
        f"{epoch.train_seconds + epoch.test_seconds:.1f} s"
    )


def _final_table(directory: "RunDirectory") -> str:
    from jaxnorm import stats

    info, epochs = directory.info(), directory.epochs()
    n = f"n = {info.config.seeds}" + (" seeds, mean +- deviation" if info.config.seeds > 1 else "")
    best_head = f"best of {info.config.epochs} (study's)"
    lines = [
        f"{'norm':>8}  parameters  {'last test accuracy':>20}  {best_head:>21}  "
        f"first epoch at {stats.TARGET:.0%}   ({info.dataset['caption']}, {n})"
    ]
    for norm in info.config.norms:
        nets = [stats.summarize(each) for each in stats.by_seed(epochs, norm).values()]
        last, best = (
            stats.accuracy_text(stats.Sample(tuple(getattr(net, name) for net in nets)), "+-")
            for name in ("last", "best")
        )
        first = stats.epochs_to_target(nets)
        lines.append(
            f"{norm:>8}  {info.parameters[norm]:>10,}  {last:>20}  {best:>21}  {first:>18}"
        )
    return "\n".join(lines)


_SUMMARY_LINE = "{:<7}{:>10}{:>17}{:>9}{:>8}{:>9}"


def _print_summary(config: Config, places: Places) -> None:
    from jaxnorm import experiment, model

    known = config.dataset in ("cifar10", "digits")
    classes = 10 if known else len(_load(config, places).class_names)
    experiment.check_models(config, classes)
    for norm in config.norms:
        net = model.CNN(norm, config.arch, classes, config.groups)
        rows = model.summarize(net)
        print(f"{norm} norm, arch {config.arch}, input 32x32x3")
        print(_SUMMARY_LINE.format("layer", "output", "receptive field", "kernel", "norm", "total"))
        for row in rows:
            shape, kernel, norm_ = "x".join(map(str, row.shape)), row.kernel, row.norm
            numbers = (f"{count:,}" for count in (kernel, norm_, kernel + norm_))
            print(_SUMMARY_LINE.format(row.name, shape, row.receptive_field, *numbers))
        print(_SUMMARY_LINE.format("total", "", "", "", "", f"{model.count_parameters(net):,}\n"))


if __name__ == "__main__":
    cli.leave(cli.run(app))
