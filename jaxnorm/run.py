"""The command: `python -m jaxnorm.run --norm layer`. Flags in, exit code out."""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter

from jaxnorm import cli
from jaxnorm.config import Config, UserError

if TYPE_CHECKING:
    from jaxnorm.data import Dataset
    from jaxnorm.experiment import Observer
    from jaxnorm.records import Epoch, RunDirectory, RunInfo

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.run",
    help=(
        "Train a small CNN under batch, group or layer normalization and write a run directory: "
        "metrics, predictions, checkpoints, figures."
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
        Go on with this run from the newest complete epoch of every norm and seed, with its own
        settings; a flag that says otherwise is refused.
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
    deterministic: bool = False
    skip_self_check: bool = False
    no_compilation_cache: bool = False
    tensorboard: bool = False
    quiet: bool = False
    summary: bool = False


_SETTINGS = Group("Settings that decide the result")
_PLACES = Group("Data, output")
_FLAGS = {"name": "*", "negative_bool": ()}


@app.default
def main(
    *,
    config: Annotated[Config, Parameter(group=_SETTINGS, **_FLAGS)] = Config(),  # noqa: B008 (frozen)
    places: Annotated[Places, Parameter(group=_PLACES, **_FLAGS)] = Places(),
) -> int:
    """Trains and reports; returns the exit code."""
    if places.summary:
        _print_summary(config, places)
        return 0
    if places.resume:
        return _resume(config, places, places.resume)
    return _begin(config, places)


def _begin(config: Config, places: Places) -> int:
    """Trains a new run."""
    from jaxnorm.records import RunDirectory

    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{started}-{config.arch}-{config.norm}-{Path(config.dataset).name}"
    out = places.out or Path("runs") / name
    RunDirectory.check_unused(out)  # before the data, so that a mistake is heard of at once
    dataset = _prepare(config, places)
    return _train(config, places, dataset, RunDirectory.create(out))


def _resume(given: Config, places: Places, run: Path) -> int:
    """Goes on with a run, by its own settings."""
    from jaxnorm.records import RunDirectory

    directory = RunDirectory(run)
    info = directory.info()
    _refuse_conflicts(given, info, places)
    with directory.locked():  # before the data too
        unverified = places.allow_unverified or info.dataset["verified"] is False
        places = dataclasses.replace(
            places, allow_unverified=unverified, deterministic=info.deterministic
        )
        return _train(info.config, places, _prepare(info.config, places), directory)


def _prepare(config: Config, places: Places) -> "Dataset":
    """Loads the data and readies JAX; raises `UserError` for what can be known to fail."""
    if places.tensorboard:
        from jaxnorm.scalars import Scalars

        Scalars.check()
    dataset = _load(config, places)
    if not places.no_compilation_cache:
        _keep_compiled_code()
    if places.deterministic:
        _ask_for_deterministic_operations()
    from jaxnorm import experiment, train

    train.use_all_cores()
    experiment.check(config, dataset)
    return dataset


def _train(config: Config, places: Places, dataset: "Dataset", directory: "RunDirectory") -> int:
    """Checks, trains and reports."""
    from jaxnorm import effects, experiment, figures, page
    from jaxnorm.results import Run

    say: Callable[[str], None] = (lambda text: None) if places.quiet else print
    counts = f"{len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images"
    say(f"{dataset.caption}: {counts}, from {dataset.source}")
    checked = "skipped (--skip-self-check)"
    if not places.skip_self_check:
        try:
            experiment.self_check(config, dataset)
        except BaseException:
            with contextlib.suppress(OSError):
                directory.path.rmdir()  # where it is new, and so empty
            raise
        checked = "passed"
    command = shlex.join(["python", "-m", "jaxnorm.run", *cli.arguments()])
    observer, out = _observer(config, places.quiet), directory.path
    with contextlib.ExitStack() as stack:
        stack.enter_context(cli.advising(_how_to_go_on(out, places)))
        stack.enter_context(directory.locked())
        if places.tensorboard:
            from jaxnorm.scalars import Scalars

            scalars = Scalars(out / "tensorboard")
            stack.callback(scalars.close)
            observer = experiment.Observers(observer, scalars)
        if places.resume:
            experiment.resume(dataset, directory, command, observer, checked)
        else:
            about = {"self_check": checked, "deterministic": places.deterministic}
            experiment.run(config, dataset, directory, command, observer, **about)
        say("measuring what the norms do inside the trained nets")
        effects.record(directory, dataset)
        figures.save_examples(Run(directory), dataset)
        part = page.write(directory)
    print(_final_table(directory))
    say(f"the report is {out / 'report.html'}; {len(part.pictures)} figures and the rest in {out}")
    return 0


def _refuse_conflicts(given: Config, info: "RunInfo", places: Places) -> None:
    """Raises `UserError` where a flag on the command line says otherwise than the run to resume."""
    flags = {
        token.partition("=")[0].removeprefix("--").replace("-", "_")
        for token in cli.arguments()
        if token.startswith("--")
    }
    for field in dataclasses.fields(Config):
        values = getattr(given, field.name), getattr(info.config, field.name)
        if field.name in flags and values[0] != values[1]:
            raise UserError(
                f"--{field.name.replace('_', '-')} {values[0]} conflicts with the run to resume, "
                f"which has {values[1]}: leave it out, or start a new run"
            )
    if places.out is not None:
        raise UserError("--out conflicts with --resume, which goes on in the run's own directory")
    if places.deterministic and not info.deterministic:
        raise UserError("--deterministic conflicts with --resume, which does as the run did")


def _how_to_go_on(out: Path, places: Places) -> str:
    command = ["python", "-m", "jaxnorm.run", "--resume", str(out)]
    if places.data_dir:
        command += ["--data-dir", str(places.data_dir)]
    return f"what is complete is kept; go on with: {shlex.join(command)}"


def _ask_for_deterministic_operations() -> None:
    """Has XLA use no GPU operation whose result depends on the order in which threads come."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def _keep_compiled_code() -> None:
    """Has JAX keep what it compiles, for this processor and these versions, in the user's cache."""
    # XLA logs as errors, each time it loads, that its own tuning hints are no processor features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
    from jaxnorm import data

    bar = cli.Bar(places.quiet)
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


def _observer(config: Config, quiet: bool) -> "Observer":
    from jaxnorm.experiment import Observer

    class Lines(Observer):
        """A bar inside the epoch and a line after it, with the time that is left."""

        def __init__(self) -> None:
            self.what, self.steps, self.bar = "", 0, cli.Bar(quiet)
            self.before, self.done, self.clock = 0, 0, time.monotonic()

        def on_nets(self, norm, seeds, steps):
            """Remembers what the bar is of."""
            self.what, self.steps = f"{norm} norm", steps
            if config.seeds > 1:
                last = f" to {seeds[-1]}" if len(seeds) > 1 else ""
                self.what += f", seed {seeds[0]}{last} of {config.seed_numbers[-1]}"

        def on_steps(self, epoch, done):
            """Moves the bar."""
            self.bar.at(f"{self.what}, epoch {epoch} of {config.epochs}", done, self.steps)

        def on_begun(self, complete):
            """Says from where a run is gone on with."""
            self.before = complete
            if not quiet:
                print(f"going on after {complete} of {config.epochs * len(config.nets)} epochs")

        def on_warning(self, text):
            """Prints it on standard error."""
            print(f"warning: {text}", file=sys.stderr)

        def on_epoch(self, epoch):
            """Prints the epoch's line in the bar's place."""
            self.bar.close()
            self.done += 1
            left = config.epochs * len(config.nets) - self.before - self.done
            seconds = (time.monotonic() - self.clock) / self.done * left
            if not quiet:
                print(_epoch_line(epoch, config) + _time_left(seconds), flush=True)

    return Lines()


def _time_left(seconds: float) -> str:
    if seconds == 0:
        return ""
    minutes = round(seconds / 60)
    if minutes < 1:
        return ", under a minute left"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f", about {hours}{minutes % 60} min left"


def _epoch_line(epoch: "Epoch", config: Config) -> str:
    seed = f"  seed {epoch.seed}" if config.seeds > 1 else ""
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
