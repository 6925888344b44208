"""Nets of few layers, which compile in a fraction of the time, as entries of `ARCHS`.

`python nets.py FLAGS` is `python -m jaxnorm.run FLAGS` that knows them; with FIGURES=together in
the environment a report draws no other figure, which takes a tenth of the time of all.
"""

import os

from jaxnorm import cli, run
from jaxnorm.model.cnn import ARCHS, Layer
from jaxnorm.runs import callbacks

THREE_LAYERS = (Layer("C1", "block", 4), Layer("GAP", "mean", window=30), Layer("c11", "head"))
EVERY_KIND = (
    Layer("C1", "block", 16, padding=1),
    Layer("c2", "squeeze", 8),
    Layer("P1", "pool"),
    Layer("C3", "block", 8, padding=1),
    Layer("C4", "residual", 8, padding=1),
    Layer("GP", "mean-max"),
    Layer("c5", "head"),
)
"""A row of each kind of layer of the residual net, and "squeeze"."""
ATTENDING = (
    Layer("C1", "block", 16, padding=1, attends=True),
    Layer("P1", "mixed-pool"),
    Layer("C2", "block", 16, padding=1, attends=True),
    Layer("C3", "residual", 16, padding=1, attends=True),
    Layer("GP", "mean-max"),
    Layer("c4", "head"),
)
ARCHS["three-layers"] = lambda norm: THREE_LAYERS
ARCHS["every-kind"] = lambda norm: EVERY_KIND
ARCHS["attending"] = lambda norm: ATTENDING

callbacks.Bar.SECONDS = 3_600.0  # how long a test takes must not decide what is printed

if __name__ == "__main__":
    if "FIGURES" in os.environ:
        from jaxnorm.analysis import figures

        figures.FIGURES = (getattr(figures, os.environ["FIGURES"]),)
    cli.leave(cli.run(run.app))
