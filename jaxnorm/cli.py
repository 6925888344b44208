"""What the commands share: what training prints, errors as one line and an exit code, and the flags
that errors of the library speak of as settings.
"""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_origin

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError

from jaxnorm.config import Setting, Text, UserError, local_path
from jaxnorm.runs import signals

MISTAKE, FAILED = 2, 1
"""Exit codes: the user's mistake, a run that failed. A signal's is 128 and its number."""
_LONGEST = 1_000
_arguments: list[str] = []
_program = "python -m jaxnorm.run"


def _whole(kind: Any, tokens: Sequence[Any]) -> Any:
    for token in tokens:
        if not re.fullmatch(r"[+-]?\d{1,20}", token.value):
            wrong = f"{token.keyword} {token.value[:40]}"
            raise UserError(f"{wrong} is wrong: it must be a whole number")
    numbers = tuple(int(token.value) for token in tokens)
    return numbers if get_origin(kind) is tuple else numbers[0]


WHOLE = Parameter(converter=_whole)
"""Of a flag that takes whole numbers: without it 1.5 would be rounded."""


def _path(kind: Any, tokens: Sequence[Any]) -> Any:
    if kind is str and re.match("https?://", tokens[0].value, re.IGNORECASE):
        return tokens[0].value
    return kind(local_path(tokens[0].value))


PATH = Parameter(converter=_path)
"""Of a flag that takes a path of this machine; as a string, a web address too."""


def arguments() -> list[str]:
    """Returns the arguments that the command was called with."""
    return list(_arguments)


def given() -> set[str]:
    """The settings whose flags the command was called with."""
    flags = [token.partition("=")[0] for token in _arguments if token.startswith("--")]
    names = [flag.removeprefix("--").removeprefix("no-") for flag in flags]
    return {name.replace("-", "_") for name in names}


def program() -> list[str]:
    """Returns the words by which the command is called."""
    return _program.split()


@contextlib.contextmanager
def advising(hint: str) -> Iterator[None]:
    """Adds a hint to the error if a signal, a disk or a device stops the work inside."""
    try:
        yield
    except (signals.Stopped, OSError, RuntimeError) as error:
        error.add_note(hint)
        raise


class Unreported(Exception):
    """The report of trained nets could not be made."""


@contextlib.contextmanager
def reporting(hint: str) -> Iterator[None]:
    """Makes whatever stops the report inside one line, with this hint: nothing trained is lost."""
    try:
        yield
    except signals.Stopped as error:
        error.add_note(hint)
        raise
    except Exception as error:
        kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
        raise Unreported(f"the report was not made ({kind}{error}); {hint}") from error


def run(app: App, arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; what goes wrong is one line on standard error."""
    global _program
    _program, _arguments[:] = app.name[0], sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without these signs shows others
        sys.stdout.reconfigure(errors="replace")
    options = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
    try:
        os.getcwd()
    except FileNotFoundError:
        return _fail("the working directory is gone: change to one that exists", MISTAKE)
    try:
        with signals.handled():
            return app(_arguments, **options) or 0
    except (UserError, CycloptsError) as error:
        wrong: Any = error.__cause__ if isinstance(error.__cause__, UserError) else error
        if isinstance(error, UnusedCliTokensError):
            wrong = f"{' '.join(map(repr, error.unused_tokens or ()))} belongs to no flag"
        if isinstance(error, UnknownOptionError):
            wrong = _unknown(error)
        if isinstance(error, UnusedCliTokensError | UnknownOptionError):
            error.add_note("--help lists what each flag takes")
        return _fail(wrong, MISTAKE, error)
    except (ArithmeticError, Unreported) as error:
        return _fail(error, FAILED)
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(f"{error.filename}: {reason}" if error.filename else reason, FAILED, error)
    except RuntimeError as error:
        if type(error).__name__ != "JaxRuntimeError":  # by name: JAX may not be loaded
            raise
        return _fail(f"the device failed: {str(error)[:300]}", FAILED, error)
    except signals.Stopped as error:
        return _fail(error, error.code, error)


_KNOWN_AS = {
    "lr": "learning-rate",
    "bs": "batch-size",
    "batch": "batch-size",
    "wd": "weight-decay",
    "decay": "weight-decay",
    "data": "dataset",
    "model": "arch",
    "output": "out",
    "random-seed": "seed",
    "num-seeds": "seeds",
    "num-epochs": "epochs",
}
"""What other programs call some of our flags."""


def _unknown(error: UnknownOptionError) -> str:
    """That there is no such flag, and which one may be meant."""
    given = (error.token.keyword or error.token.value).partition("=")[0]
    flags = {name.strip("-") for argument in error.argument_collection for name in argument.names}
    meant = {name: name for name in flags}
    meant |= {name: flag for name, flag in _KNOWN_AS.items() if flag in flags}
    close = difflib.get_close_matches(given.strip("-").replace("_", "-"), meant, n=1, cutoff=0.7)
    return f"there is no flag {given}" + (f" (did you mean --{meant[close[0]]}?)" if close else "")


def as_flags(text: object) -> str:
    """Returns a text, or that of an error, with its settings as flags: `--batch-size 71` for
    `batch_size=71`, `--allow-large` for `allow_large=True`.
    """
    if isinstance(text, BaseException) and len(text.args) == 1:
        text = text.args[0]
    if not isinstance(text, Text):
        return str(text)
    return "".join(_flag(part) if isinstance(part, Setting) else part for part in text.parts)


def _flag(setting: Setting) -> str:
    name = setting.name.replace("_", "-")
    if setting.value is False:
        return f"--no-{name}"
    only_name = setting.value is None or setting.value is True
    return f"--{name}" if only_name else f"--{name} {setting.value}"


def leave(code: int) -> NoReturn:
    """Ends the process; if it failed in a job of several, at once, so that the others notice: an
    exit in good order would wait for them.
    """
    hosts: Any = sys.modules.get("jaxnorm.runs.hosts")
    if code and hosts is not None and hosts.joined:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(what: object, code: int, error: BaseException | None = None) -> int:
    # JAX adds a note of its own to what is raised while it traces: how to see its inner frames.
    notes = [n for n in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in n]
    text = "; ".join([as_flags(what), *notes])
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    with contextlib.suppress(OSError):  # a terminal that is gone, or a log on the full disk
        print(f"error: {line[:_LONGEST]}", file=sys.stderr)
    return code
