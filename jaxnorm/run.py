"""The command: `python -m jaxnorm.run --norm layer`. Flags in, exit code out."""

import contextlib
import datetime
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

from jaxnorm.config import Config, UserError

if TYPE_CHECKING:
    from jaxnorm.data import Dataset
    from jaxnorm.records import Epoch, RunDirectory

app = App(
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
    quiet
        Print nothing but the table at the end, and errors.
    summary
        Print the layer table of each net and exit.
    """

    data_dir: Path | None = None
    archive: str | None = None
    allow_unverified: bool = False
    out: Path | None = None
    quiet: bool = False
    summary: bool = False


_SETTINGS = Group("Settings that decide the result")
_PLACES = Group("Data, output")
_FLAGS = {"name": "*", "negative_bool": ()}


@app.default
def main(
    *,
    config: Annotated[Config, Parameter(group=_SETTINGS, **_FLAGS)] = Config(),  # noqa: B008  (frozen)
    places: Annotated[Places, Parameter(group=_PLACES, **_FLAGS)] = Places(),
) -> int:
    """Trains and reports; returns the exit code."""
    if places.summary:
        _print_summary(config, places)
        return 0
    return _train(config, places)


def _train(config: Config, places: Places) -> int:
    say: Callable[[str], None] = (lambda text: None) if places.quiet else print
    started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = (
        places.out
        or Path("runs") / f"{started}-{config.arch}-{config.norm}-{Path(config.dataset).name}"
    )
    from jaxnorm.records import RunDirectory

    new = not out.exists()
    directory = RunDirectory.create(out)  # before the data, so that a mistake is heard of at once
    try:
        dataset = _load(config, places)
        from jaxnorm import experiment

        experiment.check(config, dataset)
    except BaseException:
        if new:
            _remove_empty(out)
        raise
    from jaxnorm import figures

    trained, tested = len(dataset.train_labels), len(dataset.test_labels)
    say(
        f"{dataset.caption}: {trained:,} training and {tested:,} test images, from {dataset.source}"
    )
    command = shlex.join(["python", "-m", "jaxnorm.run", *sys.argv[1:]])
    experiment.run(config, dataset, directory, command, _observer(config, places.quiet))
    figures.save_examples(directory, dataset)
    figures.draw(directory)
    print(_final_table(directory))
    say(
        f"{len(list((out / 'figures').glob('*.png')))} figures in {out / 'figures'}; everything "
        f"else in {out}"
    )
    return 0


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _load(config: Config, places: Places) -> "Dataset":
    from jaxnorm import data

    with _Bar(places.quiet) as bar:
        return data.load(
            config.dataset,
            places.data_dir,
            places.archive,
            allow_unverified=places.allow_unverified,
            progress=bar.at,
        )


class _Bar:
    """One progress bar at a time on standard error, for whatever is being done; none where that is
    no terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self._disable = True if quiet else None  # None: tqdm looks whether it writes to a terminal
        self._what: str | None = None
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` is reached."""
        from tqdm import tqdm

        if what != self._what:
            self.__exit__()
            self._what, self._bar = (
                what,
                tqdm(total=total, desc=what, leave=False, disable=self._disable, unit_scale=True),
            )
        self._bar.n = done
        self._bar.refresh()


def _observer(config: Config, quiet: bool) -> Any:
    from jaxnorm.experiment import Observer

    class Lines(Observer):
        """A bar inside the epoch and a line after it."""

        def __init__(self) -> None:
            self.norm, self.steps, self.bar = "", 0, _Bar(quiet)

        def on_norm(self, norm, seed, steps):
            self.norm, self.steps = norm, steps

        def on_steps(self, epoch, done):
            self.bar.at(f"{self.norm} norm, epoch {epoch} of {config.epochs}", done, self.steps)

        def on_epoch(self, epoch):
            self.bar.__exit__()
            if not quiet:
                print(_epoch_line(epoch, config.epochs), flush=True)

    return Lines()


def _epoch_line(epoch: "Epoch", epochs: int) -> str:
    return (
        f"{epoch.norm:>8}  epoch {epoch.epoch:>2}/{epochs}  train loss {epoch.train_loss:.4f}  "
        f"accuracy {epoch.train_accuracy:6.2%}  "
        f"test loss {epoch.test_loss:.4f}  accuracy {epoch.test_accuracy:6.2%}  "
        f"{epoch.train_seconds + epoch.test_seconds:.1f} s"
    )


def _final_table(directory: "RunDirectory") -> str:
    from jaxnorm import stats

    info, epochs = directory.info(), directory.epochs()
    lines = [
        f"{'norm':>8}  parameters  best test accuracy  last test accuracy  first epoch at "
        f"{stats.TARGET:.0%}   ({info.dataset['caption']}, n = 1)"
    ]
    for norm in info.config.norms:
        summary = stats.summarize([epoch for epoch in epochs if epoch.norm == norm])
        best = f"{summary.best:.2%} (epoch {summary.best_epoch})"
        lines.append(
            f"{norm:>8}  {info.parameters[norm]:>10,}  {best:>18}  {summary.last:>18.2%}  "
            f"{summary.first_at_target or 'never':>18}"
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


def command(arguments: list[str] | None = None) -> int:
    """Runs the command and turns what goes wrong into one line on standard error and an exit code:
    2 for a mistake of the user's, 1 for a failed run.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return (
            app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
            or 0
        )
    except (CycloptsError, UserError) as error:
        cause = (
            error
            if isinstance(error, UserError)
            else error.__cause__
            if isinstance(error.__cause__, UserError)
            else error
        )
        return _fail(cause, 2)
    except ArithmeticError as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error.filename or 'writing'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the epochs on disk are complete", 130)


def _fail(error: object, code: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(command())
