"""The command that makes reports of run directories: `python -m jaxnorm.report RUN`.

It draws the figures again and writes `report.md` and `report.html` in each run, and one page of
several runs side by side; it never trains. With `--detect` it says how many seeds a run needs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from jaxnorm import cli
from jaxnorm.config import Setting, UserError

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.report",
    help=(
        "Write the reports of run directories, report.md and report.html; nothing is trained. "
        "Several runs are put side by side in one more page."
    ),
    help_format="plaintext",
)


@app.default
def main(
    *runs: Annotated[Path, Parameter(name="RUN"), cli.PATH],
    out: Annotated[Path | None, cli.PATH] = None,
    detect: float | None = None,
    deviation: float | None = None,
) -> int:
    """Reports on each run.

    Parameters
    ----------
    runs
        Run directories; of a sweep's folder, all of its runs.
    out
        The page of all of them. Default, with several runs: side-by-side.html in the folder that
        the first run lies in.
    detect
        Print how many seeds it takes to find a difference of this many points, from how much the
        differences of each run vary, and write no report.
    deviation
        With --detect, the standard deviation of paired differences, in points. It needs no run.
    """
    from jaxnorm.analysis import page
    from jaxnorm.analysis.tables import printable
    from jaxnorm.storage.sweep import Sweep

    if detect is not None:
        if out is not None:
            raise UserError(
                Setting("detect"), " writes no report, and so takes no ", Setting("out")
            )
        _print_seeds_needed(runs, detect, deviation)
        return 0
    if deviation is not None:
        raise UserError(Setting("deviation"), " needs ", Setting("detect"), " POINTS")
    if not runs:
        raise UserError("no run directory was given: python -m jaxnorm.report RUN [RUN ...]")
    if out and out.is_dir():
        raise UserError(
            Setting("out", out), f" is a folder: name a file, such as {out / 'side-by-side.html'}"
        )
    if out and out.suffix.lower() != ".html":
        raise UserError(Setting("out", out), " is no page: give a name that ends with .html")
    parts, errors = [], []
    for path in runs:
        try:
            directories = Sweep.open(path).directories
        except (UserError, OSError) as error:
            errors.append(error)
            continue
        for directory in directories:
            try:
                part = page.write(directory)
            except (UserError, OSError) as error:
                errors.append(error)
                continue
            parts.append(part)
            print(printable(f"{directory.path / 'report.html'}: {len(part.charts)} figures"))
            for line in part.missing:
                print(f"missing: {line}", file=sys.stderr)
    if not parts:
        raise errors[0]
    unread = [printable(str(error)) for error in errors]
    for line in unread:
        print(f"missing: {line}", file=sys.stderr)
    if out or len(parts) + len(unread) > 1:
        together = out or parts[0].run.directory.path.absolute().parent / "side-by-side.html"
        page.write_together(together, parts, unread)
        total = len(parts) + len(unread)
        print(printable(f"{together}: {len(parts)} of {total} runs side by side"))
    return 0


def _print_seeds_needed(runs: Sequence[Path], detect: float, deviation: float | None) -> None:
    """Prints how many seeds find a difference of `detect` points, from the deviations of runs or by
    hand.
    """
    from jaxnorm.analysis import tables
    from jaxnorm.analysis.results import Run
    from jaxnorm.storage.sweep import Sweep

    for name, value in (("detect", detect), ("deviation", deviation)):
        if value is not None and not 0.01 <= value <= 100:
            raise UserError(Setting(name, value), " is no number of points from 0.01 to 100")
    if not runs and deviation is None:
        raise UserError("name a run directory, or give ", Setting("deviation"), " POINTS")
    by_hand = {} if deviation is None else {"any, by hand": deviation / 100}
    for path in runs:
        for directory in Sweep.open(path).directories:
            pairs = Run(directory).differences
            if not pairs:
                raise UserError(f"{directory.path} has no two norms with a net of the same seed")
            print(tables.printable(str(directory.path)))
            print(tables.seeds_needed(detect / 100, tables.deviations(pairs)).plain())
    if by_hand:
        print(tables.seeds_needed(detect / 100, by_hand).plain())


if __name__ == "__main__":
    sys.exit(cli.run(app))
