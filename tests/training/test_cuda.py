"""The programs as a GPU gets them: lowered for CUDA, which takes neither a GPU nor its plugin."""

import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.config import NORMS, Config
from jaxnorm.model.fast import xla
from jaxnorm.training import epoch as epochs
from jaxnorm.training import experiment
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.mesh import ONE
from jaxnorm.training.step import init_state

pytestmark = pytest.mark.slow
PRECISIONS = {"float32": "HIGHEST", "tf32": "HIGH", "bfloat16": "HIGHEST"}


def lowered(tiny, norm, precision, nets, monkeypatch):
    """The StableHLO of training, evaluation and start, as GPUs take them: not in micro-batches."""
    monkeypatch.setattr(xla, "on_cpu", lambda: False)
    monkeypatch.setattr(epochs, "nets_at_once", lambda *_: nets)
    monkeypatch.setattr(experiment, "check", lambda *_: {})  # there is no GPU for tf32
    config = Config(norm, "matched", "tiny", 1, 16, precision=precision, seeds=nets)
    (made,) = Experiment([config], tiny, ONE).groups()
    (chunk, *_), keys = made.chunks(1)
    states = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((nets, *leaf.shape), leaf.dtype),
        init_state.eval_shape(made.program, 0, made.standards[0]),
    )
    arguments = made.arguments(states, chunk, keys)
    images, labels = jnp.asarray(tiny.test_images), jnp.asarray(tiny.test_labels)
    traced = [
        epochs.train_nets.trace(*arguments),
        epochs.evaluate_nets.trace(made.program, ONE, states, images, labels),
        init_state.trace(made.program, np.uint32(1), made.standards[0]),
    ]
    return [program.lower(lowering_platforms=("cuda",)).as_text() for program in traced]


@pytest.mark.parametrize(
    ("norm", "precision"),
    [*((norm, "float32") for norm in NORMS), *product(("batch", "layer"), ("tf32", "bfloat16"))],
)
def test_every_program_lowers_with_the_precision_that_was_asked_for(
    tiny, norm, precision, monkeypatch
):
    train, evaluate, start = lowered(tiny, norm, precision, 1, monkeypatch)
    for text in (train, evaluate, start):
        assert "f64" not in text
        assert "callback" not in text
    for text, least in ((train, 2 * 11 + 9), (evaluate, 11)):
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert len(lines) >= least
        for line in lines:
            precisions = set(re.findall(r"#stablehlo<precision (\w+)>", line))
            assert precisions == {PRECISIONS[precision]}
            kinds = set(re.findall(r"x(f32|bf16)>", line))
            assert kinds == {"bf16" if precision == "bfloat16" else "f32"}
    products = [line for line in train.splitlines() if "stablehlo.dot_general" in line]
    assert bool(products) == (norm not in ("pixel", "none", "dyt"))  # the sums of fast norms
    assert all("HIGHEST" in line for line in products)


def test_eight_nets_in_one_program_lower_too(tiny, monkeypatch):
    train, evaluate, _ = lowered(tiny, "batch", "float32", 8, monkeypatch)
    assert "feature_group_count = 8" in train
    assert "f64" not in train + evaluate
