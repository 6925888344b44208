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
# Here it is layer norm by the mean absolute deviation, which takes no squares and no root (after
# Hoffer et al., "Norm matters", 2018). Times sqrt(pi / 2) that is the standard deviation, if values
# are normally distributed.

# %%
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm

EPOCHS, SEEDS = 4, 2


# %%
class L1LayerNorm(nn.Module):
    """(x - mean) / (sqrt(pi / 2) mean(|x - mean|) + epsilon), the means over all of each image; a
    scale and a bias for each channel.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        centred = x - x.mean((1, 2, 3), keepdims=True)
        deviation = math.sqrt(math.pi / 2) * jnp.abs(centred).mean((1, 2, 3), keepdims=True)
        return centred / (deviation + self.epsilon) * scale + bias


# %% [markdown]
# In a notebook its name is `__main__:L1LayerNorm`; in a file `mine.py`, on the command line,
# `mine:L1LayerNorm`. A module that keeps running averages has a field
# `use_running_average`, and keeps them in variables of any name.

# %%
config = jaxnorm.study(
    norm="all,__main__:L1LayerNorm",
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
