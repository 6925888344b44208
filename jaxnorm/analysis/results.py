"""One run's records, read once, and the numbers made from them: what figures and tables show.

The seeds of a norm are those of its finished nets, everywhere: a net that diverged or is unfinished
is left out of every table and figure, and captions and the report say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.config import NetId, UserError
from jaxnorm.records import Epoch, RunInfo, belongs
from jaxnorm.storage.directory import RunDirectory, Shapes

GRID = 10
"""Images in a grid of mistakes: 5 columns, 2 rows."""


@dataclass(frozen=True, repr=False)
class Run:
    """One run's records, read once."""

    directory: RunDirectory

    def __repr__(self) -> str:
        return f"Run({str(self.directory.path)!r})"

    @cached_property
    def info(self) -> RunInfo:
        """`run.json`."""
        return self.directory.info()

    @cached_property
    def epochs(self) -> dict[NetId, list[Epoch]]:
        """The epochs of each net that has any, by norm and seed, in the order of the settings."""
        epochs_of: dict[NetId, list[Epoch]] = {net: [] for net in self.info.config.nets}
        for epoch in self.directory.epochs():
            if epoch.net in epochs_of:
                epochs_of[epoch.net].append(epoch)
        last = self.info.config.epochs
        for (norm, seed), epochs in epochs_of.items():
            numbers = [epoch.epoch for epoch in epochs]
            if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > last:
                raise UserError(
                    f"{self.directory.path / 'metrics.jsonl'}: the epochs of {norm} norm, seed "
                    f"{seed}, are not 1, 2, 3 and so on to {last} at most"
                )
        return {net: epochs for net, epochs in epochs_of.items() if epochs}

    @cached_property
    def finished(self) -> dict[NetId, list[Epoch]]:
        """The epochs of the nets that have all of theirs: those that everything is made of."""
        last = self.info.config.epochs
        return {net: epochs for net, epochs in self.epochs.items() if epochs[-1].epoch == last}

    @cached_property
    def norms(self) -> list[str]:
        """The norms that have a finished net."""
        return [norm for norm in self.info.config.norms if self.seeds(norm)]

    def seeds(self, norm: str) -> list[int]:
        """The seeds of a norm: those of its finished nets."""
        return [seed for other, seed in self.finished if other == norm]

    @cached_property
    def summaries(self) -> dict[str, dict[int, stats.Summary]]:
        """The summaries of the finished nets of each norm that has one, by seed."""
        summaries: dict[str, dict[int, stats.Summary]] = {norm: {} for norm in self.norms}
        for (norm, seed), epochs in self.finished.items():
            summaries[norm][seed] = stats.summarize(epochs)
        return {norm: by_seed for norm, by_seed in summaries.items() if by_seed}

    def sample(self, norm: str, field: str = "last") -> stats.Sample:
        """A field of the summaries of a norm's finished nets."""
        return stats.Sample(tuple(getattr(n, field) for n in self.summaries[norm].values()))

    @cached_property
    def differences(self) -> list[stats.Difference]:
        """The last test accuracies of every two norms, compared by seed."""
        return differences([self])

    @cached_property
    def predictions(self) -> dict[NetId, np.ndarray]:
        """Test logits f32[N, classes] of each finished net.

        Raises `UserError` where they are not those that the newest epoch's line tells of.
        """
        logits_of, shape = {}, (self.info.dataset.test_count, len(self.class_names))
        for net, epochs in self.finished.items():
            logits, labels = self.directory.predictions(net)
            if logits.shape != shape or not belongs(logits, labels, epochs[-1]):
                raise UserError(
                    f"{self.directory.path}: the predictions of {net[0]} norm, seed {net[1]}, are "
                    f"not those of its epoch {epochs[-1].epoch}"
                )
            logits_of[net] = logits
        return logits_of

    @cached_property
    def logits(self) -> dict[str, np.ndarray]:
        """Test logits of the net of each norm whose mistakes are shown: that of `shown_seed`."""
        return {norm: self.predictions[NetId(norm, self.shown_seed(norm))] for norm in self.norms}

    def shown_seed(self, norm: str) -> int:
        """The seed of the net of a norm that is shown where only one is: the first that is finished
        under every norm, or else under this one.
        """
        everywhere = set.intersection(*(set(self.seeds(norm)) for norm in self.norms))
        return min(everywhere or self.seeds(norm))

    @cached_property
    def labels(self) -> np.ndarray:
        """Test labels i32[N]."""
        return self.directory.predictions(next(iter(self.finished)))[1]

    def probes(self, shapes: Shapes) -> dict[str, dict[int, dict[str, np.ndarray]]]:
        """Returns what was measured inside the nets of each norm, by seed: the arrays of `shapes`.
        Norms of which no net was measured, or by an earlier version that measured less, are left
        out.
        """
        measured: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        for net in filter(self.directory.measured, self.finished):
            if arrays := self.directory.probes(net, shapes):
                measured.setdefault(net.norm, {})[net.seed] = arrays
        return {norm: measured[norm] for norm in self.norms if norm in measured}

    @property
    def unmeasured(self) -> list[str]:
        """A line for each norm of which no net was measured inside."""
        measured = {norm for norm, _ in filter(self.directory.measured, self.finished)}
        path = self.directory.path / "probes"
        return [
            f"{path / norm}-{self.seeds(norm)[0]}.npz is missing, as are those of its other seeds"
            for norm in self.norms
            if norm not in measured
        ]

    @cached_property
    def examples(self) -> dict[str, np.ndarray]:
        """The images that `save_examples` kept."""
        return self.directory.examples()

    @property
    def class_names(self) -> Sequence[str]:
        """The classes, by number."""
        return self.info.dataset.class_names

    @cached_property
    def seed_numbers(self) -> list[int]:
        """The seeds of which a net is finished; where none is, those of the settings."""
        return sorted({seed for _, seed in self.finished}) or list(self.info.config.seed_numbers)

    @property
    def seeds_text(self) -> str:
        """The seeds in words, and how many nets are left out because they are not finished."""
        return seeds_text(self.seed_numbers) + left_out([self])

    @property
    def data(self) -> str:
        """The data, as every figure and table names it."""
        return self.info.dataset.caption

    @property
    def caption(self) -> str:
        """The line under every figure: the data, the nets and the seeds."""
        return f"{self.data}; {self.info.config.arch} nets, {self.seeds_text}"

    @cached_property
    def mistakes(self) -> dict[str, np.ndarray]:
        """The misclassified test images that are shown, by figure name: three rules, all over the
        whole test set.
        """
        seed, chosen = self.info.config.seed, {}
        for norm, logits in self.logits.items():
            one = stats.confident_mistakes([logits], self.labels, GRID)
            chosen[f"mistakes-confident-{norm}"] = one
            drawn = stats.drawn_mistakes(logits, self.labels, GRID, seed)
            chosen[f"mistakes-drawn-{norm}"] = drawn
        if len(self.logits) > 1:
            every = list(self.logits.values())
            chosen["mistakes-common"] = stats.confident_mistakes(every, self.labels, GRID)
        return chosen

    def confusion(self, norm: str) -> np.ndarray:  # f64[classes, classes]
        """The mean confusion matrix of a norm's seeds, in counts."""
        nets = [self.predictions[NetId(norm, seed)] for seed in self.seeds(norm)]
        return np.mean([stats.confusion_matrix(logits, self.labels) for logits in nets], axis=0)

    def class_accuracies(self, norm: str) -> np.ndarray:  # f64[seeds, classes]
        """The accuracy of each class under each seed of a norm."""
        nets = [self.predictions[NetId(norm, seed)] for seed in self.seeds(norm)]
        return np.array([stats.class_accuracy(logits, self.labels) for logits in nets])

    def images(self, rows: np.ndarray) -> list[np.ndarray]:  # of u8[32, 32, 3]
        """Test images by their row; raises `UserError` where one was not kept."""
        places = {int(row): place for place, row in enumerate(self.examples["test_rows"])}
        if absent := {*map(int, rows)} - places.keys():
            raise UserError(
                f"{self.directory.path / 'examples.npz'} lacks {len(absent)} of the test images "
                "to show"
            )
        return [self.examples["test_images"][places[int(row)]] for row in rows]


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    whole = len(seeds) == seeds[-1] - seeds[0] + 1
    numbers = f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))
    return f"n = {len(seeds)} seeds ({numbers})"


def left_out(runs: Sequence[Run]) -> str:
    """Says how many nets of runs are finished, if others are left out."""
    nets = sum(len(run.info.config.nets) for run in runs)
    finished = sum(len(run.finished) for run in runs)
    return f", {finished} of {nets} nets finished" * (finished < nets)


def differences(runs: Sequence[Run]) -> list[stats.Difference]:
    """The last test accuracies of every two norms of runs that share data and all other settings,
    compared by seed.
    """
    last = {
        norm: {seed: net.last for seed, net in nets.items()}
        for run in runs
        for norm, nets in run.summaries.items()
    }
    return stats.differences(last, runs[0].info.dataset.test_count)
