"""The settings that decide a result, and their checks. Where data lies and where results go is not
among them.

Errors name a setting as a `Setting`, which reads `name=value`; `cli.py` makes it a flag.
"""

import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, dataclass_transform

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

Precision = Literal["float32", "tf32", "bfloat16"]
Schedule = Literal["constant", "one-cycle"]
Optimizer = Literal["sgd", "adamw", "muon"]
Augment = Literal["none", "crop-flip"]
Recipe = Literal["study", "tuned"]
ALL = ("batch", "group", "layer")
"""The study's three norms, in its order: what norm=all trains."""
TUNED_RATES = {"batch": 0.123, "group": 0.134, "layer": 0.134, "pixel": 0.134, "instance": 0.309}
TUNED_RATES |= {"rms": 0.123, "none": 0.365, "ghost": 0.365, "renorm": 0.309, "frn": 0.309}
TUNED_RATES |= {"evonorm-s0": 0.123, "dyt": 0.134, "derf": 0.123}
"""The learning rates that a fair tuning of the tuned recipe found (notebooks/pages/tuned.md)."""
OTHER_RATE = 0.1
"""The learning rate of the tuned recipe for a norm that was not tuned: one of the user's own."""
USUAL_RATES = {"adamw": 1e-3, "muon": 0.07}
"""The learning rates that the recipes take for optimizers other than SGD; they were not tuned."""
OF_NORMS = ("groups", "ghost_size", "alpha", "norm_momentum")
"""The settings of norms."""
SWEPT = ("batch_size", "learning_rate", "weight_decay", *OF_NORMS)
"""The settings that a sweep takes several values of, besides norms and seeds."""
Rate = Annotated[float, Field(gt=0, lt=3e38)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
T = TypeVar("T")


class Norm(NamedTuple):
    """A row of the table of norms: its line in the help, and the path of its class, a Flax module
    from f32[N, H, W, C] to the same shape.

    A norm that `activates` is followed by no ReLU. `settings` says which fields of the class are
    which fields of the net (`model.cnn.CNN`), such as a setting of a run. If an image has an effect
    on others, the class keeps state, and takes `axis_name`, along which devices share a batch.
    """

    line: str
    path: str
    activates: bool = False
    settings: Mapping[str, str] = {}


_RUNNING = {"momentum": "norm_momentum", "axis_name": "axis_name"}
NORMS: dict[str, Norm] = {
    "batch": Norm(
        "batch norm, by each channel of the batch", "jaxnorm.norms:BatchNorm", settings=_RUNNING
    ),
    "group": Norm(
        "group norm, by groups of channels of each image",
        "jaxnorm.norms:GroupNorm",
        settings={"num_groups": "groups"},
    ),
    "layer": Norm("layer norm, by all of each image", "jaxnorm.norms:LayerNorm"),
    "pixel": Norm("layer norm of each pixel, by its channels", "jaxnorm.norms:PixelNorm"),
    "instance": Norm("instance norm, by each channel of each image", "jaxnorm.norms:InstanceNorm"),
    "rms": Norm("RMS norm, by all of each image, without a mean", "jaxnorm.norms:RMSNorm"),
    "none": Norm("no norm", "jaxnorm.norms:Identity"),
    "ghost": Norm(
        "batch norm of each ghost, a part of the batch",
        "jaxnorm.norms:GhostBatchNorm",
        settings={"size": "ghost_size", **_RUNNING},
    ),
    "renorm": Norm(
        "batch renormalization, batch norm corrected by its running averages",
        "jaxnorm.norms:BatchRenorm",
        settings={"relaxed": "relaxed", **_RUNNING},
    ),
    "frn": Norm(
        "filter response norm, by each channel of each image, and its threshold for ReLU",
        "jaxnorm.norms:FilterResponseNorm",
        activates=True,
    ),
    "evonorm-s0": Norm(
        "EvoNorm-S0, by groups of channels of each image, and its activation for ReLU",
        "jaxnorm.norms:EvoNormS0",
        activates=True,
        settings={"groups": "groups"},
    ),
    "dyt": Norm(
        "dynamic tanh, without statistics",
        "jaxnorm.norms:DynamicTanh",
        settings={"alpha": "alpha"},
    ),
    "derf": Norm(
        "dynamic erf, without statistics",
        "jaxnorm.norms:DynamicErf",
        settings={"alpha": "alpha"},
    ),
}
"""The table of norms, by the name that the setting `norm` takes."""


class NetId(NamedTuple):
    """Names a net of a run: what is trained under one norm and seed."""

    norm: str
    seed: int


class SweptNet(NamedTuple):
    """Names a net of a sweep: the number of its run, its norm and its seed."""

    run: int
    norm: str
    seed: int


class Setting(NamedTuple):
    """Names a setting in a text, with its value if that is said: `batch_size=71`, `out=`."""

    name: str
    value: Any = None

    def __str__(self) -> str:
        return f"{self.name}={'' if self.value is None else self.value}"


class Text(str):
    """Text made of strings and of `Setting`s, so that a command can name its flags instead."""

    parts: tuple[str | Setting, ...]

    def __new__(cls, *parts: str | Setting) -> "Text":
        """Joins the parts."""
        text = super().__new__(cls, "".join(map(str, parts)))
        text.parts = parts
        return text


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line: what is wrong and what to do."""

    def __init__(self, *parts: str | Setting) -> None:
        super().__init__(Text(*parts))
        self.parts = parts


class OtherFields(UserError):
    """A record lacks a field, or has one more, as a record of another version does."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def typed(kind: type[T]) -> type[T]:
    """A frozen dataclass that Pydantic checks by its type hints; raises `UserError`."""
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    checked_kind: Any = dataclass(frozen=True, config=config)(kind)
    checked_kind.__init__ = _raising_user_errors(checked_kind.__init__)
    return checked_kind


def from_json(kind: type[T], text: str | bytes) -> T:
    """A `typed` dataclass from JSON; raises `UserError` that names the field that is wrong."""
    return _raising_user_errors(pydantic.TypeAdapter(kind).validate_json)(text)


def _raising_user_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns an error of Pydantic's into a `UserError` of one line."""

    @functools.wraps(function)
    def checked(*arguments: Any, **values: Any) -> Any:
        try:
            return function(*arguments, **values)
        except pydantic.ValidationError as error:
            # Pydantic lists the errors of every part of a union: the deepest is of the part meant.
            first = max(error.errors(), key=lambda e: len(e["loc"]))
        kinds = ("float", "constrained", "dict[")  # of a union, which are no names of fields
        name = ".".join(str(part) for part in first["loc"] if not str(part).startswith(kinds))
        message = first["msg"]
        match first["type"]:
            case "missing":
                raise OtherFields(f"field {name} is missing")
            case "unexpected_keyword_argument":
                raise OtherFields(f"unknown field: {name}")
            case "literal_error" if name == "format":
                raise OtherFields(f"format {first['input']}"[:40])
            case "value_error":
                wrong = first.get("ctx", {}).get("error")
                raise wrong if isinstance(wrong, UserError) else UserError(str(wrong or message))
        reason = f"is wrong: {message[0].lower()}{message[1:]}"
        if not name:
            raise UserError(reason)
        raise UserError(Setting(name, str(first["input"])[:40]), f" {reason}")

    return checked


@typed
class Config:
    """All that decides a result, as plain values. The defaults are the study's own settings;
    `study` and `tuned` return the settings of a recipe.

    Raises `UserError` for a value that cannot be trained with.

    Parameters
    ----------
    norm
        The norm, or your own as package.module:Class. Several with commas between them are
        compared. "all" is batch, group and layer, the only ones that the original nets have;
        "every" is all of the table of norms:
    arch
        The net: "original" is the study's own three nets; "matched" is one net in which only the
        norm differs; "residual" is a net with residual blocks in which only the norm differs, and
        "attention" that net with channel attention, learned slopes and learned pooling.
    dataset
        The data: "cifar10"; "digits", which ships with scikit-learn and needs no download; the name
        of a prepared TFDS dataset of 32x32x3 images; or the path of your own .npz file.
    test_split
        The split of a prepared TFDS dataset on which nets are tested, for a dataset that has no
        split called test. Other datasets have only one test set.
    epochs
        The number of passes over the training set.
    batch_size
        The number of images in a batch. The recipes take 128, and 32 for digits.
    optimizer
        The optimizer: "sgd", with momentum; "adamw"; or "muon", which moves each kernel along its
        orthogonalized momentum, and scales and biases by SGD.
    learning_rate
        The learning rate, or the highest of a schedule; one for all norms, or one for each. The
        tuned recipe has one for each. Under muon it is the length of a kernel's step as a share of
        the kernel's own length, and twice as much is the rate of SGD for scales and biases.
    linear_scaling
        Multiply the learning rate by the batch size over the one that it is for, which is 128, and
        32 for digits (Goyal et al., "Accurate, Large Minibatch SGD", 2017).
    recipe
        The recipe: "study", the study's own settings; or "tuned", which treats every norm well. On
        the command line it gives every setting that no flag names.
    schedule
        The course of the learning rate: "constant"; or "one-cycle", up in a straight line and then
        down to zero, which the tuned recipe and the digits take.
    warmup
        The share of the training in which the one-cycle learning rate goes up.
    momentum
        The momentum of SGD: the share of the last step that is made again. Moments of other
        optimizers are fixed: AdamW's at 0.9 and 0.999, Muon's of kernels at 0.6.
    nesterov
        Use Nesterov's momentum in SGD. Muon always does.
    weight_decay
        Under sgd an L2 penalty: adds weight_decay * kernel to the gradient of a kernel. Under adamw
        and muon decoupled: takes learning_rate * weight_decay * kernel off a kernel at each step.
        Norms are not decayed.
    dropout
        The probability with which an activation is dropped.
    augment
        The augmentation of training images: "none"; or "crop-flip", which moves each image by up to
        2 pixels, reflected at the edges, and mirrors half of them.
    label_smoothing
        The share of each label that is spread over all classes in the training loss.
    weight_standardization
        Shift and scale each kernel to mean 0 and variance 1 / fan-in before it is applied.
    groups
        The number of groups of channels in group norm and EvoNorm-S0.
    ghost_size
        The number of images in a ghost of ghost batch norm.
    alpha
        The factor alpha of dynamic tanh and dynamic erf at first; it is learned.
    norm_momentum
        The share of their old value that running averages of batch, ghost and renorm keep at a
        step; PyTorch calls 1 minus it momentum.
    seed
        The first seed. A seed decides the initial kernels, the order of the images and the dropout
        masks.
    seeds
        The number of nets to train under each norm, with the seeds SEED, SEED + 1, and so on. They
        are the same under every norm, so that nets make pairs.
    validation
        The number of training images to hold out, the same share of each class, drawn by the seed.
        The net is evaluated on them after every epoch and never trained on them.
    precision
        The arithmetic of convolutions: "float32"; "tf32", whose factors keep 10 bits of their
        fraction, on an NVIDIA GPU; or "bfloat16", in which activations are kept too. Parameters,
        norms and losses are float32 in any case.
    allow_large
        Allow a net of more than 50,000 parameters.
    usual_batch
        The batch size that the learning rate is for, by which linear scaling divides.
    untuned
        The norms whose learning rate was not tuned, though the recipe has tuned rates for others.
    """

    norm: str = "all"
    arch: str = "original"
    dataset: str = "cifar10"
    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    batch_size: Positive = 128
    learning_rate: Rate | dict[str, Rate] = 0.01
    linear_scaling: bool = False
    recipe: Recipe = "study"
    schedule: Schedule = "constant"
    optimizer: Optimizer = "sgd"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.25
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, le=0.999)] = 0.1
    augment: Augment = "none"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_standardization: bool = False
    groups: Positive = 4
    seed: Count = 1
    seeds: Annotated[int, Field(ge=1, le=10_000)] = 1
    validation: Count = 0
    precision: Precision = "float32"
    allow_large: bool = False
    test_split: str = "test"
    usual_batch: Positive = 128
    untuned: tuple[str, ...] = ()
    ghost_size: Positive = 16
    alpha: Annotated[float, Field(gt=0, lt=1e3)] = 0.5
    norm_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", valid_text(self.dataset))
        norm = r"[\w.]+(-\w+)*(:\w+)?"
        names = {"norm": rf"{norm}(,{norm})*", "arch": r"[\w-]+", "dataset": r"\S(.*\S)?"}
        names["test_split"] = r"\w[\w.-]*"
        for name, pattern in names.items():
            if not re.fullmatch(pattern, value := getattr(self, name), re.DOTALL):
                several = ", or several with commas alone between them" if name == "norm" else ""
                raise UserError(Setting(name, value[:40]), f" is wrong: it must be a name{several}")
        if "every" in self.norm.split(","):  # spelled out: the table may have more norms one day
            object.__setattr__(self, "norm", ",".join(self.norms))
        if len(set(self.norms)) < len(self.norms):
            raise UserError(Setting("norm", self.norm), " is wrong: a norm is there twice")
        if self.recipe == "tuned" and all(
            getattr(self, name) == getattr(type(self), name) for name in OF_RECIPE
        ):
            raise UserError(
                Setting("recipe", "tuned"),
                ", and every setting is the study's: call tuned() instead",
            )
        rates = self.learning_rate
        if isinstance(rates, dict) and (without := [n for n in self.norms if n not in rates]):
            raise UserError(
                Setting("learning_rate"), f" has no rate for {' and '.join(without)} norm: give one"
            )
        if self.seed + self.seeds > 2**31:
            raise UserError(Setting("seed", self.seed), " is wrong: every seed must be below 2**31")

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms to train, in order."""
        return norms_of(self.norm)

    @property
    def seed_numbers(self) -> range:
        """The seeds to train under each norm, in order."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def nets(self) -> list[NetId]:
        """Every net to train, all norms of a seed before the next seed."""
        return [NetId(norm, seed) for seed in self.seed_numbers for norm in self.norms]

    def unscaled_rate(self, norm: str) -> float:
        """Returns the learning rate of a norm before linear scaling, as a flag gives it."""
        rate = self.learning_rate
        return rate[norm] if isinstance(rate, dict) else rate

    def rate(self, norm: str) -> float:
        """Returns the learning rate that a norm trains with, scaled if that is asked for."""
        scale = self.batch_size / self.usual_batch if self.linear_scaling else 1
        return self.unscaled_rate(norm) * scale

    @property
    def rate_text(self) -> str:
        """The learning rate of all norms before scaling, as text."""
        return "recipe" if isinstance(self.learning_rate, dict) else f"{self.learning_rate:g}"

    def steps(self, train_count: int) -> int:
        """Returns the number of batches in an epoch, a ragged last one included."""
        return math.ceil((train_count - self.validation) / self.batch_size)


def norms_of(norm: str) -> tuple[str, ...]:
    """Returns the norms that the setting `norm` names, in order."""
    several = {"all": ALL, "every": tuple(NORMS)}
    named = [several.get(name, (name,)) for name in norm.split(",")]
    return tuple(itertools.chain(*named))


def norms_help() -> str:
    """Returns the table of norms as text, a line for each."""
    return "\n".join(f"{name}: {norm.line}." for name, norm in NORMS.items())


def named(norm: str) -> str:
    """Returns what a sentence calls nets of a norm."""
    return "no norm" if norm == "none" else f"{norm} norm"


def activating(norms: Iterable[str]) -> list[str]:
    """Returns those of the norms that activate: no ReLU follows them."""
    return [norm for norm in norms if norm in NORMS and NORMS[norm].activates]


def study(**changes: Any) -> Config:
    """Returns the study's own settings with these changes: the original nets, SGD at a constant
    rate of 0.01, dropout 0.1, no augmentation.

    For digits the batch is 32 and the rate 0.05 on a one-cycle schedule, because at a constant rate
    the accuracy of a late epoch can jump by points. Other optimizers have their `USUAL_RATES`.
    """
    digits = {**_DIGITS, "schedule": "one-cycle"} if changes.get("dataset") == "digits" else {}
    return Config(**{**digits, **_usual_rate(changes), **changes})


def tuned(**changes: Any) -> Config:
    """Returns settings that treat every norm well, with these changes: a residual net with
    standardized kernels, a one-cycle schedule, crops and flips, and the learning rate that a fair
    tuning found for each norm (`notebooks/pages/tuned.md`). Norms that were not tuned train at
    `OTHER_RATE`, and all norms under another optimizer at its one of `USUAL_RATES`; `untuned` names
    them, and all norms of another net.
    """
    norm = changes.get("norm", "all")
    norms = norms_of(norm) if isinstance(norm, str) else ()  # which `Config` refuses
    values: dict[str, Any] = {
        "recipe": "tuned",
        "arch": "residual",
        "learning_rate": {**dict.fromkeys(norms, OTHER_RATE), **TUNED_RATES},
        "untuned": tuple(norm for norm in norms if norm not in TUNED_RATES),
        "schedule": "one-cycle",
        "nesterov": True,
        "weight_decay": 5e-4,
        "dropout": 0.0,
        "augment": "crop-flip",
        "weight_standardization": True,
    }
    if changes.get("dataset") == "digits":
        values |= _DIGITS
    values |= (usual := _usual_rate(changes))
    if changes.get("arch", values["arch"]) != values["arch"]:
        values["untuned"] = norms
    if not isinstance(values["learning_rate"], dict) or "learning_rate" in changes:
        values["untuned"] = ()  # one rate for all, or the user's own
    if usual and "learning_rate" not in changes:
        values["untuned"] = norms
    return Config(**{**values, **changes})


def _usual_rate(changes: Mapping[str, Any]) -> dict[str, float]:
    """Returns the learning rate of an optimizer that no recipe takes; empty for SGD."""
    name = changes.get("optimizer")
    rate = USUAL_RATES.get(name) if isinstance(name, str) else None  # which `Config` refuses
    return {"learning_rate": rate} if rate else {}


_DIGITS = {"batch_size": 32, "usual_batch": 32, "learning_rate": 0.05}
RECIPES: dict[str, Callable[..., Config]] = {"study": study, "tuned": tuned}
"""What `--recipe` chooses from."""
OF_RECIPE = ("arch", "batch_size", "learning_rate", "schedule", "optimizer", "nesterov")
OF_RECIPE += ("weight_decay", "dropout", "augment", "weight_standardization")
"""The settings whose default depends on the recipe."""


def valid_text(text: str) -> str:
    r"""Returns text that UTF-8 can encode: a byte of a file's name that is not UTF-8, which Python
    holds as a lone surrogate, is spelled out as in "caf\udce9.npz".
    """
    return text.encode(errors="backslashreplace").decode()


def names_a_file(dataset: str) -> bool:
    """Returns whether the setting `dataset` is the path of an .npz file, and not a name."""
    return dataset.lower().endswith(".npz")


def swept_nets(configs: Sequence[Config]) -> list[SweptNet]:
    """Returns every net of every run, in order."""
    return [SweptNet(run, *net) for run, config in enumerate(configs) for net in config.nets]


def differing(configs: Sequence[Config]) -> list[str]:
    """Returns the settings of `SWEPT` that differ between runs."""
    return [name for name in SWEPT if len({str(getattr(c, name)) for c in configs}) > 1]


def value_text(value: str | float) -> str:
    """Returns the value of a setting as text."""
    return value if isinstance(value, str) else f"{value:g}"


def local_path(path: Path | str) -> Path:
    """Returns a path on this machine, its `~` or `~user` replaced by the home folder.

    Raises `UserError` for an address, such as gs://bucket/run, and if there is no such home.
    """
    if str(path).startswith("~") and os.environ.get("HOME") == "":
        raise UserError(f"{path}: HOME is empty, so there is no home folder: give the whole path")
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        address = re.sub(":/+", "://", str(path), count=1)
        raise UserError(f"{address} is an address: name a file or folder of this machine")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder, so give the whole path") from None


def counted(number: int, noun: str) -> str:
    """Returns a number of things as text."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def product(
    recipe: Callable[..., Config], base: Mapping[str, Any], swept: Mapping[str, Sequence[Any]]
) -> list[Config]:
    """Returns a configuration for each combination of the swept values, over the same other
    settings.

    Raises `UserError` for a value that is there twice, and as `Config` does.
    """
    for name, values in swept.items():
        if len(set(values)) < len(values):
            raise UserError(Setting(name, values[0]), " and more: a value is there twice")
    combinations = itertools.product(*swept.values())
    return [recipe(**base, **dict(zip(swept, values, strict=True))) for values in combinations]
