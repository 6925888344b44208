"""The mesh of devices that training runs on, its axes "seed" and "batch".

Along "seed" lie different nets, which need nothing of each other; along "batch" devices share each
batch of a net and add up its gradients and batch norm's statistics. All are devices of this
process. Arrays are put on the mesh by `place` and read back by `fetch`.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.config import Setting, UserError

SEED, BATCH = "seed", "batch"
"""The axes of the mesh."""
_CHOOSING = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
"""The environment variables that choose JAX's devices."""
SHARE = 16
"""The fewest images of a batch that are worth a device."""


@dataclass(frozen=True)
class MeshShape:
    """A mesh: nets on `seed` rows of devices, each net's batches shared by the `batch` devices of
    its row. It is of one device if both are 1.
    """

    seed: int = 1
    batch: int = 1

    def __str__(self) -> str:
        return f"seed={self.seed},batch={self.batch}"

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Reads "seed=4,batch=2", in any order; an axis left out is 1. Raises `UserError`."""
        parts = [re.fullmatch(r"(seed|batch)=([1-9]\d{0,5})", word) for word in text.split(",")]
        sizes = {part[1]: int(part[2]) for part in parts if part}
        if len(sizes) < len(parts):
            raise UserError(
                Setting("mesh", text), " is wrong: it must be of the form 'seed=4,batch=2'"
            )
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return self.seed * self.batch

    @property
    def mesh(self) -> Mesh:
        """The mesh of this process's first devices; those that share a batch are neighbours."""
        devices = np.array(jax.local_devices()[: self.devices])
        return Mesh(devices.reshape(self.seed, self.batch), (SEED, BATCH))

    def check(self, batch_size: int) -> None:
        """Raises `UserError` unless there are these devices, and they can share a batch."""
        count = jax.local_device_count()
        if self.devices > count:
            raise UserError(
                Setting("mesh", self), f" takes {self.devices} devices: there are {count}"
            )
        if batch_size % self.batch:
            raise UserError(
                Setting("mesh", self),
                f" cannot share batches of {batch_size} images: choose a "
                f"batch size that {self.batch} divides",
            )


ONE = MeshShape()
"""One device of this process."""


def choose(nets: int, batch_size: int) -> MeshShape:
    """Returns the mesh for some nets that can train at the same time: rows for nets first,
    which costs no communication, and then devices to share a batch, if they divide it into enough
    images each.
    """
    count = jax.local_device_count()
    rows = max(n for n in range(1, count + 1) if count % n == 0 and n <= max(nets, 1))
    shares = max(
        n
        for n in range(1, count // rows + 1)
        if (count // rows) % n == 0
        and (n == 1 or (batch_size % n == 0 and batch_size // n >= SHARE))
    )
    return MeshShape(rows, shares)


def use_all_cores() -> None:
    """Makes every core that this process may use, as many as a container's share of them come to, a
    JAX device of its own, so that cores can share batches, or train different nets.

    Two cores that each take half of a batch are a quarter faster than two that share each operator.
    To be called before anything else of JAX: a JAX that has started keeps the devices it has, and
    so does one whose `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` say how many.
    """
    import joblib  # here: it takes a sixth of a second, and other commands do without

    count_given = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not count_given and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", joblib.cpu_count())


def check_devices() -> None:
    """Raises `UserError` if JAX cannot start the devices that the environment asks for."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or "JAX has no plugin for them"
        names = [name for name in _CHOOSING if os.environ.get(name)]
        asked = " and ".join(f"{name}={os.environ[name]!r}" for name in names)
        way_on = f"unset {' and '.join(names)}" if names else "set JAX_PLATFORMS=cpu"
        raise UserError(
            f"JAX cannot start the devices of {asked or 'this machine'} ({reason}): {way_on}, or "
            "install what they need, such as '.[cuda]'"
        ) from None


def place(shape: MeshShape, arrays: Any, by_net: bool = False) -> Any:
    """Puts arrays on the mesh: a copy on each device, or with `by_net` each net's part (the leading
    axis, a multiple of `shape.seed`) on its own row of devices.
    """
    if shape.devices == 1:
        return jax.device_put(arrays)  # `jnp.asarray` compiles a program for each shape
    return jax.device_put(arrays, NamedSharding(shape.mesh, P(SEED) if by_net else P()))


def fetch(tree: Any) -> Any:
    """Returns the whole arrays as NumPy's; the inverse of `place`."""
    return jax.device_get(tree)
