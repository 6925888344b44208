"""The fair tuning: `python -m jaxnorm.tune --recipe tuned --trials 12`. Every norm gets the same
learning rates, drawn once, and is judged on images that it was not trained on.

It is a sweep with a drawn list: it resumes, grows and reports like any other. The test set decides
nothing: winners are chosen by the accuracy on held-out training images.
"""

import dataclasses
from typing import Annotated

import numpy as np
from cyclopts import App, Parameter

from jaxnorm import cli, run
from jaxnorm.config import Setting, UserError

HELD_OUT, OF_DIGITS = 5_000, 144
"""Training images on which a trial is judged, if nothing else is asked for: a tenth of those of
CIFAR-10, or of the digits.
"""

app = App(
    suppress_keyboard_interrupt=False,
    name="python -m jaxnorm.tune",
    help=(
        "Train every norm with the same learning rates, drawn at random on a logarithmic scale, "
        "and say which was best on held-out training images."
    ),
    help_format="plaintext",
)


@dataclasses.dataclass(frozen=True)
class Trials:
    """The learning rates to try.

    Parameters
    ----------
    trials
        How many learning rates to draw.
    lowest
        The lowest that may be drawn.
    highest
        The highest that may be drawn.
    """

    trials: Annotated[int, cli.WHOLE] = 12
    lowest: float = 0.01
    highest: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.trials <= 1_000:
            raise UserError(Setting("trials", self.trials), " is wrong: it must be 1 to 1,000")
        if not 0 < self.lowest < self.highest < 1e6:
            raise UserError(
                Setting("lowest", f"{self.lowest:g}"),
                " must be above 0 and below ",
                Setting("highest"),
            )

    def draw(self, seed: int) -> list[float]:
        """The learning rates, to three digits: the logarithm of each is drawn uniformly from its
        own part of the range, so that few trials leave no hole.

        Raises `UserError` if some come out the same.
        """
        within = np.random.default_rng(seed).uniform(size=self.trials)
        places = (np.arange(self.trials) + within) / self.trials
        rates = self.lowest * (self.highest / self.lowest) ** places
        different = list(dict.fromkeys(float(f"{rate:.3g}") for rate in rates))
        if len(different) < self.trials:
            raise UserError(
                Setting("trials", self.trials),
                f" has {len(different)} different learning rates of three digits between ",
                Setting("lowest", f"{self.lowest:g}"),
                " and ",
                Setting("highest", f"{self.highest:g}"),
                ": ask for fewer, or for a wider range",
            )
        return different


@app.default
def main(
    *,
    trials: Annotated[Trials, Parameter(name="*")] = Trials(),
    settings: Annotated[run.Settings, run.SETTINGS] = run.NO_SETTINGS,
    options: Annotated[run.Options, run.OPTIONS] = run.NO_OPTIONS,
) -> int:
    """Trains the trials and reports what each norm won with; returns the exit code."""
    drawn = cli.given() & {field.name for field in dataclasses.fields(Trials)}
    if options.resume and drawn:
        raise UserError(
            Setting(min(drawn)),
            " conflicts with ",
            Setting("resume"),
            ", whose trials are drawn already",
        )
    named, swept = run.split(settings)
    if "learning_rate" in swept:
        raise UserError(
            Setting("learning_rate"),
            " is what is tuned: give ",
            Setting("lowest"),
            " and ",
            Setting("highest"),
        )
    for name, values in swept.items():
        if len(values) > 1:
            raise UserError(
                Setting(name, " ".join(map(str, values))), ": a tuning takes one value of it"
            )
    held_out = OF_DIGITS if named["dataset"] == "digits" else HELD_OUT
    named["validation"] = named["validation"] or held_out
    run.configs_of(named, swept)  # raises for what cannot be trained with, before rates are drawn
    swept["learning_rate"] = trials.draw(named["seed"])
    return run.start(run.configs_of(named, swept), options, tunes=True)


if __name__ == "__main__":
    cli.leave(cli.run(app))
