"""The time that is left, by a clock that the test moves."""

import pytest

from jaxnorm.runs.remaining import REPORT_SECONDS, Remaining


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def epoch(clock, remaining, number, compiling=0.0):
    """An epoch of 10 steps: 8 s, 2 s of evaluation, and what is compiled before the first step."""
    clock.now += compiling
    for done in range(1, 11):
        clock.now += 0.8
        remaining.steps(done)
    clock.now += 2
    return remaining.epoch(number)


def test_what_is_left_counts_starts_ends_and_the_report_and_does_not_grow():
    clock, left = Clock(), []
    remaining = Remaining(programs=3, nets=3, epochs=2, clock=clock)
    for norm in "abc":
        clock.now += 1
        remaining.start(norm, 1, 10)
        left += [epoch(clock, remaining, 1, compiling=20), epoch(clock, remaining, 2)]
        clock.now += 4  # the probes
    assert left == sorted(left, reverse=True)
    # Epochs, starts, ends: taken to last as long as an epoch until one was seen, which took 5 s.
    wanted = [50 + 40 + 30, 40 + 40 + 30, 30 + 20 + 10, 20 + 20 + 10, 10 + 0 + 5, 0 + 0 + 5]
    assert left == pytest.approx([seconds + REPORT_SECONDS for seconds in wanted])


def test_nets_that_train_together_share_their_epochs():
    clock, lefts = Clock(), []
    remaining = Remaining(programs=1, nets=4, epochs=3, clock=clock)
    remaining.start("a", 4, 10)
    for number in (1, 2):
        lefts = [epoch(clock, remaining, number)] + [remaining.epoch(number) for _ in range(3)]
    of_net = 10 / 4
    assert lefts == pytest.approx([(11 - i) * of_net + REPORT_SECONDS for i in range(4)])


def test_what_a_resumed_run_has_is_not_left():
    clock = Clock()
    remaining = Remaining(programs=2, nets=2, epochs=4, clock=clock)
    remaining.resume(6)  # one net, and half of the other
    remaining.start("b", 1, 10)
    assert epoch(clock, remaining, 3) == pytest.approx(10 + 10 + REPORT_SECONDS)
    assert epoch(clock, remaining, 4) == pytest.approx(10 + REPORT_SECONDS)
