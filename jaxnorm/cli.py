"""What the commands share: the progress bar, and errors as one line and an exit code."""

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from cyclopts import App, CycloptsError

from jaxnorm.config import UserError

MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
"""Exit codes: the user's mistake, a run that failed, Ctrl-C, SIGTERM."""


def run(app: App, arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; what goes wrong is one line on standard error."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        options = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
        return app(arguments, **options) or 0
    except UserError as error:
        return _fail(error, MISTAKE)
    except CycloptsError as error:
        return _fail(error.__cause__ if isinstance(error.__cause__, UserError) else error, MISTAKE)
    except ArithmeticError as error:
        return _fail(error, FAILED)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; the epochs that were complete are on disk", INTERRUPTED)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    _fail("terminated; the epochs that were complete are on disk", TERMINATED)
    sys.exit(TERMINATED)


def _fail(error: object, code: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


class Bar:
    """One progress bar at a time on standard error, for whatever is being done.

    There is none where `quiet` is asked for or standard error is no terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self._disable = True if quiet else None  # None: tqdm looks whether it writes to a terminal
        self._what: str | None = None
        self._bar: Any = None

    def at(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` is reached."""
        from tqdm import tqdm

        if what != self._what:
            self.close()
            self._bar = tqdm(total=total, desc=what, leave=False, disable=self._disable)
            self._what = what
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._what = self._bar = None
