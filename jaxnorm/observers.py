"""Who hears what happens while nets train: the progress on a terminal, TensorBoard, tests."""

from jaxnorm.config import Config, Norm
from jaxnorm.records import Epoch


class Observer:
    """Hears what happens. Every method does nothing unless overridden."""

    def on_nets(self, norm: Norm, seeds: list[int], steps: int) -> None:
        """The nets of a norm and these seeds begin to train, together; `steps` is the number of
        batches in an epoch. In a sweep a seed may be there for several learning rates.
        """

    def on_run(self, number: int, config: Config) -> None:
        """The epochs told from now on are of this run, the number-th of a sweep; not called where
        there is one run alone.
        """

    def on_steps(self, epoch: int, done: int) -> None:
        """So many batches of the epoch are done."""

    def on_epoch(self, epoch: Epoch) -> None:
        """A net's epoch is complete: trained, evaluated, and on disk where there is one."""

    def on_begun(self, complete: int) -> None:
        """A run is gone on with, of which so many epochs of all nets are complete."""

    def on_warning(self, text: str) -> None:
        """Something was found damaged, and is made again."""


class Observers(Observer):
    """Tells several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_nets(self, norm: Norm, seeds: list[int], steps: int) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_nets(norm, seeds, steps)

    def on_run(self, number: int, config: Config) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_run(number, config)

    def on_steps(self, epoch: int, done: int) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_steps(epoch, done)

    def on_epoch(self, epoch: Epoch) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_epoch(epoch)

    def on_begun(self, complete: int) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_begun(complete)

    def on_warning(self, text: str) -> None:
        """Tells each."""
        for each in self.observers:
            each.on_warning(text)
