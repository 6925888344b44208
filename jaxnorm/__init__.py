"""jaxnorm: batch, group and layer normalization compared in a small CNN, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxnorm.config import Config as Config
    from jaxnorm.config import UserError as UserError
    from jaxnorm.config import study as study
    from jaxnorm.config import tuned as tuned
    from jaxnorm.data.datasets import Dataset as Dataset
    from jaxnorm.data.datasets import load as load
    from jaxnorm.model.cnn import CNN as CNN
    from jaxnorm.runs.runner import load_model as load_model
    from jaxnorm.training.fit import fit as fit

_HOMES = {
    "CNN": "model.cnn",
    "Config": "config",
    "Dataset": "data.datasets",
    "UserError": "config",
    "fit": "training.fit",
    "load": "data.datasets",
    "load_model": "runs.runner",
    "study": "config",
    "tuned": "config",
}
__all__ = ["CNN", "Config", "Dataset", "UserError", "fit", "load", "load_model", "study", "tuned"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `--help` answers before JAX is
    loaded.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxnorm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"jaxnorm.{_HOMES[name]}"), name)
