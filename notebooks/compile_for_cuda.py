"""Compiles every program for an H100, without one, and prints XLA's account of memory.

    pip install 'jax-cuda12-plugin==0.10.1' 'jax-cuda12-pjrt==0.10.1'
    python notebooks/compile_for_cuda.py

It needs the CUDA plugin's wheels, of the version of JAX. Beside the account of a norm's programs
stands what `nets_at_once` takes for it: six arrays of the size of each layer's output for a net.
"""

import os

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cyclopts
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxnorm.analysis.tables import Table
from jaxnorm.model import ops
from jaxnorm.model.cnn import CNN
from jaxnorm.training import epoch as epochs
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
IMAGES, TEST, STEPS = 50_000, 10_000, 390


def compile_programs(norm: str, precision, nets: int, batch_size: int, sharding) -> list[int]:
    """The bytes of temporary memory of training and evaluation; raises where XLA refuses one."""
    program = Program(CNN(norm, "matched", precision=precision), 0.9, (0.5,) * 3, (0.25,) * 3)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    state = init_state.eval_shape(program, 0)
    states = jax.tree.map(lambda leaf: shaped((nets, *leaf.shape), leaf.dtype), state)
    images, labels = shaped((IMAGES, 32, 32, 3), jnp.uint8), shaped((IMAGES,), jnp.int32)
    batches, step = shaped((nets, STEPS, batch_size), jnp.int32), shaped((), jnp.int32)
    keys = shaped((nets, 2), jax.eval_shape(jax.random.key, 0).dtype)
    rates, decays = shaped((nets, STEPS), jnp.float32), shaped((nets,), jnp.float32)
    training = (program, states, images, labels, batches, keys, rates, decays, *[step] * 3)
    test = (shaped((TEST, 32, 32, 3), jnp.uint8), shaped((TEST,), jnp.int32))
    compiled = [
        epochs.train_nets.lower(*training).compile(),
        epochs.evaluate_nets.lower(program, states, *test).compile(),
    ]
    for each in compiled:
        assert "f64" not in (each.as_text() or "")
    return [each.memory_analysis().temp_size_in_bytes for each in compiled]


def main(nets: tuple[int, ...] = (1, 8), batch_size: int = 128) -> None:
    """Compiles for every norm and precision."""
    ops._on_cpu = lambda: False  # the operators as a GPU gets them
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding, rows = SingleDeviceSharding(topology.devices[0]), []
    for norm in ("batch", "group", "layer", "instance", "rms", "none"):
        for precision in ("float32", "tf32", "bfloat16"):
            for count in nets:
                sizes = compile_programs(norm, precision, count, batch_size, sharding)
                taken = count * epochs.net_bytes(CNN(norm, "matched"), batch_size)
                row = [f"{norm} {precision}", str(count), *(f"{n / 1e6:,.0f}" for n in sizes)]
                rows.append([*row, f"{taken / 1e6:,.0f}"])
                print(rows[-1], flush=True)
    head = ["program", "nets", "training, MB", "evaluation, MB", "taken for it, MB"]
    print(Table("", head, rows).markdown())


if __name__ == "__main__":
    cyclopts.run(main)
