"""What a run's records hold, as typed values."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from jaxnorm.config import (
    Config,
    Count,
    Fraction,
    NetId,
    Positive,
    UserError,
    from_json,
    named,
    typed,
)

Number = Annotated[float, Field(ge=0)]
Deviation = Annotated[float, Field(gt=0)]


@typed
class Epoch:
    """An epoch of a net: a line of its `metrics.jsonl`. Accuracies are fractions; epochs count from
    1; the first epoch's time holds compilation.

    `train_loss` and `train_accuracy` are over the epoch's batches as they were trained on, with
    dropout, while the net changes. Nets that train in one program each have an equal share of its
    time. Raises `UserError` for numbers out of range.
    """

    norm: str
    seed: Count
    epoch: Positive
    train_loss: Number
    train_accuracy: Fraction
    test_loss: Number
    test_accuracy: Fraction
    train_seconds: Number
    test_seconds: Number
    validation_loss: Number | None = None
    validation_accuracy: Fraction | None = None

    def __post_init__(self) -> None:
        if (self.validation_loss is None) != (self.validation_accuracy is None):
            raise UserError("half of a validation is missing")

    @property
    def net(self) -> NetId:
        """The net that it is of."""
        return NetId(self.norm, self.seed)

    @property
    def values(self) -> dict[str, Any]:
        """Its fields that have a value, by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def to_lines(epochs: Sequence[Epoch]) -> str:
    """Returns a line of JSON for each epoch; `from_lines` reads them back."""
    return "".join(json.dumps(epoch.values) + "\n" for epoch in epochs)


def from_lines(text: str, net: NetId) -> list[Epoch]:
    """Returns the epochs of a net from their lines; raises `UserError` unless they are the epochs
    1, 2, 3 and so on of this net.
    """
    epochs = [from_json(Epoch, line) for line in text.splitlines()]
    if [(e.net, e.epoch) for e in epochs] != [(net, n) for n in range(1, len(epochs) + 1)]:
        raise UserError(f"its lines are not those of {named(net.norm)}, seed {net.seed}")
    return epochs


@typed
class Lost:
    """`lost.json`: the net diverged in this epoch, so that it is left out."""

    epoch: Positive
    reason: str


class Predictions(NamedTuple):
    """What a net says of the N test images after its last epoch.

    `logits` f32[N, classes] are kept of every net that has just trained; of one that was reduced to
    be published (see `notebooks/tools/reduce.py`) they are None, and the numbers made from them
    are kept: `calibration`, by the names of the fields of `analysis.stats.Calibration`.
    """

    labels: np.ndarray  # i32[N]
    predicted: np.ndarray  # i64[N], or u8[N] of a reduced net
    log_probabilities: np.ndarray  # f32 or f16[N, 2], of the label and of the predicted class
    logits: np.ndarray | None = None
    calibration: np.ndarray | None = None  # f64[3]

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray) -> "Predictions":
        """Returns the predictions that are in logits f32[N, classes]."""
        exact, rows = logits.astype(np.float64), np.arange(len(labels))
        logs = exact - np.logaddexp.reduce(exact, axis=1, keepdims=True)
        predicted = logits.argmax(1)
        kept = np.stack([logs[rows, labels], logs[rows, predicted]], axis=1)
        return cls(labels, predicted, kept.astype(np.float32), logits)

    def belong_to(self, epoch: Epoch) -> bool:
        """Returns whether they have the test accuracy and, within rounding, the mean cross-entropy
        of an epoch's record.
        """
        loss = -float(self.log_probabilities[:, 0].astype(np.float64).mean())
        rounding = 1e-3 if self.log_probabilities.dtype == np.float16 else 1e-4
        close = math.isclose(loss, epoch.test_loss, rel_tol=rounding, abs_tol=1e-6)
        return close and bool((self.predicted == self.labels).mean() == epoch.test_accuracy)


@typed
class Layer:
    """A layer of a net: its output (height, width, channels), the side of the input square that one
    output pixel sees, and the numbers of its parameters: `norm` of its norm, `kernel` all others.
    """

    name: str
    shape: tuple[Count, Count, Count]
    receptive_field: Count
    kernel: Count
    norm: Count


@typed
class DatasetInfo:
    """The data of a run; `verified` as in `data.datasets.Dataset`."""

    name: str
    caption: str
    fingerprint: str
    source: str
    verified: bool | None
    class_names: Annotated[list[str], Field(min_length=1, max_length=1_000)]
    mean: tuple[float, float, float]
    deviation: tuple[Deviation, Deviation, Deviation]
    train_count: Positive
    test_count: Positive


@typed
class Environment:
    """When, by what command, on what code and on what devices nets were trained.

    `self_check` says whether the arithmetic was checked before (see `training.selfcheck`),
    `deterministic` whether the accelerator was asked for operations that repeat, and `repeatable`
    what the same command gives again.
    """

    started: str
    command: str
    device: str
    mesh: str
    versions: dict[str, str]
    git_revision: str | None
    self_check: str
    deterministic: bool
    repeatable: str

    @property
    def code(self) -> dict[str, str]:
        """The code that ran: the versions, with our own given by its git revision if it has one."""
        return {**self.versions, **({"jaxnorm": self.git_revision} if self.git_revision else {})}


@typed
class RunInfo:
    """`run.json`: the settings, and all that is known of the data and of the machine on which the
    run began.

    `parameters` and `layers` are of each norm's net. Of norms of the user's own `norm_sources` and
    `norm_programs` have a SHA-256 each (see `model.fingerprint`).
    """

    format: Literal[3]
    config: Config
    parameters: dict[str, int]
    layers: dict[str, list[Layer]]
    dataset: DatasetInfo
    environment: Environment
    norm_sources: dict[str, str] = Field(default_factory=dict)
    norm_programs: dict[str, str] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        norms = set(self.config.norms)
        if not norms <= self.parameters.keys() or not norms <= self.layers.keys():
            raise UserError("parameters or layers are missing")
