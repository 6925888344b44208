"""The settings that decide a result, and nothing else: where data lies and where results go is not
among them.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

Norm = Literal["batch", "group", "layer", "instance", "rms", "none"]
Arch = Literal["original", "matched"]
Precision = Literal["float32", "tf32", "bfloat16"]
ALL: tuple[Norm, ...] = ("batch", "group", "layer")
"""The study's three norms, in its order: what `--norm all` trains."""
LARGEST, MOST_SEEDS = 1_000_000, 10_000
"""The most epochs and seeds of a run: a slip of the keyboard is not planned for years."""
ADDED = {"seeds": 1, "validation": 0, "precision": "float32"}
"""Settings younger than the first run directories, and what those were trained with."""


class UserError(ValueError):
    """A mistake that the user can mend.

    Its text is one line: what is wrong, and what to do about it.
    """


class Lost(RuntimeError):
    """Another process of this one's job has ended, or cannot be reached."""


@dataclass(frozen=True)
class Config:
    """All that decides a result. The defaults are the study's own settings.

    Raises `UserError` for a value that cannot be trained with.

    Parameters
    ----------
    norm
        The normalization; "all" trains batch, group and layer, one after the other. "instance",
        "rms" and "none" need --arch matched.
    arch
        "original": the study's own three nets. "matched": one net in which only the norm differs.
    dataset
        "cifar10", "digits" (ships with scikit-learn, needs no download), or a prepared TFDS dataset
        of 32x32x3 images.
    epochs
        Passes over the training set.
    batch_size
        Images in a batch. Default: 128, and 32 for digits.
    learning_rate
        Of SGD, constant.
    momentum
        Of SGD.
    dropout
        Probability with which an activation is dropped.
    groups
        Groups of channels in group norm.
    seed
        Decides the initial kernels, the order of the images and the dropout masks.
    seeds
        Nets to train under each norm, with the seeds SEED, SEED + 1, and so on: the same ones under
        every norm, so that they make pairs.
    validation
        Training images to hold out, the same share of each class, drawn by the seed. The net is
        evaluated on them after every epoch and never trained on them.
    precision
        What convolutions compute in: "float32"; "tf32", whose factors keep 10 bits of their
        fraction, on an NVIDIA GPU; or "bfloat16", in which activations are kept too. Parameters,
        norms and losses are float32 in any case.
    allow_large
        Allow a net of more than 50,000 parameters.
    """

    norm: Literal["batch", "group", "layer", "instance", "rms", "none", "all"] = "all"
    arch: Arch = "original"
    dataset: str = "cifar10"
    epochs: int = 20
    batch_size: int | None = None
    learning_rate: float = 0.01
    momentum: float = 0.9
    dropout: float = 0.1
    groups: int = 4
    seed: int = 1
    seeds: int = 1
    validation: int = 0
    precision: Precision = "float32"
    allow_large: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", 32 if self.dataset == "digits" else 128)
        for field in dataclasses.fields(self):
            self._check_type(field.name, get_type_hints(type(self))[field.name])
        self._require(1 <= self.epochs <= LARGEST, "epochs", f"1 to {LARGEST:,}")
        self._require(self.batch >= 1, "batch_size", "1 or more")
        self._require(0 < self.learning_rate < 3e38, "learning_rate", "above 0 and below 3e38")
        self._require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        self._require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1")
        self._require(self.groups >= 1, "groups", "1 or more")
        self._require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32")
        seeds = min(MOST_SEEDS, 2**32 - self.seed)
        self._require(1 <= self.seeds <= seeds, "seeds", f"1 to {seeds:,}")
        self._require(self.validation >= 0, "validation", "0 or more")
        self._require(self.dataset.strip() == self.dataset != "", "dataset", "a dataset's name")
        if self.arch == "original" and self.norm not in (*ALL, "all"):
            raise UserError(
                f"--norm {self.norm} has no net in the study: add --arch matched, or choose "
                "batch, group or layer"
            )

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms to train, in order."""
        return ALL if self.norm == "all" else (self.norm,)

    @property
    def seed_numbers(self) -> range:
        """The seeds to train under each norm, in order."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def nets(self) -> list[tuple[Norm, int]]:
        """The norm and seed of every net to train, all norms of a seed before the next seed."""
        return [(norm, seed) for seed in self.seed_numbers for norm in self.norms]

    @property
    def batch(self) -> int:
        """Images in a batch, the default filled in."""
        assert self.batch_size is not None
        return self.batch_size

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Config":
        """Reads what `to_json` wrote.

        A missing, unknown or wrong field raises `UserError` and is named. A field of `ADDED` may be
        missing: runs are older than it.
        """
        if not isinstance(values, dict):
            raise UserError("the settings are not a JSON object")
        values = {**ADDED, **values}
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := names ^ values.keys():
            raise UserError(
                f"the settings have missing or unknown fields: {', '.join(sorted(map(str, wrong)))}"
            )
        return cls(**values)

    def _check_type(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        if choices := [choice for choice in get_args(kind) if isinstance(choice, str)]:
            self._require(value in choices, name, "one of " + ", ".join(choices))
        elif kind is float:
            self._require(type(value) in (int, float), name, "a number")
            self._require(abs(value) < 1e300, name, "a finite number")
            object.__setattr__(self, name, float(value))
        elif kind in (int, int | None):
            self._require(
                isinstance(value, int) and not isinstance(value, bool), name, "a whole number"
            )
        else:
            self._require(isinstance(value, kind), name, f"a {kind.__name__}")

    def _require(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(self, name)!r}: it must be {wanted}"
            )


SWEPT = ("batch_size", "learning_rate")
"""The settings of which a sweep takes several values, beside norms and seeds."""


def product(base: Mapping[str, Any], swept: Mapping[str, Sequence[Any]]) -> list[Config]:
    """A configuration for each combination of the swept values, over the same other settings.

    Raises `UserError` for a value that is there twice, and as `Config` does.
    """
    for name, values in swept.items():
        if len(set(values)) < len(values):
            raise UserError(f"--{name.replace('_', '-')} has a value twice")
    combinations = itertools.product(*swept.values())
    return [Config(**base, **dict(zip(swept, each, strict=True))) for each in combinations]
