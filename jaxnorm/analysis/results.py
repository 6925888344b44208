"""One run's records, read once, and the numbers made from them: what figures and reports show."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.config import Net, UserError
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.schema import Epoch, RunInfo, belongs

GRID = 10
"""Images in a grid of mistakes: 5 columns, 2 rows."""

RULES = {
    "confident": "The mistakes it is surest of",
    "drawn": "Mistakes drawn by the seed",
    "common": "Wrong under every norm, surest first",
}


@dataclass(frozen=True)
class Tile:
    """A misclassified test image, its true class, and what each net says."""

    image: np.ndarray  # u8[32, 32, 3]
    true: str
    said: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Misclassified test images that were chosen by one rule; of one norm, or of all."""

    name: str
    norm: str | None
    title: str
    tiles: list[Tile]


@dataclass(frozen=True)
class Run:
    """One run's records, read once."""

    directory: RunDirectory

    @cached_property
    def info(self) -> RunInfo:
        """`run.json`."""
        return self.directory.info()

    @cached_property
    def epochs(self) -> dict[Net, list[Epoch]]:
        """The epochs of each net that has any, by norm and seed, in the order of the settings."""
        found: dict[Net, list[Epoch]] = {net: [] for net in self.info.config.nets}
        for epoch in self.directory.epochs():
            if (epoch.norm, epoch.seed) in found:
                found[epoch.norm, epoch.seed].append(epoch)
        for (norm, seed), own in found.items():
            numbers = [epoch.epoch for epoch in own]
            if numbers != list(range(1, len(own) + 1)) or len(own) > self.info.config.epochs:
                raise UserError(
                    f"{self.directory.path / 'metrics.jsonl'}: the epochs of {norm} norm, seed "
                    f"{seed}, are not 1, 2, 3 and so on to {self.info.config.epochs} at most"
                )
        return {net: each for net, each in found.items() if each}

    @cached_property
    def norms(self) -> list[str]:
        """The norms that have any epoch."""
        trained = {norm for norm, _ in self.epochs}
        return [norm for norm in self.info.config.norms if norm in trained]

    def seeds(self, norm: str) -> list[int]:
        """The seeds of a norm that have any epoch."""
        return [seed for own, seed in self.epochs if own == norm]

    @cached_property
    def finished(self) -> dict[Net, list[Epoch]]:
        """The epochs of the nets that have all of theirs: those that statistics are made of."""
        last = self.info.config.epochs
        return {net: each for net, each in self.epochs.items() if each[-1].epoch == last}

    @cached_property
    def summaries(self) -> dict[str, dict[int, stats.Summary]]:
        """The summaries of the finished nets of each norm that has one, by seed."""
        found: dict[str, dict[int, stats.Summary]] = {norm: {} for norm in self.norms}
        for (norm, seed), epochs in self.finished.items():
            found[norm][seed] = stats.summarize(epochs)
        return {norm: each for norm, each in found.items() if each}

    def sample(self, norm: str, field: str = "last") -> stats.Sample:
        """A field of the summaries of a norm's finished nets."""
        nets = self.summaries[norm].values()
        return stats.Sample(tuple(getattr(net, field) for net in nets))

    @cached_property
    def differences(self) -> list[stats.Difference]:
        """The last test accuracies of every two norms, compared by seed."""
        return stats.differences(
            {
                norm: {seed: net.last for seed, net in nets.items()}
                for norm, nets in self.summaries.items()
            },
            self.info.dataset.test_count,
        )

    @cached_property
    def predictions(self) -> dict[Net, np.ndarray]:
        """Test logits f32[N, classes] of each net.

        Raises `UserError` where they are not those that the newest epoch's line tells of.
        """
        found = {}
        for net, epochs in self.epochs.items():
            logits, labels = self.directory.predictions(net)
            wanted = (self.info.dataset.test_count, len(self.class_names))
            if logits.shape != wanted or not belongs(logits, labels, epochs[-1]):
                raise UserError(
                    f"{self.directory.path}: the predictions of {net[0]} norm, seed {net[1]}, are "
                    f"not those of its epoch {epochs[-1].epoch}"
                )
            found[net] = logits
        return found

    @cached_property
    def logits(self) -> dict[str, np.ndarray]:
        """Test logits f32[N, classes] of the first net of each norm: the one whose mistakes are
        shown.
        """
        return {norm: self.predictions[norm, self.seeds(norm)[0]] for norm in self.norms}

    @cached_property
    def labels(self) -> np.ndarray:
        """Test labels i32[N]."""
        return self.directory.predictions(next(iter(self.epochs)))[1]

    @cached_property
    def probes(self) -> dict[str, dict[str, np.ndarray]]:
        """What was measured inside the first net of each norm."""
        seed = self.info.config.seed
        return {norm: self.directory.probes((norm, seed)) for norm in self.norms}

    @cached_property
    def examples(self) -> dict[str, np.ndarray]:
        """What `save_examples` kept."""
        return self.directory.examples()

    @property
    def class_names(self) -> Sequence[str]:
        """The classes, by number."""
        return self.info.dataset.class_names

    @property
    def seeds_text(self) -> str:
        """Which seeds, in words."""
        seeds = self.info.config.seed_numbers
        if len(seeds) == 1:
            return f"seed {seeds[0]}"
        return f"n = {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"

    @property
    def caption(self) -> str:
        """What stands under every figure: the data, the nets and the seeds."""
        return f"{self.info.dataset.caption}; {self.info.config.arch} nets, {self.seeds_text}"

    def rows(self) -> dict[str, np.ndarray]:
        """The test images shown, by figure name: three rules, all over the whole test set."""
        seed, chosen = self.info.config.seed, {}
        for norm, logits in self.logits.items():
            chosen[f"mistakes-confident-{norm}"] = stats.confident_mistakes(
                logits, self.labels, GRID
            )
            chosen[f"mistakes-drawn-{norm}"] = stats.drawn_mistakes(logits, self.labels, GRID, seed)
        if len(self.logits) > 1:
            chosen["mistakes-common"] = stats.common_mistakes(
                list(self.logits.values()), self.labels, GRID
            )
        return chosen

    @cached_property
    def mistakes(self) -> list["Grid"]:
        """The grids of misclassified test images that figures and the page show."""
        grids = []
        for name, rows in self.rows().items():
            images = self.images(rows)
            _, rule, *rest = name.split("-", 2)
            shown = {n: logits for n, logits in self.logits.items() if not rest or n in rest}
            tiles = []
            for row, image in zip(rows, images, strict=True):
                said = []
                for norm, logits in shown.items():
                    probability = stats.probabilities(logits[row])
                    best = int(probability.argmax())
                    guess = f"{self.class_names[best]} {probability[best]:.0%}"
                    said.append(guess if rest else f"{norm}: {guess}")
                true = self.class_names[int(self.labels[row])]
                tiles.append(Tile(image, true, tuple(said)))
            grids.append(Grid(name, rest[0] if rest else None, RULES[rule], tiles))
        return grids

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
        kept = dict(
            zip(map(int, self.examples["test_rows"]), self.examples["test_images"], strict=True)
        )
        if absent := {*map(int, rows)} - kept.keys():
            raise UserError(
                f"{self.directory.path / 'examples.npz'} lacks {len(absent)} of the test images "
                "to show"
            )
        return [kept[int(row)] for row in rows]
