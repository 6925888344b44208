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
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from IPython.display import Markdown, display

import jaxnorm
from jaxnorm.analysis import tables
from jaxnorm.analysis.results import Run
from jaxnorm.runs import runner
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training.experiment import Experiment

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
dataset = jaxnorm.load("digits")
config = jaxnorm.study(
    norm="all,__main__:FilterResponseNorm",
    arch="matched",
    dataset="digits",
    epochs=EPOCHS,
    seeds=SEEDS,
)
sweep = Sweep.create(Path(tempfile.mkdtemp()) / "run", [config], "own_norm.ipynb")
runner.run(sweep, Experiment(sweep.configs, dataset), "own_norm.ipynb")
run = Run(sweep.folder)

# %% [markdown]
# ## Side by side

# %%
display(Markdown(tables.results(run).markdown()))

# %%
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for norm in run.norms:
    seeds = [[line.test_accuracy for line in run.epochs[norm, s]] for s in run.seeds(norm)]
    means = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
    axes.plot(range(1, EPOCHS + 1), means, marker="o", label=norm.rpartition(":")[2])
axes.set(xlabel="epoch", ylabel="test accuracy", title=f"{dataset.caption}, n = {SEEDS} seeds")
axes.legend()
plt.show()

# %% [markdown]
# ## The differences, paired by seed
#
# Nets of one seed start from the same kernels and see the same batches. So the differences are
# taken seed by seed.

# %%
display(Markdown(tables.differences(run).markdown()))

# %% [markdown]
# So few seeds and epochs say nothing yet: set `EPOCHS` and `SEEDS` higher. On CIFAR-10 take
# `dataset="cifar10"`, and for data of your own `dataset="mine.npz"`.
