"""A norm of a user's own, for tests: batch norm's statistics kept under a name of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class OwnNorm(nn.Module):
    """Divides each channel by the batch's largest absolute value, or by its running average."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        largest = self.variable("largest", "value", jnp.ones, x.shape[-1:])
        if self.use_running_average or self.is_initializing():
            divisor = largest.value
        else:
            divisor = jnp.abs(x).max((0, 1, 2))
            largest.value = 0.9 * largest.value + 0.1 * divisor
        return x * (scale / (divisor + 1e-3))[None, None, None]


class WrappedNorm(nn.Module):
    """Flax's batch norm inside, whose averages lie a level deeper, with another momentum."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(self.use_running_average, momentum=0.5)(x)


class InheritedNorm(nn.BatchNorm):
    """Flax's batch norm with its own field `use_running_average`, and a default of our own."""

    momentum: float = 0.5


class FlatNorm(nn.Module):
    """Returns another shape, which no norm may."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)


class NoisyNorm(nn.Module):
    """Asks for a random key in evaluation too, where there is none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.1, deterministic=False)(x)


class SteepNorm(nn.Module):
    """Has finite values, and the gradient of a root at zero."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.sqrt(0 * x)


class PairNorm(nn.Module):
    """Its scale and bias are one parameter, a pair; its kernel is a parameter with metadata."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        ones = nn.with_partitioning(nn.initializers.ones, (None, None))
        kernel = self.param("kernel", ones, (channels, channels))
        shape = (1, 1, 1, channels)
        scale, bias = self.param("pair", lambda key: (jnp.ones(shape), jnp.zeros(shape)))
        return (x - x.mean(-1, keepdims=True)) @ kernel * scale + bias
