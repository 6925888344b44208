"""The benchmark: `python -m jaxnorm.bench`. Our training against PyTorch's, alternating in one run.

Each side has a process of its own. They take turns, in an order that changes from round to round,
so that what else the machine does falls on all alike; medians over the rounds are reported, and the
ratio is taken within each round. Imports, compilation and warm-up are outside the timing, and told
apart. Nothing else should run meanwhile.
"""

import dataclasses
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, Parameter

from jaxnorm import cli
from jaxnorm.bench.worker import IMAGES, Job, Peer
from jaxnorm.config import ALL, UserError

app = App(
    name="python -m jaxnorm.bench",
    help="Time our training against PyTorch's (pip install '.[bench]'), alternating in one run.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time.

    Parameters
    ----------
    norm
        The norms to time.
    arch
        The nets to time.
    batch_size
        The batch sizes to time.
    seeds
        How many nets to train, a step of each.
    task
        "train" steps, "evaluate" 10,000 images, or both.
    peers
        The sides to time; "jaxnorm-vmap" trains its seeds in one program, "flax" is our net from
        Flax's plain operators.
    seconds
        Seconds to spend on each net and batch size, once all sides are warm.
    out
        JSON file to write, with every sample.
    profile
        Tell where a training step's time goes, by layer and operator, instead of comparing.
    """

    norm: tuple[str, ...] = ALL
    arch: tuple[str, ...] = ("original",)
    batch_size: tuple[int, ...] = (128,)
    seeds: tuple[int, ...] = (1,)
    task: tuple[Literal["train", "evaluate"], ...] = ("train",)
    peers: tuple[Peer, ...] = ("jaxnorm", "torch", "torch-compile")
    seconds: float = 60.0
    out: Path | None = None
    profile: bool = False

    def __post_init__(self) -> None:
        choices = {
            "norm": ALL,
            "arch": ("original", "matched"),
            "task": ("train", "evaluate"),
            "peers": get_args(Peer),
        }
        for name, allowed in choices.items():
            for value in getattr(self, name):
                if value not in allowed:
                    raise UserError(f"{name}={value} is wrong: choose from {', '.join(allowed)}")
        if "jaxnorm" not in self.peers:
            raise UserError("peers= must name jaxnorm, which the others are held against")
        if not 0 < self.seconds < 1e6:
            raise UserError(f"seconds={self.seconds:g} is wrong: it must be above 0")
        if not all(1 <= size <= IMAGES for size in self.batch_size):
            raise UserError(f"batch_size= must be from 1 to {IMAGES}")
        if not all(1 <= count <= 1000 for count in self.seeds):
            raise UserError("seeds= must be from 1 to 1000")


@dataclass
class Timing:
    """One side of a comparison: what it took to get ready, and seconds a step in every round."""

    job: Job
    about: dict[str, str]
    start_seconds: float
    compile_seconds: float
    first_step_seconds: float
    warm_first_step_seconds: float | None = None
    samples: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Seconds a step (or an evaluation of 10,000 images)."""
        return statistics.median(self.samples)


class Worker:
    """A process that makes steps when it is told to. It starts without compiled code of earlier
    ones, unless `job.compilation_cache` holds some.
    """

    def __init__(self, job: Job) -> None:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxnorm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.timing: Timing | None = None
        answer = self._ask(dataclasses.replace(job, spawned=time.time()).to_line())
        self.failed: str | None = answer.pop("failed", None)
        if self.failed is None:
            self.timing = Timing(job, **answer)

    def seconds_for(self, steps: int) -> float:
        """The time of so many steps."""
        answer = self._ask(str(steps))
        if self.timing is not None:
            self.timing.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self.close()
            return {"failed": f"the process ended with {self._process.returncode}"}

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


@app.default
def main(
    *,
    options: Annotated[
        Options, Parameter(name="*", negative_iterable=(), consume_multiple=True)
    ] = Options(),
) -> int:
    """Times each net and batch size, prints a table for each, and writes the JSON."""
    if options.profile:
        from jaxnorm.bench import profile as profiling

        for arch, norm, size in itertools.product(options.arch, options.norm, options.batch_size):
            print(profiling.render(profiling.profile(Job("jaxnorm", norm, arch, size))))
        return 0
    ceiling = measure_ceiling()
    print(f"{describe_processor()}, {os.cpu_count()} cores: ", end="")
    print(f"{ceiling / 1e9:.0f} GFLOP/s in a 2048 x 2048 matrix product", flush=True)
    comparisons = []
    for task, arch, norm, size, seeds in itertools.product(
        options.task, options.arch, options.norm, options.batch_size, options.seeds
    ):
        timings, failures = compare(
            options, Job("jaxnorm", norm, arch, size, task=task, seeds=seeds)
        )
        comparison = summarize(timings, failures, ceiling)
        comparisons.append(comparison)
        print(render(comparison), flush=True)
        if options.out:
            write(options.out, {"machine": describe_machine(ceiling), "comparisons": comparisons})
    return 0


def jobs_of(options: Options, ours: Job) -> list[Job]:
    """The sides of one comparison; PyTorch in both layouts."""
    jobs = []
    for peer in options.peers:
        for layout in (
            ("contiguous", "channels_last") if peer.startswith("torch") else (ours.layout,)
        ):
            jobs.append(dataclasses.replace(ours, peer=peer, layout=layout))
    return jobs


def compare(options: Options, ours: Job) -> tuple[list[Timing], dict[str, str]]:
    """Times all sides of one net in turn until the seconds are spent, at least three rounds.

    Our own side starts twice, without compiled code and with that of the first time.
    """
    workers, failures = [], {}
    cache = tempfile.TemporaryDirectory(prefix="jaxnorm-bench-")
    try:
        for job in jobs_of(options, ours):
            cold = None
            if job.peer == "jaxnorm":
                job = dataclasses.replace(job, compilation_cache=cache.name)
                first = Worker(job)
                cold = first.timing
                first.close()
            worker = Worker(job)
            workers.append(worker)
            if worker.timing is not None and cold is not None:
                worker.timing.warm_first_step_seconds = worker.timing.first_step_seconds
                worker.timing.first_step_seconds = cold.first_step_seconds
                worker.timing.compile_seconds = cold.compile_seconds
            if worker.failed is not None:
                failures[job.name] = worker.failed
        ready = [worker for worker in workers if worker.timing is not None]
        names = [worker.timing.job.peer for worker in ready if worker.timing]
        if "jaxnorm" not in names:
            raise UserError(f"our own side failed: {failures.get('jaxnorm')}")
        counts = {}
        for worker in ready:  # as many steps as take about a second
            once = worker.seconds_for(1)
            counts[worker] = max(1, min(200, round(1 / max(once, 1e-4))))
        end, rounds = time.monotonic() + options.seconds, 0
        while rounds < 3 or time.monotonic() < end:
            turn = rounds % len(ready)
            for worker in ready[turn:] + ready[:turn]:
                seconds = worker.seconds_for(counts[worker]) / counts[worker]
                assert worker.timing is not None
                worker.timing.samples.append(seconds)
            rounds += 1
    finally:
        for worker in workers:
            worker.close()
        cache.cleanup()
    return [worker.timing for worker in ready if worker.timing], failures


def step_flops(job: Job) -> float:
    """Floating-point operations of the convolutions in a training step of all seeds, or in an
    evaluation.

    A step is the outputs and both gradients, the first layer's input gradient left out.
    """
    from jaxnorm.model.cnn import CNN
    from jaxnorm.model.summary import summarize

    forward = [
        2 * row.shape[0] * row.shape[1] * row.kernel for row in summarize(CNN(job.norm, job.arch))
    ]
    if job.task == "evaluate":
        return float(IMAGES * sum(forward))
    return float(job.seeds * job.batch_size * (3 * sum(forward) - forward[0]))


def summarize(timings: Sequence[Timing], failures: dict[str, str], ceiling: float) -> dict:
    """A comparison as it is written: each side, and our ratio to PyTorch's fastest variant."""
    ours = next(timing for timing in timings if timing.job.peer == "jaxnorm")
    flops = step_flops(ours.job)
    images = ours.job.batch_size * ours.job.seeds if ours.job.task == "train" else IMAGES
    sides = {}
    for timing in timings:
        sides[timing.job.name] = {
            "milliseconds": timing.median * 1e3,
            "images_per_second": images / timing.median,
            "gflop_per_second": flops / timing.median / 1e9,
            "share_of_ceiling": flops / timing.median / ceiling,
            "peak_megabytes": timing.peak_bytes / 1e6,
            "start_seconds": timing.start_seconds,
            "compile_seconds": timing.compile_seconds,
            "first_step_seconds": timing.first_step_seconds,
            "warm_first_step_seconds": timing.warm_first_step_seconds,
            "about": timing.about,
            "samples_milliseconds": [sample * 1e3 for sample in timing.samples],
        }
    result = {**asdict(ours.job), "gflop": flops / 1e9, "sides": sides, "failed": failures}
    for name in ("peer", "layout", "compilation_cache", "spawned"):
        del result[name]
    others = [timing for timing in timings if timing.job.peer.startswith("torch")]
    if others:
        best = min(others, key=lambda timing: timing.median)
        pairs = zip(best.samples, ours.samples, strict=True)
        ratios = sorted(theirs / own for theirs, own in pairs)
        spread = [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]]
        result["ratio"] = {
            "against": best.job.name,
            "median": statistics.median(ratios),
            "10th_and_90th_percentile": spread,
            "rounds": len(ratios),
        }
    return result


def render(comparison: dict) -> str:
    """A comparison as a table for a person."""
    unit = "step" if comparison["task"] == "train" else "10,000 images"
    title = f"\n{comparison['arch']} {comparison['norm']}, batch {comparison['batch_size']}"
    if comparison["seeds"] > 1:
        title += f", {comparison['seeds']} seeds"
    lines = [f"{title}, {comparison['gflop']:.2f} GFLOP a {unit}"]
    columns = ("", "ms", "images/s", "GFLOP/s", "of ceiling", "peak MB", "first step s", "warm s")
    widths = (28, 9, 11, 9, 12, 9, 14, 8)
    rows: list[tuple[str, ...]] = [columns]
    for name, side in comparison["sides"].items():
        rows.append(
            (
                name,
                f"{side['milliseconds']:.1f}",
                f"{side['images_per_second']:,.0f}",
                f"{side['gflop_per_second']:.1f}",
                f"{side['share_of_ceiling']:.0%}",
                f"{side['peak_megabytes']:.0f}",
                f"{side['first_step_seconds']:.1f}",
                f"{warm:.1f}" if (warm := side["warm_first_step_seconds"]) else "",
            )
        )
    for first, *others in rows:
        cells = [f"{other:>{width}}" for other, width in zip(others, widths[1:], strict=True)]
        lines.append(f"{first:<{widths[0]}}" + "".join(cells))
    lines += [f"{name:<28} failed: {why}" for name, why in comparison["failed"].items()]
    if ratio := comparison.get("ratio"):
        low, high = ratio["10th_and_90th_percentile"]
        lines.append(
            f"ours is {ratio['median']:.2f} times as fast as {ratio['against']}, the best of "
            f"PyTorch ({low:.2f} to {high:.2f} over {ratio['rounds']} rounds)"
        )
    return "\n".join(lines)


def measure_ceiling() -> float:
    """FLOP/s of a 2048 x 2048 float32 matrix product here: the best of ten, in a fresh process."""
    code = (
        "import time, jax, jax.numpy as jnp\n"
        "a = jnp.ones((2048, 2048)); f = jax.jit(lambda a: a @ a); best = 1e9\n"
        "for _ in range(11):\n"
        "    clock = time.perf_counter(); jax.block_until_ready(f(a))\n"
        "    best = min(best, time.perf_counter() - clock)\n"
        "print(2 * 2048**3 / best)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def describe_processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine(ceiling: float) -> dict[str, Any]:
    """Where and when the figures were taken."""
    return {
        "processor": describe_processor(),
        "cores": os.cpu_count(),
        "matrix_product_gflop_per_second": ceiling / 1e9,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """Writes the JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    cli.leave(cli.run(app))
