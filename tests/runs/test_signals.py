"""Signals: a flag that the training loop polls; a second one ends the process."""

import signal
import subprocess
import sys
import threading

import pytest

from jaxnorm.runs import signals

NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def as_before():
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before
    signal.signal(signal.SIGINT, outer)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_told_at_the_next_check_and_forgotten_after_the_block(number):
    with signals.handled():
        signals.check()
        signal.raise_signal(number)
        for _ in range(2):
            with pytest.raises(signals.Stopped) as raised:
                signals.check()
            assert raised.value.code == 128 + number
    signals.check()


def test_a_block_that_fails_leaves_the_handlers_as_they_were():
    def fail():
        with signals.handled():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()


def test_an_ignored_signal_stays_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            signal.raise_signal(signal.SIGINT)
            signals.check()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_thread_may_use_it_too():
    done = []

    def work():
        with signals.handled():
            signals.check()
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.slow
def test_the_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from jaxnorm.runs import signals\n"
        "with signals.handled():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 143
