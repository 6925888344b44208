"""The settings that decide a result, and their checks. Where data lies and where results go is not
among them.

Errors name a setting as `name=value`; `cli.py` turns that into a flag.
"""

import dataclasses
import itertools
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Precision = Literal["float32", "tf32", "bfloat16"]
ALL = ("batch", "group", "layer")
"""The study's three norms, in its order: what norm=all trains."""
MOST_EPOCHS, MOST_SEEDS = 1_000_000, 10_000
DIGITS = {"batch_size": 32, "learning_rate": 0.02}
"""What the digits are trained with where nothing else is asked for."""
SWEPT = ("batch_size", "learning_rate")
"""The settings of which a sweep takes several values, beside norms and seeds."""
Net = tuple[str, int]
"""A net of a run: its norm and seed."""
T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line: what is wrong and what to do."""


def from_json(kind: type[T], values: Any) -> T:
    """Builds a dataclass from JSON values, each checked against its type hint.

    A field with a default may be missing. Raises `UserError` that names the field for anything
    missing, unknown or of another type, and for a number that is not finite.
    """
    if not isinstance(values, dict):
        raise UserError("it is not a JSON object")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    if unknown := values.keys() - fields.keys():
        raise UserError(f"unknown field: {', '.join(sorted(map(str, unknown)))}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"field {name} is missing")
    return kind(**{name: _typed(hints[name], values[name], name) for name in values})


def _typed(hint: Any, value: Any, name: str) -> Any:
    """The value as its type hint asks for; raises `UserError`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is float and type(value) in (int, float) and abs(value) < 1e300:
        return float(value)
    if dataclasses.is_dataclass(hint):
        try:
            return from_json(cast(Any, hint), value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (each for each in arguments if each is not type(None))
        return _typed(hint, value, name)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        fixed = origin is tuple and ... not in arguments
        kinds = arguments if fixed else [arguments[0]] * len(value)
        if len(kinds) == len(value):
            return origin(_typed(k, v, name) for k, v in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], each, name) for key, each in value.items()}
    if hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = (
        getattr(hint, "__name__", str(hint)) if origin is not Literal else " or ".join(arguments)
    )
    raise UserError(f"field {name} is {str(value)[:40]!r}, which is no {wanted}")


@dataclass(frozen=True)
class Config:
    """All that decides a result. The defaults are the study's own settings.

    Raises `UserError` for a value that cannot be trained with.

    Parameters
    ----------
    norm
        batch, group, layer, instance, rms or none; or your own, as package.module:Class; all trains
        batch, group and layer. In the original nets: batch, group and layer alone.
    arch
        "original": the study's own three nets. "matched": one net in which only the norm differs.
    dataset
        "cifar10", "digits" (ships with scikit-learn, needs no download), a prepared TFDS dataset
        of 32x32x3 images, or your own .npz file of arrays.
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

    norm: str = "all"
    arch: str = "original"
    dataset: str = "cifar10"
    epochs: int = 20
    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float = 0.9
    dropout: float = 0.1
    groups: int = 4
    seed: int = 1
    seeds: int = 1
    validation: int = 0
    precision: Precision = "float32"
    allow_large: bool = False

    def __post_init__(self) -> None:
        defaults = (
            DIGITS if self.dataset == "digits" else {"batch_size": 128, "learning_rate": 0.01}
        )
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, hint in get_type_hints(type(self)).items():
            try:
                object.__setattr__(self, name, _typed(hint, getattr(self, name), name))
            except UserError:
                self._require(False, name, _described(hint))
        self._require(bool(re.fullmatch(r"[\w.]+(:\w+)?", self.norm)), "norm", "the name of a norm")
        self._require(bool(re.fullmatch(r"[\w-]+", self.arch)), "arch", "the name of a net")
        self._require(self.dataset.strip() == self.dataset != "", "dataset", "a dataset's name")
        self._require(1 <= self.epochs <= MOST_EPOCHS, "epochs", f"1 to {MOST_EPOCHS:,}")
        self._require(self.batch >= 1, "batch_size", "1 or more")
        self._require(0 < self.rate < 3e38, "learning_rate", "above 0 and below 3e38")
        self._require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        self._require(0 <= self.dropout <= 0.999, "dropout", "0 to 0.999")
        self._require(self.groups >= 1, "groups", "1 or more")
        self._require(0 <= self.seed < 2**31, "seed", "at least 0 and below 2**31")
        seeds = min(MOST_SEEDS, 2**31 - self.seed)
        self._require(1 <= self.seeds <= seeds, "seeds", f"1 to {seeds:,}")
        self._require(self.validation >= 0, "validation", "0 or more")

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms to train, in order."""
        return ALL if self.norm == "all" else (self.norm,)

    @property
    def seed_numbers(self) -> range:
        """The seeds to train under each norm, in order."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def nets(self) -> list[Net]:
        """The norm and seed of every net to train, all norms of a seed before the next seed."""
        return [(norm, seed) for seed in self.seed_numbers for norm in self.norms]

    @property
    def batch(self) -> int:
        """Images in a batch, the default filled in."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def rate(self) -> float:
        """The learning rate, the default filled in."""
        assert self.learning_rate is not None
        return self.learning_rate

    def steps(self, train_count: int) -> int:
        """Batches in an epoch, a ragged last one included, where there are so many images."""
        return math.ceil((train_count - self.validation) / self.batch)

    def _require(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            value = str(getattr(self, name))[:80]
            raise UserError(f"{name}={value} is wrong: it must be {wanted}")


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    hint = next((each for each in get_args(hint) if each is not type(None)), hint)
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    return names[hint]


def product(base: Mapping[str, Any], swept: Mapping[str, Sequence[Any]]) -> list[Config]:
    """A configuration for each combination of the swept values, over the same other settings.

    Raises `UserError` for a value that is there twice, and as `Config` does.
    """
    for name, values in swept.items():
        if len(set(values)) < len(values):
            raise UserError(f"{name}={values[0]} and more: a value is there twice")
    combinations = itertools.product(*swept.values())
    return [Config(**base, **dict(zip(swept, values, strict=True))) for values in combinations]
