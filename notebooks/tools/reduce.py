"""Makes finished runs small enough to be published: what `results/` holds.

    python notebooks/tools/reduce.py RUN [RUN ...]

Of each net its lines, losses and probes stay, and of its predictions the classes, the
log-probabilities of label and prediction and the calibration, which needs all logits. Those stay of
the one net of each norm whose mistakes the pages show; in runs of which they show none, losses and
log-probabilities are rounded to float16. Of a run with held-out images, as a tuning has, lines and
probes stay alone. States, reports and the figures that no page shows go.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np

from jaxnorm.analysis import stats
from jaxnorm.analysis.results import Run
from jaxnorm.records import Predictions
from jaxnorm.storage.sweep import Sweep

FOLDER = Path(__file__).resolve().parents[1]
PAGES = "".join(path.read_text() for path in [FOLDER.parent / "README.md", *FOLDER.glob("pages/*")])
MISTAKES = ("tuned", "matched")
"""The runs whose mistakes the pages show."""


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


def reduce(run: Run, mistakes: bool) -> None:
    """Writes the results of a run's nets anew, with what is kept, and removes the rest: the logits
    and images too if its mistakes are not shown, whose numbers are then rounded.
    """
    shown = {(norm, run.shown_seed(norm)) for norm in run.norms} if mistakes else set()
    for net in run.finished:
        folder = run.net(*net)
        arrays = dict(np.load(folder.path / "result.npz"))
        if run.info.config.validation:
            arrays = {name: arrays[name] for name in ("epochs", "environments")}
            arrays["losses"] = np.zeros(0, np.float32)
        else:
            arrays |= reduced(run.predictions[net], net in shown)
            if net not in shown:
                arrays.pop("logits", None)
            if not mistakes:
                rounded = ("losses", "log_probabilities")
                arrays |= {name: arrays[name].astype(np.float16) for name in rounded}
        run.directory.write_arrays(f"{folder.name}/result.npz", **arrays)
    if run.info.config.validation or not mistakes:
        (run.directory.path / "examples.npz").unlink(missing_ok=True)


def sweep_up(folder: Path) -> None:
    """Removes states, locks, reports and the figures that no page shows from a run or a sweep."""
    others = (".lock", ".writing", "state-", "report.", "metrics.")
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what it holds
        shown = f"{path.parent.relative_to(folder.parent)}/{path.name}" in PAGES
        if path.is_dir():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif path.name.startswith(others) or (path.suffix == ".png" and not shown):
            path.unlink()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for directory in Sweep.open(Path(argument)).directories:
            reduce(Run(directory), Path(argument).resolve().name in MISTAKES)
        sweep_up(Path(argument).resolve())
