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
import tempfile
from pathlib import Path

from IPython.display import Image, Markdown, display

import jaxnorm
from jaxnorm.analysis import figures, tables
from jaxnorm.analysis.results import Run
from jaxnorm.runs import runner
from jaxnorm.storage.sweep import Sweep
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.fit import Callback

DATASET, EPOCHS, SEEDS = "digits", 4, 2

# %%
config = jaxnorm.study(
    norm="all", arch="matched", dataset=DATASET, epochs=EPOCHS, learning_rate=0.02, seeds=SEEDS
)
dataset = jaxnorm.load(config.dataset)
sweep = Sweep.create(Path(tempfile.mkdtemp()) / "compare", [config], "compare_norms.ipynb")
print(f"{dataset.caption}: {len(dataset.train_labels)} training images")

# %% [markdown]
# ## The three experiments
#
# A line for each epoch. Under one seed every norm starts from the same kernels and sees the same
# batches under the same dropout masks.


# %%
class Log(Callback):
    """Prints a line for each epoch."""

    def on_epoch(self, config, epoch):
        """One line."""
        print(
            f"{epoch.norm:>6} norm  seed {epoch.seed}  epoch {epoch.epoch}  "
            f"train {epoch.train_loss:.4f} {epoch.train_accuracy:7.2%}  "
            f"test {epoch.test_loss:.4f} {epoch.test_accuracy:7.2%}"
        )


runner.run(sweep, Experiment(sweep.configs, dataset), "compare_norms.ipynb", Log())
run = Run(sweep.folder)
figures.save_examples(run, dataset)

# %% [markdown]
# ## What was found

# %%
display(Markdown(tables.finding(run)))
for make in (tables.results, tables.differences, tables.values):
    display(Markdown(make(run).markdown()))


# %% [markdown]
# ## Curves


# %%
def show(drawn):
    """Shows figures."""
    for _, figure in drawn:
        display(Image(figures.png(figure, 80)))


show(figures.seeds(run))
show(figures.together(run))

# %%
show(figures.curves(run))

# %% [markdown]
# ## Mistakes
#
# Of each norm the mistakes that it is surest of, and ten drawn by the seed, all from the whole test
# set; then the images that every norm gets wrong.

# %%
show(figures.mistakes(run))

# %% [markdown]
# ## Classes

# %%
show(figures.confusion(run))
