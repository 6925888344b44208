"""Signals: raised outside of what is being written, put off inside, heard again if lost."""

import gc
import signal
import sys
import threading
import time

import pytest

from jaxnorm import interrupts

KINDS = [(signal.SIGTERM, interrupts.Terminated), (signal.SIGINT, KeyboardInterrupt)]


@pytest.fixture(autouse=True)
def as_before():
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    before = [signal.getsignal(number) for number, _ in KINDS]
    yield
    assert [signal.getsignal(number) for number, _ in KINDS] == before
    signal.signal(signal.SIGINT, outer)


@pytest.mark.parametrize(("number", "raised"), KINDS)
def test_a_signal_is_raised_and_again_by_check_until_the_block_ends(number, raised):
    with interrupts.heard():
        interrupts.check()
        with pytest.raises(raised):
            signal.raise_signal(number)
        with pytest.raises(raised):
            interrupts.check()
    interrupts.check()


@pytest.mark.parametrize(("number", "raised"), KINDS)
def test_a_signal_is_put_off_while_something_is_written(number, raised):
    done = []

    def write():
        with interrupts.uninterrupted():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("written")

    with interrupts.heard():
        with pytest.raises(raised):
            write()
        assert done == ["written"]


def test_what_fails_inside_is_not_hidden_by_a_signal():
    def write():
        with interrupts.uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("full")

    with interrupts.heard(), pytest.raises(OSError, match="full"):
        write()


@pytest.mark.parametrize(("number", "raised"), KINDS)
def test_a_signal_that_arrives_inside_the_garbage_collector_is_sent_again(number, raised, capsys):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    def work():
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(30)

    hook = sys.unraisablehook
    with interrupts.heard(), pytest.raises(raised):
        work()
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == ""


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.heard(), interrupts.uninterrupted():
            signal.raise_signal(signal.SIGINT)
        interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_may_use_them_too():
    done = []

    def work():
        with interrupts.heard(), interrupts.uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
