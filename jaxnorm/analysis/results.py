"""A run's records, read once, and the numbers that figures and tables show.

The seeds of a norm are always those of its finished nets: a net that diverged or is unfinished is
left out of every table and figure, and captions and the report say so.
"""

import contextlib
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.config import NetId, UserError, named
from jaxnorm.data.datasets import Dataset
from jaxnorm.records import Environment, Epoch, Predictions, RunInfo
from jaxnorm.storage.directory import RunDirectory, Shapes
from jaxnorm.storage.net import NetFolder

GRID = 10
"""Images in a grid of mistakes: 5 columns, 2 rows."""
SAMPLE = 20
"""Training images shown."""
MOST_NETS, MOST_NORMS, MOST_CLASSES, MOST_MEASURED = 10_000, 100, 1_000, 1_000
"""The most that is shown one by one: nets, norms and classes of a run, numbers of a probe."""


@dataclass(frozen=True, repr=False)
class Run:
    """A run's records, read once."""

    directory: RunDirectory

    def __repr__(self) -> str:
        return f"Run({str(self.directory.path)!r})"

    @cached_property
    def info(self) -> RunInfo:
        """`run.json`. Raises `UserError` if it names more nets than can be shown."""
        info = self.directory.info()
        norms, seeds = len(info.config.norms), info.config.seeds
        if norms > MOST_NORMS or norms * seeds > MOST_NETS:
            raise UserError(
                f"{self.directory.path / 'run.json'} names {norms:,} norms and {norms * seeds:,} "
                f"nets: no more than {MOST_NORMS} and {MOST_NETS:,} can be shown"
            )
        return info

    def net(self, norm: str, seed: int) -> NetFolder:
        """Returns the folder of a net."""
        return NetFolder(self.directory, NetId(norm, seed))

    @cached_property
    def _read(self) -> tuple[dict[NetId, list[Epoch]], list[str]]:
        """The epochs of each net that has any, and a line for each damaged one."""
        epochs, damaged = {}, []
        for net in self.info.config.nets:
            try:
                epochs[net] = self.net(*net).epochs()
                config, path = self.info.config, self.net(*net).path
                if len(epochs[net]) > config.epochs:
                    raise UserError(f"{path} has more epochs than its run.json says")
                if (config.validation > 0) in {e.validation_loss is None for e in epochs[net]}:
                    raise UserError(f"{path} and its run.json disagree about held-out images")
            except (UserError, OSError) as error:
                epochs[net] = []
                damaged.append(str(error))
        return {net: of_net for net, of_net in epochs.items() if of_net}, damaged

    @property
    def epochs(self) -> dict[NetId, list[Epoch]]:
        """The epochs of each net that has any, by norm and seed, in the order of the settings."""
        return self._read[0]

    @property
    def damaged(self) -> list[str]:
        """A line for each damaged net."""
        return self._read[1]

    def csv(self) -> str:
        """Returns the epochs of every net as comma-separated values, a line each."""
        text, rows = io.StringIO(), [e.values for epochs in self.epochs.values() for e in epochs]
        names = [field.name for field in fields(Epoch)]
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @cached_property
    def environments(self) -> list[Environment]:
        """The environments in which the run began and in which its finished nets were trained."""
        found = [self.info.environment]
        for net in self.finished:
            found += [one for one in self.net(*net).result().environments if one not in found]
        return found

    @cached_property
    def finished(self) -> dict[NetId, list[Epoch]]:
        """The epochs of the nets that have ended with all of theirs: what everything is made of."""
        last = self.info.config.epochs
        return {
            net: epochs
            for net, epochs in self.epochs.items()
            if epochs[-1].epoch == last and self.net(*net).has_result()
        }

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
    def predictions(self) -> dict[NetId, Predictions]:
        """The predictions of each finished net on the test images.

        Raises `UserError` if that is not what its last line tells of, or of other labels.
        """
        count, classes = self.info.dataset.test_count, len(self.class_names)
        made = {net: self.net(*net).predictions(count, classes) for net in self.finished}
        for net, predictions in made.items():
            if not np.array_equal(predictions.labels, next(iter(made.values())).labels):
                raise UserError(f"{self.net(*net).path} has other labels than the first net")
        return made

    @cached_property
    def correct(self) -> dict[str, dict[int, np.ndarray]]:
        """The test images that each finished net classifies rightly, bool[N], by norm and seed.

        Raises `UserError` as `predictions` does.
        """
        right: dict[str, dict[int, np.ndarray]] = {norm: {} for norm in self.norms}
        for (norm, seed), net in self.predictions.items():
            right[norm][seed] = net.predicted == net.labels
        return right

    @cached_property
    def logits(self) -> dict[str, np.ndarray]:
        """Test logits of the net of each norm whose mistakes are shown: that of `shown_seed`.

        Raises `UserError` if they were not kept.
        """
        logits = {}
        for norm in self.norms:
            net = NetId(norm, self.shown_seed(norm))
            kept = self.predictions[net].logits
            if kept is None:
                raise UserError(f"{self.net(*net).path} holds no logits")
            logits[norm] = kept
        return logits

    def shown_seed(self, norm: str) -> int:
        """Returns the seed of the one net of a norm that is shown: the first that is finished under
        every norm, or else under this one.
        """
        everywhere = set.intersection(*(set(self.seeds(norm)) for norm in self.norms))
        return min(everywhere or self.seeds(norm))

    @cached_property
    def labels(self) -> np.ndarray:
        """Test labels i32[N]."""
        return next(iter(self.predictions.values())).labels

    def step_losses(self, norm: str, seed: int) -> np.ndarray:
        """Returns the training loss of every batch of a net: f32[epochs * steps]."""
        losses, config = self.net(norm, seed).result().losses, self.info.config
        if len(losses) != config.epochs * config.steps(self.info.dataset.train_count):
            raise UserError(f"{self.net(norm, seed).path} has not the losses of every batch")
        return losses.astype(np.float32)  # a reduced net's are f16

    def probes(self, shapes: Shapes) -> dict[str, dict[int, dict[str, np.ndarray]]]:
        """Returns what was measured inside the nets of each norm, by seed: the arrays of `shapes`.
        Norms of which no net was measured, or by an earlier version that measured less, are left
        out. Raises `UserError` if nets were not measured alike.
        """
        measured: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        for net in self.finished:
            folder = self.net(*net)
            if folder.measured() and (arrays := folder.probes(shapes)):
                measured.setdefault(net.norm, {})[net.seed] = arrays
                self._check_probes(net, measured)
        return {norm: measured[norm] for norm in self.norms if norm in measured}

    def _check_probes(self, net: NetId, measured: dict[str, dict[int, dict]]) -> None:
        """Raises `UserError` if a net was measured in another way than the nets before it."""
        arrays, first = measured[net.norm][net.seed], next(iter(measured[net.norm].values()))
        of_all = next(iter(next(iter(measured.values())).values()))
        fits = all(array.shape == first[name].shape for name, array in arrays.items())
        for name in {"sizes", "corruptions"} & arrays.keys():
            fits = fits and np.array_equal(arrays[name], of_all[name])
        if not fits or any(array.size > MOST_MEASURED for array in arrays.values()):
            raise UserError(
                f"{self.directory.path}: the probes of {named(net.norm)}, seed {net.seed}, do not "
                "fit those of the other nets"
            )

    @property
    def unmeasured(self) -> list[str]:
        """A line for each norm of which no net was measured inside."""
        measured = {norm for norm, seed in self.finished if self.net(norm, seed).measured()}
        return [
            f"{self.net(norm, self.seeds(norm)[0]).path / 'probes.npz'} is missing, as are those "
            "of its other seeds: nothing was measured (--no-probes), or it is lost"
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

    @property
    def shown_classes(self) -> Sequence[str]:
        """The classes, to show each; raises `UserError` if they are too many for that."""
        if len(self.class_names) > MOST_CLASSES:
            raise UserError(
                f"{len(self.class_names):,} classes are more than the {MOST_CLASSES:,} that can be "
                "shown one by one"
            )
        return self.class_names

    @cached_property
    def seed_numbers(self) -> list[int]:
        """The seeds that have a finished net; if none has, those of the settings."""
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
        """Returns the mean confusion matrix of a norm's seeds, in counts: row the true class."""
        from sklearn.metrics import confusion_matrix

        nets = [self.predictions[NetId(norm, seed)] for seed in self.seeds(norm)]
        classes = range(len(self.class_names))
        matrices = [confusion_matrix(net.labels, net.predicted, labels=classes) for net in nets]
        return np.mean(matrices, axis=0)

    def class_accuracies(self, norm: str) -> np.ndarray:  # f64[seeds, classes]
        """Returns the accuracy of each class under each seed of a norm."""
        nets = [self.predictions[NetId(norm, seed)] for seed in self.seeds(norm)]
        count = len(self.class_names)
        return np.array([stats.class_accuracy(net.predicted, net.labels, count) for net in nets])

    def images(self, rows: np.ndarray) -> list[np.ndarray]:  # of u8[32, 32, 3]
        """Returns test images by their row; raises `UserError` if one was not kept."""
        places = {int(row): place for place, row in enumerate(self.examples["test_rows"])}
        if absent := {*map(int, rows)} - places.keys():
            raise UserError(
                f"{self.directory.path / 'examples.npz'} lacks {len(absent)} of the test images "
                "to show"
            )
        return [self.examples["test_images"][places[int(row)]] for row in rows]


def save_examples(run: Run, dataset: Dataset) -> None:
    """Keeps the images that figures show: test images by their row, and a sample of the training
    images drawn by the seed.
    """
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *run.mistakes.values()]))
    random, total = np.random.default_rng(run.info.config.seed), len(dataset.train_labels)
    sample = np.sort(random.choice(total, min(SAMPLE, total), replace=False))
    arrays = {
        "test_rows": rows,
        "test_images": dataset.test_images[rows],
        "train_rows": sample,
        "train_images": dataset.train_images[sample],
        "train_labels": dataset.train_labels[sample],
    }
    run.directory.write_arrays("examples.npz", **arrays)


def seeds_text(seeds: Sequence[int]) -> str:
    """Says in words which seeds these are."""
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
    compared by seed; over test images too, if the run of each has its predictions.
    """
    correct: dict[str, dict[int, np.ndarray]] = {}
    for run in runs:
        for norm in run.summaries:  # of a run before it
            correct.pop(norm, None)
        with contextlib.suppress(UserError, OSError):  # tables of predictions say what is wrong
            correct |= run.correct
    last = {
        norm: {seed: net.last for seed, net in nets.items()}
        for run in runs
        for norm, nets in run.summaries.items()
    }
    return stats.differences(last, runs[0].info.dataset.test_count, correct)
