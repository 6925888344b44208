"""What the commands share: the progress bar, and errors as one line and an exit code."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from cyclopts import App, CycloptsError

from jaxnorm import interrupts
from jaxnorm.config import Lost, UserError

MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
"""Exit codes: the user's mistake, a run that failed, Ctrl-C, SIGTERM."""
_arguments: list[str] = []
_before_failing: list[Callable[[], None]] = []


def arguments() -> list[str]:
    """What the command was called with."""
    return list(_arguments)


def before_failing(action: Callable[[], None]) -> None:
    """Has a process that fails do this after it has said why, and then end at once.

    Python's clean-up would wait for other processes, where it shares something with them.
    """
    _before_failing.append(action)


@contextlib.contextmanager
def advising(hint: str) -> Iterator[None]:
    """Where the work inside is stopped, or a disk or device fails it, the error says this too."""
    try:
        yield
    except (KeyboardInterrupt, interrupts.Terminated, OSError, RuntimeError) as error:
        error.add_note(hint)
        raise


def run(app: App, arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; what goes wrong is one line on standard error."""
    _arguments[:] = sys.argv[1:] if arguments is None else arguments
    options = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
    try:
        with interrupts.heard():
            return app(_arguments, **options) or 0
    except UserError as error:
        return _fail(error, MISTAKE)
    except CycloptsError as error:
        return _fail(error.__cause__ if isinstance(error.__cause__, UserError) else error, MISTAKE)
    except ArithmeticError as error:
        return _fail(error, FAILED)
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        return _fail(what, FAILED, error)
    except Lost as error:
        return _fail(error, FAILED, error)
    except RuntimeError as error:
        if type(error).__name__ != "JaxRuntimeError":  # by name: JAX may not be loaded
            raise
        return _fail(f"the device failed: {str(error)[:300]}", FAILED, error)
    except KeyboardInterrupt as error:
        return _fail("interrupted", INTERRUPTED, error)
    except interrupts.Terminated as error:
        return _fail("terminated", TERMINATED, error)


def _fail(what: object, code: int, error: BaseException | None = None) -> int:
    text = "; ".join([str(what), *getattr(error, "__notes__", ())])
    with contextlib.suppress(OSError):  # a terminal that is gone, or a log on the full disk
        print("error: " + " ".join(text.split()), file=sys.stderr)
    return code


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code.

    After an interruption it ends at once: XLA may still be computing in a thread of its own, and
    Python's clean-up would pull the memory away under it and crash.
    """
    if code in (INTERRUPTED, TERMINATED) or (code and _before_failing):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for action in _before_failing:
            action()
        os._exit(code)
    sys.exit(code)


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
