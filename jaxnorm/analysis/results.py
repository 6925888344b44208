"""One run's records, read once, and the numbers made from them: what figures and tables show."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.config import Net, UserError
from jaxnorm.storage.directory import RunDirectory, Shapes
from jaxnorm.storage.schema import Epoch, RunInfo, belongs

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
    def epochs(self) -> dict[Net, list[Epoch]]:
        """The epochs of each net that has any, by norm and seed, in the order of the settings."""
        epochs_of: dict[Net, list[Epoch]] = {net: [] for net in self.info.config.nets}
        for epoch in self.directory.epochs():
            if (epoch.norm, epoch.seed) in epochs_of:
                epochs_of[epoch.norm, epoch.seed].append(epoch)
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
    def norms(self) -> list[str]:
        """The norms that have any epoch."""
        trained = {norm for norm, _ in self.epochs}
        return [norm for norm in self.info.config.norms if norm in trained]

    def seeds(self, norm: str) -> list[int]:
        """The seeds of a norm that have any epoch."""
        return [seed for other, seed in self.epochs if other == norm]

    @cached_property
    def finished(self) -> dict[Net, list[Epoch]]:
        """The epochs of the nets that have all of theirs: those that statistics are made of."""
        last = self.info.config.epochs
        return {net: epochs for net, epochs in self.epochs.items() if epochs[-1].epoch == last}

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
    def predictions(self) -> dict[Net, np.ndarray]:
        """Test logits f32[N, classes] of each net.

        Raises `UserError` where they are not those that the newest epoch's line tells of.
        """
        logits_of, shape = {}, (self.info.dataset.test_count, len(self.class_names))
        for net, epochs in self.epochs.items():
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
        """Test logits of the first net of each norm: the one whose mistakes are shown."""
        return {norm: self.predictions[norm, self.seeds(norm)[0]] for norm in self.norms}

    @cached_property
    def labels(self) -> np.ndarray:
        """Test labels i32[N]."""
        return self.directory.predictions(next(iter(self.epochs)))[1]

    def probes(self, shapes: Shapes) -> dict[str, list[dict[str, np.ndarray]]]:
        """What was measured inside the nets of each norm, the first seed's first: the arrays of
        `shapes`; nothing where an earlier version did not measure them.
        """
        measured: dict[str, list[dict[str, np.ndarray]]] = {}
        for norm in self.norms:
            first, *others = [(norm, seed) for seed in self.seeds(norm)]
            nets = [first, *filter(self.directory.measured, others)]
            measured[norm] = [x for net in nets if (x := self.directory.probes(net, shapes))]
        return measured if all(measured.values()) else {}

    @cached_property
    def examples(self) -> dict[str, np.ndarray]:
        """What `save_examples` kept."""
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
        """Which seeds, in words."""
        seeds = self.seed_numbers
        if len(seeds) == 1:
            return f"seed {seeds[0]}"
        return f"n = {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"

    @property
    def caption(self) -> str:
        """What stands under every figure: the data, the nets and the seeds."""
        return f"{self.info.dataset.caption}; {self.info.config.arch} nets, {self.seeds_text}"

    @cached_property
    def mistakes(self) -> dict[str, np.ndarray]:
        """The misclassified test images that are shown, by figure name: three rules, all over the
        whole test set.
        """
        seed, labels, chosen = self.info.config.seed, self.labels, {}
        for norm, logits in self.logits.items():
            chosen[f"mistakes-confident-{norm}"] = stats.confident_mistakes([logits], labels, GRID)
            chosen[f"mistakes-drawn-{norm}"] = stats.drawn_mistakes(logits, labels, GRID, seed)
        if len(self.logits) > 1:
            every = list(self.logits.values())
            chosen["mistakes-common"] = stats.confident_mistakes(every, labels, GRID)
        return chosen

    def confusion(self, norm: str) -> np.ndarray:  # f64[classes, classes]
        """The mean confusion matrix of a norm's seeds, in counts."""
        nets = [self.predictions[norm, seed] for seed in self.seeds(norm)]
        return np.mean([stats.confusion_matrix(logits, self.labels) for logits in nets], axis=0)

    def class_accuracies(self, norm: str) -> np.ndarray:  # f64[seeds, classes]
        """The accuracy of each class under each seed of a norm."""
        nets = [self.predictions[norm, seed] for seed in self.seeds(norm)]
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
