"""What a run's records hold, as typed values."""

import dataclasses
import json
import math
import zlib
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from jaxnorm.config import Config, Count, Fraction, NetId, Positive, UserError, typed

Number = Annotated[float, Field(ge=0)]
Deviation = Annotated[float, Field(gt=0)]


@typed
class Epoch:
    """A line of `metrics.jsonl`. Accuracies are fractions; epochs count from 1; the first epoch's
    time holds compilation.

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

    def to_line(self) -> str:
        """A line of JSON that ends with a checksum of the rest; `from_line` reads it back."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return json.dumps(values | {"crc32": _crc32(values)}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Epoch":
        """Reads a line; raises `UserError` where anything in it is not as it was written."""
        try:
            values = json.loads(line)
            crc32 = values.pop("crc32")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise UserError("it is not an epoch's record") from None
        if crc32 != _crc32(values):
            raise UserError("its checksum does not fit")
        return cls(**values)


def _crc32(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def belongs(logits: np.ndarray, labels: np.ndarray, epoch: Epoch) -> bool:
    """Returns whether test logits f32[N, classes] have the test accuracy and, within rounding, the
    mean cross-entropy of an epoch's record.
    """
    exact = logits.astype(np.float64)
    of_label = exact[np.arange(len(labels)), labels]
    loss = float((np.logaddexp.reduce(exact, axis=1) - of_label).mean())
    close = math.isclose(loss, epoch.test_loss, rel_tol=1e-4, abs_tol=1e-6)
    return close and bool((logits.argmax(1) == labels).mean() == epoch.test_accuracy)


@typed
class Layer:
    """A layer of a net: its output (height, width, channels), the side of the input square that one
    output pixel sees, and the number of parameters of its kernel and of its norm.
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
    class_names: Annotated[list[str], Field(min_length=1)]
    mean: tuple[float, float, float]
    deviation: tuple[Deviation, Deviation, Deviation]
    train_count: Positive
    test_count: Positive


@typed
class Environment:
    """When, by what command, on what code and on what devices nets were trained; `self_check` says
    whether the arithmetic was checked before (see `training.selfcheck`).
    """

    started: str
    command: str
    device: str
    mesh: str
    versions: dict[str, str]
    git_revision: str | None
    self_check: str

    @property
    def code(self) -> dict[str, str]:
        """The code that ran: the versions, with our own given by its git revision if it has one."""
        return {**self.versions, **({"jaxnorm": self.git_revision} if self.git_revision else {})}


@typed
class RunInfo:
    """`run.json`: the settings, and all that is known of the data and the machine.

    `parameters` and `layers` are of each norm's net; `repeatable` says what the same command gives again;
    `deterministic` whether the accelerator was asked for operations that repeat; `resumed` has an
    entry for each time that the run was resumed. Of norms of the user's own `norm_sources` and
    `norm_programs` have a SHA-256 each (see `model.fingerprint`), in runs since they are recorded.
    """

    config: Config
    parameters: dict[str, int]
    dataset: DatasetInfo
    environment: Environment
    repeatable: str = "not known"
    deterministic: bool = False
    resumed: list[Environment] = Field(default_factory=list)
    norm_sources: dict[str, str] = Field(default_factory=dict)
    norm_programs: dict[str, str] = Field(default_factory=dict)
    layers: dict[str, list[Layer]] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if not set(self.config.norms) <= self.parameters.keys():
            raise UserError("parameters are missing")
