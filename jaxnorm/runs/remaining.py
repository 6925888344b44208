"""How long a run will still take, from what its nets have taken so far."""

import statistics
import time
from collections.abc import Callable, Hashable

REPORT_SECONDS = 3.0
"""What the report is taken to last."""


class Remaining:
    """Estimates the seconds that a run will still take.

    A program starts once, which compiles it; then a net of it costs its epochs, evaluation
    included, and its end: the probes, and what comes before the next net. What was not seen yet is
    taken to cost what was seen of others; the end of a net, before any was seen, an epoch.
    """

    def __init__(
        self, programs: int, nets: int, epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._programs, self._nets, self._epochs, self._clock = programs, nets, epochs, clock
        self._done, self._last, self._total = 0, clock(), nets * epochs
        self._starts: list[float] = []
        self._ends: list[float] = []  # of a net
        self._seconds: dict[Hashable, list[float]] = {}  # of a net's epoch, by program
        self._program: Hashable = None
        self._together, self._steps, self._epoch = 1, 1, 0
        self._reached: list[tuple[float, int]] = []

    def resume(self, complete: int) -> None:
        """Notes that this many epochs of all nets are complete."""
        self._done, self._nets = complete, self._nets - complete // self._epochs

    def start(self, program: Hashable, nets: int, steps: int) -> None:
        """Notes that nets of a program start to train together."""
        if self._epoch == self._epochs:
            self._ends += self._together * [(self._clock() - self._last) / self._together]
            self._nets -= self._together
        self._program, self._together, self._steps, self._epoch = program, nets, steps, 0
        self._reached, self._last = [], self._clock()

    def steps(self, done: int) -> None:
        """Notes that this many steps of the epoch are done."""
        self._reached.append((self._clock(), done))

    def epoch(self, number: int) -> float:
        """Notes that a net has finished an epoch; returns the seconds that are left."""
        self._done += 1
        if number != self._epoch:  # the first of the nets that train together
            self._note(self._clock() - self._last)
        self._epoch, self._reached, self._last = number, [], self._clock()
        return self._left()

    def _note(self, seconds: float) -> None:
        """Notes how long an epoch of all nets took; the first of a program has its start in it."""
        known = self._seconds.setdefault(self._program, [])
        if not known:
            steady = min(seconds, self._steady(seconds))
            self._starts.append(seconds - steady)
            seconds = steady
        known.append(seconds / self._together)

    def _steady(self, seconds: float) -> float:
        """Returns what an epoch would have taken by the median of its chunks, and its evaluation;
        what it took if there are too few of them.
        """
        pairs = zip(self._reached, self._reached[1:], strict=False)
        speeds = [(later - at) / (more - done) for (at, done), (later, more) in pairs]
        if len(speeds) < 2:
            return seconds
        return statistics.median(speeds) * self._steps + self._clock() - self._reached[-1][0]

    def _left(self) -> float:
        means = {program: statistics.mean(known) for program, known in self._seconds.items()}
        mean = statistics.mean(means.values())
        end = statistics.mean(self._ends) if self._ends else mean
        epochs = max(0, self._total - self._done)
        here = min(epochs, self._together * (self._epochs - self._epoch))
        seconds = here * means[self._program] + (epochs - here) * mean
        if epochs > here:
            starts = max(0, self._programs - len(means))
            seconds += starts * statistics.mean(self._starts)
        return seconds + max(1, self._nets) * end + REPORT_SECONDS
