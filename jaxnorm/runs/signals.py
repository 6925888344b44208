"""SIGTERM and Ctrl-C: a handler sets a flag, and the training loop polls it.

A kill at any moment loses no complete epoch, so a signal needs nothing else: it ends the work at
the next `check`, and a second one ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_received: list[int] = []


class Stopped(BaseException):
    """A signal asked the work to stop; `code` is the exit code that says so."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.code = 128 + number


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Makes `check` notice SIGTERM and Ctrl-C in the block. An ignored signal stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        """Sets the flag; the second signal ends the process."""
        if _received:
            os._exit(128 + number)
        _received.append(number)

    _received.clear()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
        _received.clear()


def check() -> None:
    """Raises `Stopped` if a signal was received."""
    if _received:
        raise Stopped(_received[0])
