"""What the fast operators ask of XLA's CPU compiler."""

import jax
import jax.numpy as jnp
from jax import lax

MICRO_BATCH_BYTES = 550_000
"""The largest activation that a micro-batch may have, so that it stays in a core's cache."""


def micro_batch_of(count: int, image_bytes: int) -> int:
    """Returns how many of `count` images to take at a time, if the largest activation of one takes
    `image_bytes`: on a CPU a divisor near what `MICRO_BATCH_BYTES` holds, elsewhere all.
    """
    near = max(1, MICRO_BATCH_BYTES // image_bytes)
    if not on_cpu() or count <= near:
        return count
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    below = max(size for size in divisors if size <= near)
    return below if below > near // 2 else min(size for size in divisors if size > near)


def on_cpu() -> bool:
    """Returns whether to suit XLA's CPU compiler; other devices get the plain forms."""
    return jax.default_backend() == "cpu"


@jax.custom_vjp
def stored(x: jax.Array) -> jax.Array:
    """Returns the same array, which XLA stores instead of computing it again for each use.

    XLA's CPU compiler fuses an elementwise chain into every operator that reads its end, the
    backward pass included, and drops `optimization_barrier` before it does so. What a loop carries
    it has to store, in place. The loop turns for a NaN only, and then it changes nothing. (A
    conditional would copy the array.)
    """
    if not on_cpu():
        return x

    def unchanged(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, first = carry
        return x + jnp.where(x == x, 0, x), jnp.zeros_like(first)

    return lax.while_loop(lambda carry: carry[1] != carry[1], unchanged, (x, x.ravel()[0]))[0]


# No loop like this has a gradient, which second derivatives ask for.
stored.defvjp(lambda x: (stored(x), None), lambda _, gradient: (gradient,))


def over_images(sums: jax.Array) -> jax.Array:
    """Sums f32[N, C] over the images: f32[C].

    By no product with ones: XLA takes a product in front of it into the same loop, and rounds there
    once or twice by whether it knows that the ones are ones, which it does in programs for one
    device. The bits of a net would depend on how many devices train other nets.
    """
    return sums.sum(0)
