"""SIGTERM and Ctrl-C: raised where they may be, put off while something is being written.

A signal ends the work by an exception, `Terminated` or `KeyboardInterrupt`, in the main thread.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_pending: list[int] = []


class Terminated(BaseException):
    """SIGTERM was received. No `Exception`, so that nothing takes it for a failure of its own."""


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Has SIGTERM raise `Terminated` in the block, and remembers both signals for `check`.

    What is raised inside a callback of the garbage collector (JAX has one) or a finalizer is lost,
    and Python would print a traceback of it: the signal is sent again instead, a moment later.
    """
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a background job
        numbers.append(signal.SIGINT)
    _pending.clear()
    print_lost = sys.unraisablehook

    def send_again(lost: Any) -> None:
        """Takes the place of `sys.unraisablehook`."""
        if _pending and isinstance(lost.exc_value, (Terminated, KeyboardInterrupt)):
            # To the main thread: a signal that another takes does not cut a sleep there short.
            main = threading.main_thread().ident
            threading.Timer(0.01, signal.pthread_kill, (main, _pending[0])).start()
        else:
            print_lost(lost)

    with _handling(numbers, _received):
        sys.unraisablehook = send_again
        try:
            yield
        finally:
            sys.unraisablehook = print_lost
            _pending.clear()


def _received(number: int, frame: FrameType | None) -> None:
    _pending.append(number)
    check()


def check() -> None:
    """Raises what a signal asked for, again if need be: for whoever works in a loop to call between
    its steps, in case something swallowed it.
    """
    if _pending:
        raise Terminated if _pending[0] == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts both signals off until the block is done, so that it is done whole or fails by itself.

    A signal that is ignored stays so.
    """
    held: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers = [each for each in numbers if signal.getsignal(each) is not signal.SIG_IGN]
    with _handling(numbers, lambda number, _: held.append(number)):
        yield
    if held:
        signal.raise_signal(held[0])


@contextlib.contextmanager
def _handling(
    numbers: list[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handles signals so in the block; only the main thread can, and only there do they arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            # None: a handler that was not set from Python, and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if old is None else old)
