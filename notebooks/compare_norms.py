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
# # Batch, group and layer normalization compared
#
# Three experiments on one small CNN in which only the norm differs: their logs, their curves, what
# the seeds say, and the images that they get wrong. Everything that is done is in the package; this
# notebook calls it and shows what comes out.
#
# It runs on 8x8 handwritten digits, which need no download, for a few epochs. For the study itself
# set `DATASET = "cifar10"` and `EPOCHS = 20`, and take a break: on two CPU cores a net takes 20 to
# 30 minutes.

# %%
import jaxnorm

DATASET, EPOCHS, SEEDS = "digits", 4, 2

# %%
config = jaxnorm.study(
    norm="all", arch="matched", dataset=DATASET, epochs=EPOCHS, learning_rate=0.02, seeds=SEEDS
)
dataset = jaxnorm.load(config.dataset)
dataset

# %% [markdown]
# ## The three experiments
#
# A line for each epoch. Under one seed every norm starts from the same kernels and sees the same
# batches under the same dropout masks. The run is a folder under `runs/`; with `out="NAME"` the
# cell goes on with it if it is there already.

# %%
run = jaxnorm.train(config, dataset)

# %% [markdown]
# ## What was found

# %%
run.finding

# %%
run.results

# %%
run.differences

# %%
run.values

# %% [markdown]
# ## Curves

# %%
run.figures["seeds"]

# %%
run.figures["loss"]

# %%
run.figures["accuracy"]

# %%
run.figures["curves-batch"]

# %% [markdown]
# ## Mistakes
#
# The test images that every norm gets wrong, those with the highest confidence first. Each norm's
# own are `run.figures["mistakes-confident-batch"]` and so on; `list(run.figures)` names all.

# %%
run.figures["mistakes-common"]

# %% [markdown]
# ## Classes

# %%
run.figures["confusion-layer"]
