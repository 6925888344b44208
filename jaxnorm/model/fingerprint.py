"""SHA-256 of what a norm of the user's own computes: of its source and of its traced program."""

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxnorm.model import arithmetic, layers
from jaxnorm.model.cnn import CNN
from jaxnorm.model.summary import summarize


def source(norm: str) -> str:
    """Returns the SHA-256 of the source of a norm's class and its bases, except those of Flax,
    Python and jaxnorm, whose versions a run records. What else the class uses, such as a function
    beside it, is seen in its `program`.

    Raises `UserError` if there is no such norm.
    """
    texts = []
    for kind in layers.custom_class(norm).__mro__:
        package = kind.__module__.partition(".")[0]
        if package not in ("flax", "jaxnorm") and package not in sys.stdlib_module_names:
            texts += _texts(kind)
    return _sha256(texts)


def _texts(kind: type) -> Iterator[str]:
    """Yields the source of a class, or of its methods if it is one of a notebook."""
    try:
        yield inspect.getsource(kind)
    except (OSError, TypeError):
        for value in vars(kind).values():
            if inspect.isfunction(value) and value.__module__ == kind.__module__:
                with contextlib.suppress(OSError):  # made by `dataclass`, of no file
                    yield inspect.getsource(value)


@arithmetic.standard()
def program(net: CNN) -> str:
    """Returns the SHA-256 of what JAX makes of a net's norm, initialized and applied to two images
    as in training and in evaluation. Other versions of JAX or Flax make other programs of it.
    """
    inputs = jax.ShapeDtypeStruct((2, *summarize(net)[0].shape), jnp.float32)
    texts = []
    for train in (True, False):
        norm = net.normalization(train)

        def apply(key: jax.Array, inputs: jax.Array, norm=norm, train=train) -> tuple:
            variables = norm.init(key, inputs)
            state = [name for name in variables if name != "params" and train]
            return norm.apply(variables, inputs, rngs={"dropout": key}, mutable=state)

        traced = jax.jit(apply).trace(jax.random.key(0), inputs)
        texts.append(traced.lower(lowering_platforms=("cpu",)).as_text())
    return _sha256(texts)


def _sha256(texts: list[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()
