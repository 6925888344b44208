"""The arithmetic that results are made in, whatever JAX's environment variables say."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard() -> Iterator[None]:
    """Has JAX compute with types of 32 bits, random bits that do not depend on the devices, and
    no precision of products but the one that a net names, so that a seed gives the same numbers
    under `JAX_ENABLE_X64`, `JAX_THREEFRY_PARTITIONABLE` and `JAX_DEFAULT_MATMUL_PRECISION` too.

    Use it as a decorator, `@standard()`, of a function that a user calls.
    """
    # These are JAX's own defaults: elsewhere nothing changes.
    with (
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        jax.default_matmul_precision(None),
    ):
        yield
