"""Batch norm, ReLU and the next convolution as one operator, layer by layer in micro-batches, with
the gradient written by hand: the form that was to save trips to memory, and does not pay.

    python notebooks/fused_stage.py --out fused.json        # two minutes, nothing else running

A convolution's output is read once in each direction, eight or sixteen images at a time: the loop
normalizes them and convolves what comes out while it lies in a core's cache; on the way back it
computes the same again, and takes the kernel's gradient and both sums of batch norm along. The
package's own operators do one after the other for the whole batch. Both have the same gradients,
which is checked, and take turns. Each device normalizes its own half of a batch in both.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chex
import cyclopts
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxnorm.analysis.tables import Table
from jaxnorm.bench.__main__ import describe_machine, measure_ceiling, save
from jaxnorm.model import ops
from jaxnorm.training.mesh import use_all_cores

SHAPES = ((32, 16), (16, 32))
"""Height and channels of the residual net's blocks."""
STAGES, STEPS, ROUNDS, BATCH = 3, 6, 10, 128
PADDING = ((1, 1), (1, 1))


def one_after_the_other(x: jax.Array, scale: jax.Array, bias: jax.Array, kernel: jax.Array):
    """The package's operators: f32[N, H, H, C] to the same shape."""
    outputs, _ = ops.normalize(x, scale, bias, ops.Over(True, x.shape[-1]))
    return ops.convolution(ops.relu(outputs), kernel, (1, 1), PADDING)


@jax.custom_vjp
def fused(x: jax.Array, scale: jax.Array, bias: jax.Array, kernel: jax.Array):
    """The same as one operator."""
    return _forward(x, scale, bias, kernel)[0]


def _activate(x, mean, factor, scale, bias):
    centered = x - mean
    return ops.stored(jnp.maximum(centered * (factor * scale) + bias, 0)), centered


def _forward(x, scale, bias, kernel):
    statistics = ops._statistics(x, _over(x))
    mean, factor = statistics.mean, lax.rsqrt(statistics.variance + 1e-5)
    mean, factor, scale, bias = (a.reshape(1, 1, 1, -1) for a in (mean, factor, scale, bias))

    def of_part(_, part):
        return None, ops._correlate(_activate(part, mean, factor, scale, bias)[0], kernel, PADDING)

    (parts,) = _micro_batches(x)
    saved = x, scale, bias, kernel, mean, factor
    return lax.scan(of_part, None, parts)[1].reshape(x.shape), saved


def _backward(saved, gradient):
    x, scale, bias, kernel, mean, factor = saved
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)

    def of_part(totals, part):
        x, gradient = part
        outputs, centered = _activate(x, mean, factor, scale, bias)
        to_outputs = ops._correlate(gradient, flipped, PADDING)
        to_kernel = ops._kernel_gradient(outputs, gradient, PADDING)
        to_norm = ops.stored(jnp.where(outputs > 0, to_outputs, 0))
        sums = ops._by_channel(_over(x), to_norm, to_norm * centered)
        to_bias, to_scale = (total.sum(0)[None, None, None] for total in sums)
        return jax.tree.map(jnp.add, totals, (to_scale, to_bias, to_kernel)), to_norm

    zeros = jax.tree.map(jnp.zeros_like, (scale, bias, kernel))
    totals, to_norm = lax.scan(of_part, zeros, _micro_batches(x, gradient))
    to_scale, to_bias, to_kernel = totals
    count = x.size // x.shape[-1]
    to_x = (
        to_norm.reshape(x.shape) * (factor * scale)
        - (x - mean) * (to_scale * scale / count * factor**3)
        - to_bias * scale / count * factor
    )
    return to_x, (to_scale * factor).ravel(), to_bias.ravel(), to_kernel


fused.defvjp(_forward, _backward)


def _over(x: jax.Array) -> ops.Over:
    return ops.Over(True, x.shape[-1])


def _micro_batches(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    size = ops.micro_batch_of(arrays[0].shape[0], 4 * arrays[0][0].size)
    return tuple(array.reshape(-1, size, *array.shape[1:]) for array in arrays)


def steps_of(stage: Callable) -> Callable:
    """Several passes forward and back through a chain of stages, on all devices."""

    def loss(x, params, cotangent):
        for of_stage in params:
            x = stage(x, *of_stage)
        return (x * cotangent).sum()

    def steps(x, params, cotangent):
        def step(_, carry):
            x, total = carry
            to_x, to_params = jax.grad(loss, (0, 1))(x, params, cotangent)
            return x - 1e-6 * to_x, jax.tree.map(jnp.add, total, to_params)

        return lax.fori_loop(0, STEPS, step, (x, jax.tree.map(jnp.zeros_like, params)))

    mesh, split = Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch")
    specs = {"in_specs": (split, PartitionSpec(), split), "out_specs": split}
    return jax.jit(jax.shard_map(steps, mesh=mesh, **specs, check_vma=False))


def compare(height: int, channels: int) -> dict[str, Any]:
    """Milliseconds of a pass through the chain in both forms, in turns."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    x, cotangent = draw(2, BATCH, height, height, channels)
    kernels = 0.1 * draw(STAGES, 3, 3, channels, channels)
    params = [(1 + 0.1 * draw(channels), 0.1 * draw(channels), kernel) for kernel in kernels]
    forms = {"one after the other": steps_of(one_after_the_other), "fused": steps_of(fused)}
    results = [form(x, params, cotangent) for form in forms.values()]
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-3)
    samples = {name: [] for name in forms}
    for round_ in range(ROUNDS):
        for name in list(forms)[:: 1 if round_ % 2 else -1]:
            clock = time.perf_counter()
            jax.block_until_ready(forms[name](x, params, cotangent))
            samples[name].append(1e3 * (time.perf_counter() - clock) / STEPS)
    return {"height": height, "channels": channels, "milliseconds": samples}


def table(values: Mapping[str, Any]) -> Table:
    """A written comparison as a table."""
    rows = []
    for comparison in values["comparisons"]:
        first, second = samples = list(comparison["milliseconds"].values())
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
        shape = f"{comparison['height']} x {comparison['height']} x {comparison['channels']}"
        rows.append([shape, *(f"{statistics.median(s):.1f}" for s in samples), f"{ratio:.2f}"])
    machine = values["machine"]
    note = (
        f"{STAGES} stages, batch {BATCH}, medians of {ROUNDS} turns; {machine['processor']}; "
        f"jax {values['jax']}; {machine['when'][:10]}."
    )
    return Table("Fused", ["a stage", "package, ms", "fused, ms", "fused takes"], rows, note)


def main(out: Path | None = None) -> None:
    """Prints, and writes, the time of both forms at both shapes."""
    use_all_cores()
    comparisons = [compare(*shape) for shape in SHAPES]
    machine = describe_machine(measure_ceiling())
    values = {"machine": machine, "jax": jax.__version__, "comparisons": comparisons}
    print(table(values).plain())
    if out:
        save(out, values)


if __name__ == "__main__":
    cyclopts.run(main)
