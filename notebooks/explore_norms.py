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
# # What a norm does
#
# Every norm subtracts a mean and divides by a deviation. They differ in *what the mean is taken
# over*, and all else follows from that: what the activations look like, whether one image's result
# depends on the others in its batch, and what happens when the batch is small.
#
# It runs on 8x8 handwritten digits, which need no download.

# %%
import dataclasses

import exploring
import numpy as np
from exploring import show

import jaxnorm

NORMS = ("batch", "group", "layer")
EPOCHS, SIZES = 3, (4, 16, 64, 128)
dataset = jaxnorm.load("digits")

# %% [markdown]
# ## What a norm averages over
#
# Three images of eight channels. One output is marked in thought (image 0, channel 2); dark are the
# inputs whose mean and deviation it is given, found by differentiating the Flax module itself.
# Batch norm alone looks across images. Group norm here has four groups of two channels.

# %%
masks = {norm: exploring.averaged_over(norm) for norm in (*NORMS, "instance")}
show(exploring.draw_averaged(masks))

# %% [markdown]
# ## Activations and gradients
#
# The same net under three norms after a few epochs. Before the norm the activations drift from
# layer to layer; after it mean and deviation are 0 and 1, give or take what the learned scale and
# bias make of them. The third picture is batch norm's gap between training and evaluation: in
# training it normalizes by its batch, in evaluation by running averages, and of a small batch the
# former says little.

# %%
config = jaxnorm.study(arch="matched", dataset="digits", epochs=EPOCHS, learning_rate=0.02)
fits = jaxnorm.fit(config, dataset)
caption = f"{dataset.caption}; matched nets, seed 1, {EPOCHS} epochs"
for drawn in exploring.draw_inside(fits.values(), dataset, caption):
    show(drawn)

# %% [markdown]
# ## Gradients across examples
#
# Row i, column j: how much the loss of image i changes with the pixels of image j. Under group and
# layer norm an image's loss is its own affair; under batch norm every image of the batch has a hand
# in it.

# %%
images, labels = dataset.train_images[:16], dataset.train_labels[:16]
matrices = {
    norm: exploring.example_gradients(fit.program, fit.state, images, labels)
    for (norm, _), fit in fits.items()
}
show(exploring.draw_example_gradients(matrices))
for norm, matrix in matrices.items():
    others = matrix[~np.eye(len(matrix), dtype=bool)].sum()
    print(f"{norm:>6} norm: {others / matrix.sum():.0%} of the dependence is on other images")

# %% [markdown]
# ## Batch size
#
# Batch and group norm trained with batches of 4, 16, 64 and 128. Nothing else changes, the learning
# rate included, so that a smaller batch also makes more steps: compare the norms at one size, not
# the sizes under one norm. One seed and a few epochs of digits show the direction of the effect;
# how large it is on CIFAR-10 takes runs of `python -m jaxnorm.run --batch-size` and a report on
# them.

# %%
accuracies = {}
for norm in ("batch", "group"):
    for size in SIZES:
        sized = dataclasses.replace(config, norm=norm, batch_size=size, learning_rate=0.01)
        last = jaxnorm.fit(sized, dataset)[norm, 1].epochs[-1].test_accuracy
        accuracies.setdefault(norm, {})[size] = [last]
        print(f"{norm:>6} norm, batch {size:>3}: {last:.2%}")
show(exploring.draw_batch_sizes(accuracies))
