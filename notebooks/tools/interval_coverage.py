"""How often the intervals of differences cover what they estimate, in made-up runs.

    python notebooks/tools/interval_coverage.py --out notebooks/results/coverage.json

A net is right about an image if the sum of four normal numbers is positive: how easy the image is,
how easy it is for nets of this norm, how good the net is, and the net's luck with the image. Their
variances are such that pairs of nets agree as often as those of the tuned run do. The first norm's
accuracy is above the second's by the margin of equivalence, so that whoever finds the two
equivalent is wrong.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
from scipy import stats as scipy_stats

from jaxnorm.analysis import stats
from jaxnorm.analysis.tables import Table

DRAWS, IMAGES = 2_000, 10_000
SEEDS, LEFT = (2, 4, 8, 16), (0.0, 0.002, 0.017)
"""The seeds, and the deviations of a norm's accuracy over seeds on all images there could be."""
ACCURACY, EASY, OWN = 0.82, 5.43, 0.113
"""The mean accuracy, and the variances of how easy an image is for all nets and for one norm's."""
COVERED = ("t, these images", "t", "bootstrap", "crossed")


def runs(
    seeds: int, left: float, images: int = IMAGES, draws: int = DRAWS
) -> Iterator[tuple[np.ndarray, float]]:
    """Draws what is right under each norm, seed and image, bool[2, S, N], and the difference of the
    norms' accuracies that other seeds would have on the same images.
    """
    rng = np.random.default_rng(seeds)
    quantiles = scipy_stats.norm.ppf(ACCURACY + stats.MARGIN * np.array([0.5, -0.5]))
    good = left * np.sqrt(1 + EASY + OWN) / scipy_stats.norm.pdf(quantiles.mean())
    means = quantiles * np.sqrt(1 + EASY + OWN + good**2)
    for _ in range(draws):
        easy = np.sqrt(EASY) * rng.standard_normal(images)
        easy = means[:, None] + easy + np.sqrt(OWN) * rng.standard_normal((2, images))
        limits = easy[:, None] + good * rng.standard_normal((2, seeds, 1))
        luck = rng.standard_normal((2, seeds, images), np.float32)
        first, second = scipy_stats.norm.cdf(easy / np.sqrt(1 + good**2)).mean(1)
        yield luck < limits.astype(np.float32), float(first - second)


def simulate(seeds: int, left: float, images: int = IMAGES, draws: int = DRAWS) -> dict[str, float]:
    """The share of made-up runs in which each interval covers, and that of those in which the norms
    are found to be equivalent.
    """
    paired, here, crossed = [], [], []
    for correct, difference in runs(seeds, left, images, draws):
        cells = correct[0].astype(np.int8) - correct[1]
        paired.append(stats.Sample(tuple(cells.mean(1))))
        here.append(difference)
        crossed.append(stats.crossed(cells))
    found = [one for one in crossed if one]
    values = np.array([sample.values for sample in paired])
    options: Any = {"method": "percentile", "n_resamples": 999, "axis": 1, "batch": 100}
    resampled = scipy_stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0), **options)
    ends = np.stack(resampled.confidence_interval, axis=1)
    t = np.array([sample.interval for sample in paired])
    both = np.array([one.interval for one in found])
    intervals = (t, t, ends, both)
    truths = (np.array(here), stats.MARGIN, stats.MARGIN, stats.MARGIN)
    covers = [
        float(((low <= truth) & (truth <= high)).mean())
        for (low, high), truth in zip([i.T for i in intervals], truths, strict=True)
    ]
    wrong = float(np.mean([one.equivalence_p < stats.LEVEL for one in found]))
    return {**dict(zip(COVERED, covers, strict=True)), "equivalent": wrong}


def table(values: Mapping[str, Any]) -> Table:
    """The coverage of each interval: a row for each number of seeds and spread over them."""
    rows = []
    for row in values["rows"]:
        shares = [f"{row[name]:.1%}" for name in (*COVERED, "equivalent")]
        rows.append([str(row["seeds"]), f"{100 * row['left']:g}", *shares])
    head = ["seeds", "deviation left, points", "t interval, on the same images", "on other images"]
    head += ["bootstrap, on other images", "over seeds and images, on other images"]
    note = (
        f"The share of {values['draws']:,} made-up runs of two norms, {values['images']:,} test "
        "images each, in which a 95 % interval holds the difference between the norms; and in "
        "which norms that differ by the whole margin are found to be equivalent, which should be "
        "5 % at most."
    )
    return Table("What the intervals cover", [*head, "equivalent at the margin"], rows, note)


def every(seeds: Sequence[int] = SEEDS, left: Sequence[float] = LEFT) -> list[dict[str, float]]:
    """The shares of all settings."""
    return [{"seeds": n, "left": one, **simulate(n, one)} for one in left for n in seeds]


def main(out: Path | None = None) -> None:
    """Simulates, prints the table, and writes the shares as JSON."""
    values = {"draws": DRAWS, "images": IMAGES, "numpy": np.__version__, "rows": every()}
    print(table(values).plain())
    if out:
        out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
