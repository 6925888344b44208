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
# # Thirteen norms
#
# What each norm of `jaxnorm.norms` does to one batch, in pictures, and then a race of all. They are
# Flax modules and go into any model. It runs on 8x8 handwritten digits, which need no download.

# %%
import exploring
import numpy as np
from exploring import show

import jaxnorm
from jaxnorm import norms

EPOCHS = 3
dataset = jaxnorm.load("digits")

# %% [markdown]
# ## Their formulas
#
# x is f32[N, H, W, C], and "normalized" is (x - mean) / sqrt(var + epsilon). All but `none` then
# multiply by a learned scale of each channel, and all but `none` and `rms` add a learned bias.
#
# | norm | formula, before scale and bias |
# |---|---|
# | `batch` | normalized over N, H and W of each channel; in evaluation by running averages |
# | `group` | normalized over H, W and the channels of a group of each image |
# | `layer` | normalized over H, W and C of each image |
# | `pixel` | normalized over the channels of each pixel |
# | `instance` | normalized over H and W of each channel of each image |
# | `rms` | x / sqrt(mean(x^2) + epsilon) over H, W and C of each image |
# | `none` | x |
# | `ghost` | batch norm of each ghost, which is `size` neighbouring images of the batch |
# | `renorm` | batch norm, times r, plus d, which lead to the running averages within limits |
# | `frn` | x / sqrt(mean(x^2) + epsilon) over H and W of each channel of each image |
# | `evonorm-s0` | x * sigmoid(v x) / sqrt(var + epsilon), var over the same as in `group` |
# | `dyt` | tanh(alpha x) |
# | `derf` | erf(alpha x + shift) |
#
# `frn` takes, after scale and bias, the maximum of the result and a learned threshold: that and
# `evonorm-s0` activate, so no ReLU follows them. [The page of norms](pages/norms.md) has papers.

# %%
NORMS = {
    "batch": norms.BatchNorm(use_running_average=False),
    "group": norms.GroupNorm(num_groups=4),
    "layer": norms.LayerNorm(),
    "pixel": norms.PixelNorm(),
    "instance": norms.InstanceNorm(),
    "rms": norms.RMSNorm(),
    "none": norms.Identity(),
    "ghost": norms.GhostBatchNorm(size=4, use_running_average=False),
    "renorm": norms.BatchRenorm(relaxed=(0, 1, 1), momentum=0.9, use_running_average=False),
    "frn": norms.FilterResponseNorm(),
    "evonorm-s0": norms.EvoNormS0(groups=4),
    "dyt": norms.DynamicTanh(),
    "derf": norms.DynamicErf(),
}

# %% [markdown]
# ## One batch
#
# Sixteen digits whose brightness rises from an eighth in the first to all of it in the last, after
# the first convolution of an untrained net, which gives 16 channels; four times as large, so that
# dynamic tanh and erf have something to bend. Before it the norm has seen forty batches of full
# brightness, as in training. Only batch renormalization lets them have a say: here its limits are
# relaxed after the first step. By default they are 1 and 0 for 5,000 steps, and that is batch norm.

# %%
images = dataset.train_images[: 41 * 16].reshape(41, 16, 32, 32, 3).astype(np.float32)
images[-1] *= np.linspace(1 / 8, 1, 16)[:, None, None, None]
maps = 4 * exploring.convolved(images.reshape(-1, 32, 32, 3), dataset)
batches = maps.reshape(41, 16, *maps.shape[1:])
before = batches[-1]
after = {norm: exploring.normalized(module, batches) for norm, module in NORMS.items()}

# %% [markdown]
# ## By image
#
# Mean and deviation of each image over its pixels and channels: dashed before the norm, blue after
# it. Norms that take statistics of each image (`group`, `layer`, `pixel`, `instance`, `rms`, `frn`,
# `evonorm-s0`) make dark and bright images alike, or nearly. Batch norm lets them differ, ghost
# batch norm inside each ghost of four images.

# %%
show(exploring.draw_moments(before, after, "image"))

# %% [markdown]
# ## By channel
#
# The same of each channel over all images and their pixels. Batch, ghost and instance norm make
# every mean 0 and every deviation 1, over the batch or part by part. Layer, pixel and RMS norm keep
# the differences between channels; group norm keeps those inside each of its four groups of four.

# %%
show(exploring.draw_moments(before, after, "channel"))

# %% [markdown]
# ## Value by value
#
# Each point is a pixel of one channel, before the norm and after it, in a dark image, a middling
# and a bright one. One line for all: the norm treats every image alike. Several lines: each image,
# or its ghost, has statistics of its own. A cloud: each pixel has. A bend is an activation, or a
# squashing function in the place of statistics.

# %%
show(exploring.draw_values(before, after, images=(1, 7, 15), channel=0))

# %% [markdown]
# ## A race
#
# All thirteen in the same net, from the same kernels, on the same batches of digits.

# %%
config = jaxnorm.study(norm="every", arch="matched", dataset="digits", epochs=EPOCHS)
run = jaxnorm.train(config, dataset)

# %%
run.results

# %%
run.figures["accuracy"]

# %% [markdown]
# Three epochs and one seed show nothing about which norm is better: some have hardly begun to learn
# by then, and another seed or learning rate may give another order. For an answer take more seeds
# and epochs, as [the page of results](pages/results.md) does.
