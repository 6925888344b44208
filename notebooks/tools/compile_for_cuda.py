"""Compiles every program for an H100, without one, and prints XLA's account of memory, and what a
training step launches, reads and writes.

    pip install 'jax-cuda12-plugin==0.10.1' 'jax-cuda12-pjrt==0.10.1'
    python notebooks/tools/compile_for_cuda.py --norm batch group layer --precision float32

It needs the CUDA plugin's wheels, of the version of JAX. Beside the account of a norm's programs
stands what `nets_at_once` takes for it: six arrays of the size of each layer's output for a net.
The shortest time of a step is an estimate: all its bytes at the memory's bandwidth, or all its
launches at `LAUNCH_SECONDS` each, whichever takes longer. No caches, no arithmetic.

`--form` says how the convolutions of several nets are made: "grouped" is what `jax.vmap` makes, one
convolution with a group for each net, and what the package does; "patches" gathers the pixels of
each window and multiplies matrices, one for each net. One net after the other takes so many times
the launches and bytes of one.
"""

import itertools
import os
import re
from collections.abc import Sequence
from typing import Annotated, Literal

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cyclopts
import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import Parameter
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxnorm.analysis.tables import Table
from jaxnorm.model.cnn import CNN
from jaxnorm.model.fast import xla
from jaxnorm.training import epoch as epochs
from jaxnorm.training.mesh import ONE
from jaxnorm.training.step import Program, init_state

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85028765696
}
"""
NORMS = ("batch", "group", "layer", "instance", "rms", "none")
IMAGES, TEST, STEPS = 50_000, 10_000, 390
LAUNCH_SECONDS, BYTES_PER_SECOND = 2e-6, 3.35e12
WIDTHS = {"pred": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
"""What launches nothing."""


def bytes_of(shape: str) -> int:
    """The bytes of an array, or of a tuple of them, as HLO writes it."""
    total = 0
    for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        count = WIDTHS.get(kind, 0)
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count
    return total


def step_account(hlo: str) -> tuple[int, int]:
    """How many kernels the loop over steps launches, and the bytes that they read and write; of the
    data set, from which a batch is gathered, none.
    """
    (name,) = re.findall(r"body=%([\w.-]+)", hlo)
    body = hlo.split(f"\n%{name} (")[1].split("\n}")[0]
    form = r"\n\s+(?:ROOT )?%([\w.-]+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*?)\)(?=,|\n|$)"
    matches = re.findall(form, body)
    sizes = {name: bytes_of(shape) for name, shape, _, _ in matches}
    data, launches, total = IMAGES * 32 * 32 * 3, 0, 0
    for name, _, kind, operands in matches:
        if kind not in FREE:
            read = [sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands)]
            launches += 1
            total += sizes[name] + sum(size for size in read if size != data)
    return launches, total


def over_patches(images, kernel, window_strides, padding, precision=None, **options):
    """A convolution of stride 1 as a product of matrices: each window's pixels in a row."""
    height, width, inputs, outputs = kernel.shape
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    tall, wide = images.shape[1] - height + 1, images.shape[2] - width + 1
    corners = itertools.product(range(height), range(width))
    patches = jnp.concatenate([images[:, i : i + tall, j : j + wide] for i, j in corners], -1)
    kernel = kernel.reshape(height * width * inputs, outputs)
    return jnp.matmul(patches, kernel, precision=precision)


def compile_programs(
    norm: str, precision, nets: int, batch_size: int, sharding
) -> tuple[list[int], tuple[int, int]]:
    """The bytes of temporary memory of training and evaluation, and `step_account`; raises where
    XLA refuses a program.
    """
    program = Program(model=CNN(norm, "matched", precision=precision))

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    state = init_state.eval_shape(program, 0, np.zeros((2, 3), np.float32))
    states = jax.tree.map(lambda leaf: shaped((nets, *leaf.shape), leaf.dtype), state)
    images, labels = shaped((IMAGES, 32, 32, 3), jnp.uint8), shaped((IMAGES,), jnp.int32)
    batches, step = shaped((nets, STEPS, batch_size), jnp.int32), shaped((), jnp.int32)
    keys = shaped((nets, 2), jax.eval_shape(jax.random.key, 0).dtype)
    rates, decays = shaped((nets, STEPS), jnp.float32), shaped((nets,), jnp.float32)
    training = (program, ONE, states, images, labels, batches, keys, rates, decays, *[step] * 3)
    test = (shaped((TEST, 32, 32, 3), jnp.uint8), shaped((TEST,), jnp.int32))
    compiled = [
        epochs.train_nets.lower(*training).compile(),
        epochs.evaluate_nets.lower(program, ONE, states, *test).compile(),
    ]
    for executable in compiled:
        assert "f64" not in (executable.as_text() or "")
    memory = [executable.memory_analysis().temp_size_in_bytes for executable in compiled]
    return memory, step_account(compiled[0].as_text() or "")


Several = Parameter(consume_multiple=True)


def main(
    *,
    norm: Annotated[Sequence[str], Several] = NORMS,
    precision: Annotated[Sequence[str], Several] = ("float32", "tf32", "bfloat16"),
    nets: Annotated[Sequence[int], Several] = (1, 8),
    batch_size: int = 128,
    form: Literal["grouped", "patches"] = "grouped",
) -> None:
    """Compiles for each norm and precision."""
    xla.on_cpu = lambda: False  # the operators as a GPU gets them
    if form == "patches":
        jax.lax.conv_general_dilated = over_patches
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding, rows = SingleDeviceSharding(topology.devices[0]), []
    for kind, exact, count in itertools.product(norm, precision, nets):
        sizes, (launches, total) = compile_programs(kind, exact, count, batch_size, sharding)
        taken = count * epochs.net_bytes(CNN(kind, "matched"), batch_size)
        least = max(launches * LAUNCH_SECONDS, total / BYTES_PER_SECOND)
        row = [f"{kind} {exact}", str(count), *(f"{n / 1e6:,.0f}" for n in (*sizes, taken))]
        rows.append([*row, str(launches), f"{total / 1e9:.2f}", f"{least * 1e3:.2f}"])
        print(rows[-1], flush=True)
    head = ["program", "nets", "training, MB", "evaluation, MB", "taken for it, MB"]
    head += ["launches a step", "GB a step", "a step at least, ms"]
    print(Table("", head, rows).markdown())


if __name__ == "__main__":
    cyclopts.run(main)
