# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own norm beside the three
#
# A norm is a Flax module that maps f32[N, H, W, C] to the same shape. Write it, name it, and train
# it in the same net, from the same kernels, on the same batches as batch, group and layer norm.
#
# Here it is filter response normalization (Singh and Krishnan, 2019): each channel of each image is
# divided by the root of its mean square. It needs no batch and subtracts no mean.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm

EPOCHS, SEEDS = 4, 2


# %%
class FilterResponseNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) over height and width; a scale and a bias for each channel."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        mean_square = jnp.mean(jnp.square(x), (1, 2), keepdims=True)
        normalized = x * jax.lax.rsqrt(mean_square + self.epsilon)
        return normalized * scale[None, None, None] + bias[None, None, None]


# %% [markdown]
# In a notebook its name is `__main__:FilterResponseNorm`; in a file `norms.py`, on the command
# line, `norms:FilterResponseNorm`. A module that keeps running averages has a field
# `use_running_average`, and keeps them in variables of any name.

# %%
config = jaxnorm.study(
    norm="all,__main__:FilterResponseNorm",
    arch="matched",
    dataset="digits",
    epochs=EPOCHS,
    seeds=SEEDS,
)
run = jaxnorm.train(config)

# %% [markdown]
# ## Side by side

# %%
run.results

# %%
run.figures["accuracy"]

# %% [markdown]
# ## The differences, paired by seed
#
# Nets of one seed start from the same kernels and see the same batches. So the differences are
# taken seed by seed.

# %%
run.differences

# %% [markdown]
# So few seeds and epochs say nothing yet: set `EPOCHS` and `SEEDS` higher. On CIFAR-10 take
# `dataset="cifar10"`, and for data of your own `dataset="mine.npz"`.
