"""Makes finished runs small enough to be published: what `results/` holds.

    python notebooks/tools/reduce.py RUN [RUN ...]

Of each net its lines, losses and probes stay, and of its predictions the classes, the
log-probabilities of label and prediction and the calibration, which needs all logits; those stay of
the one net of each norm whose mistakes are shown. States, reports and the figures that no page
shows go. A run whose predictions were removed keeps its lines and probes alone.
"""

import sys
from pathlib import Path

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.analysis.results import Run
from jaxnorm.records import Predictions
from jaxnorm.storage.sweep import Sweep

FOLDER = Path(__file__).resolve().parents[1]
PAGES = "".join(path.read_text() for path in [FOLDER.parent / "README.md", *FOLDER.glob("pages/*")])


def reduced(net: Predictions, keep_logits: bool) -> dict[str, np.ndarray]:
    """Returns the arrays of predictions to keep."""
    labels = net.labels.astype(np.uint8)
    if keep_logits and net.logits is not None:
        return {"labels": labels, "logits": net.logits}
    return {
        "labels": labels,
        "predicted": net.predicted.astype(np.uint8),
        "log_probabilities": net.log_probabilities,
        "calibration": np.array(stats.calibration(net)),
    }


def reduce(run: Run) -> None:
    """Writes the results of a run's nets anew, with what is kept, and removes the rest."""
    shown = {(norm, run.shown_seed(norm)) for norm in run.norms}
    for net in run.finished:
        folder = run.net(*net)
        arrays = dict(np.load(folder.path / "result.npz"))
        if "labels" in arrays:
            arrays |= reduced(run.predictions[net], net in shown)
            if net not in shown:
                arrays.pop("logits", None)
        else:
            arrays["losses"] = arrays["losses"][:0]
        run.directory.write_arrays(f"{folder.name}/result.npz", **arrays)
    for path in run.directory.path.rglob("*"):
        figure = path.parent.name == "figures" and f"{run.directory.path.name}/figures/{path.name}"
        other = path.name.startswith((".lock", ".writing", "state-", "report.", "metrics."))
        if other or (figure and figure not in PAGES):
            path.unlink()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for directory in Sweep.open(Path(argument)).directories:
            reduce(Run(directory))
