"""jaxnorm: batch, group and layer normalization compared in a small CNN, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxnorm import norms as norms
    from jaxnorm.api import Run as Run
    from jaxnorm.api import train as train
    from jaxnorm.config import Config as Config
    from jaxnorm.config import UserError as UserError
    from jaxnorm.config import study as study
    from jaxnorm.config import tuned as tuned
    from jaxnorm.data.datasets import Dataset as Dataset
    from jaxnorm.data.datasets import load as load
    from jaxnorm.model.cnn import CNN as CNN
    from jaxnorm.training.fit import fit as fit

_HOMES = {
    "CNN": "model.cnn",
    "Config": "config",
    "Dataset": "data.datasets",
    "Run": "api",
    "UserError": "config",
    "fit": "training.fit",
    "load": "data.datasets",
    "norms": "",
    "study": "config",
    "train": "api",
    "tuned": "config",
}
__all__ = [
    "CNN",
    "Config",
    "Dataset",
    "Run",
    "UserError",
    "fit",
    "load",
    "norms",
    "study",
    "train",
    "tuned",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `--help` answers before JAX is
    loaded.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxnorm' has no attribute {name!r}")
    import importlib
    import os
    import sys

    if _HOMES[name] == "api" and "jax" not in sys.modules:  # as `run.start` does, and why
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not _HOMES[name]:
        return importlib.import_module(f"jaxnorm.{name}")
    return getattr(importlib.import_module(f"jaxnorm.{_HOMES[name]}"), name)
