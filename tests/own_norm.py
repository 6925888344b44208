"""Norms of a user's own, for tests: right ones, and then wrong ones."""

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
    """Flax's batch norm inside, whose averages lie a level deeper."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(self.use_running_average, momentum=0.5)(x)


class InheritedNorm(nn.BatchNorm):
    momentum: float = 0.5


class DroppingNorm(nn.Module):
    """Draws in training alone."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.1, deterministic=self.use_running_average)(x)


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


class Counts(nn.Module):
    """Its state is a whole number."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count = self.variable("steps", "count", lambda: jnp.zeros((), jnp.int32))
        if not self.use_running_average and not self.is_initializing():
            count.value += 1
        return x


class Stateless(nn.Module):
    """A norm of one expression."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.of(x)


class SowsAside(Stateless):  # for those who look, which no net keeps
    def of(self, x):
        self.sow("intermediates", "largest", x.max())
        return x


class FlatNorm(Stateless):
    def of(self, x):
        return x.reshape(x.shape[0], -1)


class HalfPrecision(Stateless):
    def of(self, x):
        return x.astype(jnp.bfloat16)


class DropsTheBatch(Stateless):  # of one image it does not
    def of(self, x):
        return x.mean(0, keepdims=True)


class OneImage(Stateless):
    def of(self, x):
        return x.reshape(1, *x.shape[1:])


class NoisyNorm(Stateless):  # in evaluation too, without a key
    def of(self, x):
        return nn.Dropout(0.1, deterministic=False)(x)


class SteepNorm(Stateless):  # finite values, and the gradient of a root at zero
    def of(self, x):
        return x + jnp.sqrt(0 * x)


class NoGradient(Stateless):  # through a condition JAX differentiates forward alone
    def of(self, x):
        return jax.lax.while_loop(lambda x: (x > 1).any(), lambda x: x / 2, x)


class IntegerParameter(Stateless):
    def of(self, x):
        return x * self.param("scale", lambda key: jnp.ones((), jnp.int32))


class KeyAsState(Stateless):
    def of(self, x):
        self.variable("noise", "key", lambda: jax.random.key(0))
        return x


class Sows(Stateless):  # a state that grows with each step
    def of(self, x):
        self.sow("stats", "largest", x.max())
        return x


class StateOfTheBatch(Stateless):
    def of(self, x):
        means = self.variable("stats", "means", jnp.zeros, x.shape[:1])
        if self.is_mutable_collection("stats"):
            means.value = x.mean((1, 2, 3))
        return x


class TrainField(nn.Module):  # nothing sets it
    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(not self.train)(x)


class RunningArgument(nn.Module):  # nothing gives it; Flax's own batch norm has such a field
    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool = False) -> jax.Array:
        return x
