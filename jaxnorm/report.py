"""The command that makes reports of run directories: `python -m jaxnorm.report RUN`.

It draws the figures again and writes `report.md` and `report.html` in each run, and one page of
several runs side by side; it never trains.
"""

import sys
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
) -> int:
    """Reports on each run.

    Parameters
    ----------
    runs
        Run directories; of a sweep's folder, all of its runs.
    out
        The page of all of them. Default, with several runs: side-by-side.html in the folder that
        the first run lies in.
    """
    from jaxnorm.analysis import page
    from jaxnorm.analysis.tables import printable
    from jaxnorm.storage.sweep import Sweep

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


if __name__ == "__main__":
    sys.exit(cli.run(app))
