"""The benchmark's arithmetic, and its mistakes; it never times anything here."""

import json

import numpy as np
import pytest

from jaxnorm import bench, cli, profiling, tables
from jaxnorm.config import UserError
from jaxnorm.peers import IMAGES, Job, batches_of, draw_data


def call(*arguments) -> int:
    return cli.run(bench.app, [str(argument) for argument in arguments])


def job_of(batch_size, **changes):
    return Job("jaxnorm", "group", "original", batch_size, **changes)


def timing(peer, layout, samples, norm="batch"):
    job = Job(peer, norm, "original", 128, layout)
    return bench.Timing(job, {"device": "cpu"}, 1.0, 2.0, 4.0, 3.0, list(samples), 10**9)


def test_a_step_of_the_studys_nets_is_counted_by_hand():
    """C1 of the group net: 30 x 30 outputs of 16 channels, each 27 products and sums."""
    forward = bench.step_flops(job_of(1, task="evaluate")) / IMAGES
    first = 2 * 30 * 30 * 16 * 27
    layers = [
        *(first, 2 * 28 * 28 * 32 * 144, 2 * 28 * 28 * 8 * 32),
        *(2 * 14 * 14 * 16 * 72, 2 * 14 * 14 * 32 * 144, 2 * 14 * 14 * 64 * 288),
        *(2 * 14 * 14 * 8 * 64, 2 * 7 * 7 * 16 * 72, 2 * 7 * 7 * 32 * 144),
        *(2 * 5 * 5 * 32 * 288, 2 * 10 * 32),
    ]
    assert forward == sum(layers)
    assert bench.step_flops(job_of(128)) == 128 * (3 * sum(layers) - first)
    assert bench.step_flops(job_of(128, seeds=4)) == 4 * bench.step_flops(job_of(128))


def test_the_ratio_is_taken_within_each_round_against_the_fastest_variant():
    ours = timing("jaxnorm", "contiguous", [0.1, 0.2, 0.1])
    slow = timing("torch", "contiguous", [0.9, 0.9, 0.9])
    fast = timing("torch", "channels_last", [0.2, 0.6, 0.3])
    result = bench.summarize([ours, slow, fast], {"torch-compile": "no"}, 1e11)
    ratio = result["ratio"]
    assert ratio["against"] == "torch channels_last"
    assert ratio["median"] == pytest.approx(3.0)
    assert ratio["10th_and_90th_percentile"] == pytest.approx([2.0, 3.0])
    side = result["sides"]["jaxnorm"]
    assert side["milliseconds"] == pytest.approx(100)
    assert side["images_per_second"] == pytest.approx(1280)
    flops = bench.step_flops(ours.job)
    assert side["share_of_ceiling"] == pytest.approx(flops / 0.1 / 1e11)
    text = bench.render(result)
    assert "ours is 3.00 times as fast as torch channels_last" in text
    assert "torch-compile" in text
    json.dumps(result)


def test_a_written_benchmark_reads_back_as_a_table(tmp_path):
    sides = [timing("jaxnorm", "contiguous", [0.1, 0.2]), timing("torch", "contiguous", [0.3, 0.3])]
    sides[0].about["jax"], sides[1].about["torch"] = "1.2", "3.4"
    comparison = bench.summarize(sides, {}, 1e11)
    bench.write(
        tmp_path / "x.json", {"machine": bench.describe_machine(2e11), "comparisons": [comparison]}
    )
    table = tables.speed(tables.read_benchmark(tmp_path / "x.json")).markdown()
    assert "| original batch | 128 | 1 | 150.0 |" in table
    assert "300.0 (torch contiguous)" in table
    assert "2 to 2 rounds" in table
    assert "jax 1.2, torch 3.4" in table
    (tmp_path / "x.json").write_text('{"comparisons": []}')
    with pytest.raises(UserError, match="cannot be read"):
        tables.read_benchmark(tmp_path / "x.json")


def test_the_profile_names_layer_direction_and_operator():
    hlo = """
  %while.3 = (s32[]) while(%tuple), metadata={op_name="jit(f)/while"}
  %fusion.1 = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/transpose(jvp(CNN))/C2/transpose"}
  ROOT %x.2 = f32[2]{0} convolution(%p), metadata={op_name="jvp(CNN)/C10/conv_general_dilated"}
  %y = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/transpose(jvp(CNN))/C1_norm/reduce_sum"}
"""
    found = {
        name: profiling.origin_of(line) for name, line in profiling.instructions_of(hlo).items()
    }
    assert found == {
        "fusion.1": ("C2", "backward", "transpose"),
        "x.2": ("C10", "forward", "convolution"),
        "y": ("C1_norm", "backward", "sum"),
    }
    text = profiling.render(profiling.Profile(job_of(128), 80.0, {("C2", "backward", "sum"): 1.5}))
    assert text.splitlines()[1].split() == ["1.50", "ms", "C2", "backward", "sum"]


def test_both_sides_take_the_same_batches():
    batches = batches_of(128)
    assert batches.shape == (78, 128)
    assert len(np.unique(batches)) == batches.size
    images, labels = draw_data()
    assert images.shape == (IMAGES, 32, 32, 3)
    assert labels.max() == 9


@pytest.mark.parametrize(
    "arguments",
    [
        ("--norm", "weight"),
        ("--arch", "resnet"),
        ("--peers", "torch"),
        ("--seconds", "0"),
        ("--batch-size", "0"),
        ("--batch-size", "10001"),
        ("--task", "sleep"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_side_that_cannot_be_had_is_told(monkeypatch):
    """A job that no process can do: the worker says why, and the comparison says that."""
    worker = bench.Worker(Job("jaxnorm", "no such norm", "original", 128))
    assert worker.failed is not None
    assert worker.timing is None
    worker.close()
