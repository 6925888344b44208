"""The benchmark's arithmetic, and its mistakes; it never times anything here."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import end_to_end
import fill_pages
import jax
import numpy as np
import profile_step as profiling
import pytest

from jaxnorm import cli
from jaxnorm.bench import __main__ as bench
from jaxnorm.bench import worker as peers
from jaxnorm.bench.worker import IMAGES, Job, batches_of, draw_data
from jaxnorm.model.summary import count_parameters, net_of


def call(*arguments) -> int:
    return cli.run(bench.app, [str(argument) for argument in arguments])


def job_of(batch_size, **changes):
    return Job("jaxnorm", "group", "original", batch_size, **changes)


def side(peer, layout, samples, failed=None):
    worker = bench.Worker.__new__(bench.Worker)
    worker.job, worker.failed = Job(peer, "batch", "original", 128, layout), failed
    worker.samples, worker.peak_bytes = list(samples), 10**9
    worker.ready = {"about": {"device": "cpu"}, "first_step_seconds": 4.0}
    worker.ready["warm_first_step_seconds"] = 3.0
    return worker


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


def test_the_ratio_is_taken_within_each_round_against_the_fastest_variant():
    ours = side("jaxnorm", "contiguous", [0.1, 0.2, 0.1])
    slow = side("torch", "contiguous", [0.9, 0.9, 0.9])
    fast = side("torch", "channels_last", [0.2, 0.6, 0.3])
    failed = side("torch-compile", "contiguous", [], "no")
    result = bench.summarize([ours, slow, fast, failed], 1e11)
    ratio, one = result["ratio"], result["sides"]["jaxnorm"]
    assert ratio["against"] == "torch channels_last"
    assert [ratio["median"], *ratio["lowest_and_highest"]] == pytest.approx([3, 2, 3])
    assert (one["milliseconds"], one["images_per_second"]) == pytest.approx((100, 1280))
    flops = bench.step_flops(ours.job)
    assert one["share_of_ceiling"] == pytest.approx(flops / 0.1 / 1e11)
    text = bench.render(result)
    assert "ours is 3.00 times as fast as torch channels_last" in text
    assert "torch-compile" in text


def test_a_written_benchmark_becomes_a_table():
    sides = [side("jaxnorm", "contiguous", [0.1, 0.2]), side("torch", "contiguous", [0.3, 0.3])]
    sides[0].ready["about"]["jax"], sides[1].ready["about"]["torch"] = "1.2", "3.4"
    comparison = bench.summarize(sides, 1e11)
    values = {"machine": bench.describe_machine(2e11), "comparisons": [comparison]}
    table = fill_pages.speed(json.loads(json.dumps(values))).markdown()
    for words in (
        "| original batch | 128 | 150.0 |",
        "300.0 (torch contiguous)",
        "2.25 (1.50 to 3.00)",
        "over 2 rounds in turns, the ratio within each round (lowest to highest)",
        "jax 1.2, torch 3.4",
    ):
        assert words in table


def test_two_numbers_of_epochs_say_what_twenty_take():
    """Ours takes 50 s and 80 s an epoch, PyTorch's 10 s and 160 s."""
    values = {"machine": bench.describe_machine(2e11), "epochs": [1, 2]}
    table = end_to_end.table({**values, "seconds": {"jaxnorm": [130, 210], "torch": [170, 330]}})
    assert table.rows[0] == ["jaxnorm", "130", "210", "80", "50", "1650"]
    assert table.rows[1] == ["torch", "170", "330", "160", "10", "3210"]
    assert table.rows[2][1:] == ["1.31", "1.57", "2.00", "0.20", "1.95"]


def test_sides_take_turns_to_the_end_of_each(tmp_path, monkeypatch):
    """Each side ends once the other has begun, and none goes on before the one in front stands."""
    monkeypatch.setattr(end_to_end, "TURN", 0.02)
    sent, killpg = [], os.killpg
    monkeypatch.setattr(os, "killpg", lambda *to: (sent.append(to), killpg(*to)))
    wait = (
        "import pathlib, sys, time\n"
        "mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
        "sys.exit(not any(other.exists() or time.sleep(0.01) for _ in range(6000)))\n"
    )
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    commands = {"one": ["-c", wait, one, two], "two": ["-c", wait, two, one]}
    seconds = end_to_end.seconds_of(commands, str(tmp_path))
    assert seconds.keys() == commands.keys()
    assert min(seconds.values()) > 0
    for i, (process, number) in enumerate(sent[:-1]):
        ended = process not in {later for later, _ in sent[i + 1 :]}
        assert number == signal.SIGSTOP or ended or sent[i + 1] == (process, signal.SIGSTOP)


def test_a_side_that_fails_ends_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "TURN", 0.02)
    waits = ["-c", "import time; time.sleep(600)"]
    commands = {"fails": ["-c", "raise SystemExit(3)"], "waits": waits}
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        end_to_end.seconds_of(commands, str(tmp_path))


def test_the_profile_names_layer_direction_and_operator():
    hlo = """
  %while.3 = (s32[]) while(%tuple), metadata={op_name="jit(f)/while"}
  %fusion.1 = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/transpose(jvp(CNN))/C2/transpose"}
  ROOT %x.2 = f32[2]{0} convolution(%p), metadata={op_name="jvp(CNN)/C10/conv_general_dilated"}
  %y = f32[2]{0} fusion(%p), metadata={op_name="jit(f)/transpose(jvp(CNN))/C1_norm/reduce_sum"}
"""
    lines = profiling.instructions_of(hlo).items()
    assert {name: profiling.origin_of(line) for name, line in lines} == {
        "fusion.1": ("C2", "backward", "transpose"),
        "x.2": ("C10", "forward", "convolution"),
        "y": ("C1_norm", "backward", "sum"),
    }
    text = profiling.render(profiling.Profile(job_of(128), 80.0, {("C2", "backward", "sum"): 1.5}))
    assert text.splitlines()[1].split() == ["1.50", "ms", "C2", "backward", "sum"]


def test_profiles_are_a_column_a_norm_with_their_sums():
    operators = {("C2", "back", "sum"): 1.5, ("C3", "forward", "sum"): 2.0, ("", "", "pad"): 4.0}
    one = profiling.kinds(profiling.Profile(job_of(128), 80.0, operators))
    values = {"machine": bench.describe_machine(2e11), "arch": "matched", "batch_size": 128}
    other = {"clock": 70.0, "operators": {"sum": 3.0}}
    table = profiling.table({**values, "profiles": {"batch": one, "group": other}})
    assert table.head == ["operator", "batch", "group"]
    assert table.rows[:2] == [["pad", "4.0", "0.0"], ["sum", "3.5", "3.0"]]
    assert table.rows[2] == ["all operators", "7.5", "3.0"]
    assert table.rows[3] == ["a step on the clock", "80.0", "70.0"]


@pytest.mark.parametrize(
    "arguments",
    [
        *("--norm weight", "--arch resnet", "--peers torch", "--seconds 0"),
        *("--batch-size 0", "--batch-size 10001", "--task sleep"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys):
    assert call(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


FAKE = """if True:
    import json, os, pathlib, signal, sys
    job = json.loads(sys.stdin.readline())
    peer, size, cache = job["peer"], job["batch_size"], job["compilation_cache"]
    started = pathlib.Path(cache or "", "started")
    if peer == "torch-compile" or size == 1 or (size == 2 and cache and started.exists()):
        sys.exit(print(json.dumps({"failed": "it does not compile"})))
    if cache:
        started.touch()
    print(json.dumps({"about": {"device": "cpu x2"}, "first_step_seconds": 1.0}), flush=True)
    for turn, line in enumerate(sys.stdin):
        if peer == "torch" and size == 3 and turn == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = int(line) * (0.02 if peer == "torch" else 0.01)
        print(json.dumps({"seconds": seconds, "peak_bytes": 1}), flush=True)
"""
"""A side whose steps take a hundredth of a second, PyTorch's two; some batch sizes fail."""


@pytest.fixture
def fake_sides(monkeypatch):
    """Replaces the processes of all sides; returns a list of those that were started."""
    started, popen = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(bench.subprocess, "Popen", start)
    monkeypatch.setattr(bench, "COMMAND", (sys.executable, "-S", "-c", FAKE))
    monkeypatch.setattr(bench, "measure_ceiling", lambda: 1e11)
    return started


FEW = ("--norm", "layer", "--seconds", "0.01", "--peers", "jaxnorm", "torch", "torch-compile")


def test_a_comparison_is_printed_and_written(tmp_path, fake_sides, capsys):
    assert call(*FEW, "--out", tmp_path / "x.json") == 0
    assert len(fake_sides) == 6  # ours twice, PyTorch's in two layouts
    assert all(process.returncode is not None for process in fake_sides)
    printed = capsys.readouterr().out
    assert "ours is 2.00 times as fast as torch contiguous" in printed
    assert "it does not compile" in printed
    (comparison,) = json.loads((tmp_path / "x.json").read_text())["comparisons"]
    samples = comparison["sides"]["jaxnorm"]["samples_milliseconds"]
    assert samples == pytest.approx([10] * len(samples))
    assert len(samples) >= 3


@pytest.mark.parametrize(
    ("size", "code", "message"),
    [
        (1, 2, "our own side failed: it does not compile"),
        (2, 2, "our own side failed: it does not compile"),  # when it is started again
        (3, 1, "torch contiguous stopped between its turns: the process ended with -9"),
    ],
)
def test_a_side_that_fails_or_is_killed_is_one_line(fake_sides, capsys, size, code, message):
    assert call(*FEW, "--batch-size", size) == code
    assert capsys.readouterr().err == f"error: {message}\n"
    assert all(process.returncode is not None for process in fake_sides)


def test_a_side_that_cannot_be_had_says_why():
    """A job that no process can do."""
    worker = bench.Worker(Job("jaxnorm", "no such norm", "original", 128))
    worker.close()
    assert "no such norm" in (worker.failed or "")


def test_a_round_on_a_busy_machine_is_made_again(fake_sides, monkeypatch):
    """The second round ends slow, and the third begins so: both are dropped from every side."""
    speeds = iter([100, 100, 70, 100, *[90] * 10**4])
    monkeypatch.setattr(bench, "matrix_speed", lambda: next(speeds))
    made = []
    monkeypatch.setattr(bench, "_take_turn", lambda side, _: side.samples.append(made.append(1)))
    clock = iter(range(10**4))
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    options = bench.Options(peers=("jaxnorm", "torch"), seconds=20)
    workers = bench.compare(options, Job("jaxnorm", "layer", "original", 128))
    kept = {len(worker.samples) for worker in workers}
    assert kept == {len(made) // 3 - 2}


@pytest.mark.slow
def test_the_ceiling_is_that_of_a_processor():
    assert 1e8 < bench.measure_ceiling() < 1e15


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(peers, "IMAGES", 32)


def test_our_side_makes_steps_on_the_drawn_batches(few_images):
    job = Job("jaxnorm", "layer", "three-layers", 16)
    arrays = jax.device_get(peers.jax_setup(job)[3])
    for ours, wanted in zip(arrays, (*draw_data(), batches_of(16)[None]), strict=False):
        np.testing.assert_array_equal(ours, wanted)
    for task in ("train", "evaluate"):
        stepper, about = peers.jax_stepper(dataclasses.replace(job, task=task))
        stepper(3)
        assert "jax" in about


@pytest.mark.parametrize(
    ("norm", "arch"), [("group", "original"), ("layer", "original"), ("batch", "residual")]
)
def test_pytorchs_side_makes_steps_of_a_net_of_the_same_size(few_images, monkeypatch, norm, arch):
    """On the drawn batches too, which `original` neither crops nor mirrors."""
    torch = pytest.importorskip("torch")
    config, seen = peers.config_of(Job("torch", norm, arch, 16)), []
    net = peers.torch_net(config)
    count = sum(weight.numel() for weight in net.parameters())
    assert count == count_parameters(net_of(config, norm, 10))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    monkeypatch.setattr(peers, "torch_net", lambda config: net)
    for task in ("train", "evaluate"):
        stepper, about = peers.torch_stepper(Job("torch", norm, arch, 16, task=task))
        stepper(2)
        assert about["device"] == "cpu"
    if arch == "original":
        chosen = draw_data()[0][batches_of(16)[0]]
        wanted = (chosen / 255 - peers.MEAN) / peers.DEVIATION
        np.testing.assert_allclose(seen[0].permute(0, 2, 3, 1).numpy(), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile has many of its own
@pytest.mark.parametrize("arch", ["original", "residual"])
def test_pytorchs_net_can_be_compiled(few_images, arch):
    """Else only the eager variants would be held against ours."""
    pytest.importorskip("torch")
    stepper, _ = peers.torch_stepper(Job("torch-compile", "batch", arch, 16))
    stepper(1)


@pytest.mark.slow
def test_a_profile_finds_the_time_of_a_step(few_images, monkeypatch):
    monkeypatch.setattr(profiling, "STEPS", 2)
    profile = profiling.profile(Job("jaxnorm", "layer", "original", 16))
    assert profile.step_milliseconds > 0
    assert sum(profile.operators.values()) > 0
    assert "C2" in {layer for layer, _, _ in profile.operators}
