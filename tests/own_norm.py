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
    """Returns another shape, which no norm may, as none of the following may do what it does."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)


class NoisyNorm(nn.Module):
    """Asks for a random key in evaluation too, where there is none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.1, deterministic=False)(x)


class DroppingNorm(nn.Module):
    """Draws in training alone."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.1, deterministic=self.use_running_average)(x)


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


class TwiceTheChannels(nn.Module):
    """The convolution after it would take any number of them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, x], -1)


class HalfTheRows(nn.Module):
    """The mean after it would take any number of them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x[:, ::2]


class HalfPrecision(nn.Module):
    """Its output has another dtype."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16)


class DropsTheBatch(nn.Module):
    """Of one image it does not."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean(0, keepdims=True)


class StateOfTheBatch(nn.Module):
    """Its state is as long as the batch."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        means = self.variable("stats", "means", jnp.zeros, x.shape[:1])
        if self.is_mutable_collection("stats"):
            means.value = x.mean((1, 2, 3))
        return x


class Sows(nn.Module):
    """Its state grows with each step."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("stats", "largest", x.max())
        return x


class IntegerParameter(nn.Module):
    """It has no gradient."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("scale", lambda key: jnp.ones((), jnp.int32))


class KeyAsState(nn.Module):
    """A checkpoint holds arrays of numbers alone."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.variable("noise", "key", lambda: jax.random.key(0))
        return x


class OneImage(nn.Module):
    """Takes no more than one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(1, *x.shape[1:])


class NoGradient(nn.Module):
    """Stops at a condition, through which JAX differentiates forward alone."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: (x > 1).any(), lambda x: x / 2, x)


class TrainField(nn.Module):
    """Nothing sets the field."""

    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(not self.train)(x)


class DeterministicArgument(nn.Module):
    """Nothing gives the argument."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        return nn.Dropout(0.1, deterministic=deterministic)(x)


class RunningArgument(nn.Module):
    """Nothing gives this argument either; Flax's own batch norm has a field of the same name."""

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = False) -> jax.Array:
        return x


class SowsAside(nn.Module):
    """Sows for those who look, which no net keeps."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "largest", x.max())
        return x


class Counts(nn.Module):
    """Its state is a whole number."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count = self.variable("steps", "count", lambda: jnp.zeros((), jnp.int32))
        if not self.use_running_average and not self.is_initializing():
            count.value += 1
        return x
