"""The benchmark: `python -m jaxnorm.bench`. Our training against PyTorch's, alternating in one run.

Each side has a process of its own. They take turns, in an order that changes from round to round,
so that what else the machine does falls on all alike; medians over the rounds are reported, and the
ratio is taken within each round. Imports, compilation and warm-up are outside the timing, and
reported apart. Nothing else should run meanwhile.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import App, Parameter

from jaxnorm import cli
from jaxnorm.bench.worker import IMAGES, Job, Peer
from jaxnorm.config import Setting, UserError

COMMAND = (sys.executable, "-m", "jaxnorm.bench.worker")
"""The command of a side's process."""
QUIET = 0.8
"""The share of the best matrix product's speed below which a round does not count."""

app = App(
    name="python -m jaxnorm.bench",
    help="Time our training against PyTorch's (pip install '.[bench]'), alternating in one run.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The nets and sides to time.

    Parameters
    ----------
    norm
        The norms to time.
    arch
        The nets to time; the residual one by the tuned recipe, crops and flips included.
    batch_size
        The batch sizes to time.
    task
        "train" steps, "evaluate" 10,000 images, or both.
    peers
        The sides to time.
    seconds
        Seconds to spend on each net and batch size, once all sides are warm.
    out
        JSON file to write, with every sample.
    """

    norm: tuple[Literal["batch", "group", "layer"], ...] = ("batch", "group", "layer")
    arch: tuple[Literal["original", "matched", "residual"], ...] = ("original",)
    batch_size: Annotated[tuple[int, ...], cli.WHOLE] = (128,)
    task: tuple[Literal["train", "evaluate"], ...] = ("train",)
    peers: tuple[Peer, ...] = ("jaxnorm", "torch", "torch-compile")
    seconds: float = 60.0
    out: Annotated[Path | None, cli.PATH] = None

    def __post_init__(self) -> None:
        if "jaxnorm" not in self.peers:
            raise UserError("peers= must name jaxnorm, which the others are held against")
        if not 0 < self.seconds < 1e6:
            raise UserError(f"seconds={self.seconds:g} is wrong: it must be above 0")
        if not all(1 <= size <= IMAGES for size in self.batch_size):
            raise UserError(Setting("batch_size"), f" must be from 1 to {IMAGES}")


class Worker:
    """A process that makes a job's steps on demand. It reports how long it took to get ready, or
    why it failed, and then the seconds of a step in every round.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.samples, self.peak_bytes = job, [], 0
        self.start()

    def start(self) -> None:
        """Starts the process, with the compilation cache of the job or none."""
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        job = dataclasses.replace(self.job, spawned=time.time())
        self.ready = self._ask(json.dumps(dataclasses.asdict(job)))
        self.failed: str | None = self.ready.pop("failed", None)

    def seconds_for(self, steps: int) -> float:
        """Returns the seconds of some steps; raises `ChildProcessError` if the process ended."""
        answer = self._ask(str(steps))
        if "failed" in answer:
            raise ChildProcessError(
                f"{self.job.name} stopped between its turns: {answer['failed']}"
            )
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
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
    ceiling = measure_ceiling()
    machine = describe_machine(ceiling)
    print(f"{machine['processor']}: ", end="")
    print(f"{ceiling / 1e9:.0f} GFLOP/s in a 2048 x 2048 matrix product", flush=True)
    comparisons = []
    for task, arch, norm, size in itertools.product(
        options.task, options.arch, options.norm, options.batch_size
    ):
        job = Job("jaxnorm", norm, arch, size, task=task)
        comparisons.append(summarize(compare(options, job), ceiling))
        print(render(comparisons[-1]), flush=True)
        if options.out:
            save(options.out, {"machine": machine, "comparisons": comparisons})
    return 0


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Writes measurements as JSON, whole or not at all."""
    from jaxnorm.storage.directory import RunDirectory

    content = json.dumps(values, indent=1) + "\n"
    RunDirectory(path.parent).write_bytes(path.name, content.encode())


def compare(options: Options, ours: Job) -> list[Worker]:
    """Times all sides of one net in turn until the seconds are spent, at least three rounds;
    PyTorch in both layouts. A side that fails has no samples.

    A round before or after which a matrix product takes a quarter longer than in the best is made
    again, for twice the seconds at most.
    """
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="jaxnorm-bench-") as cache:
        try:
            for job in _sides(options, ours, cache):
                workers.append(worker := Worker(job))
                if job.peer == "jaxnorm":
                    _start_warm(worker)
            sides = [worker for worker in workers if not worker.failed]
            counts: dict[str, int] = {}
            end, rounds, speeds = time.monotonic() + options.seconds, 0, [matrix_speed()]
            while rounds < 3 or time.monotonic() < end:
                first = rounds % len(sides)
                for side in sides[first:] + sides[:first]:
                    _take_turn(side, counts)
                speeds.append(matrix_speed())
                quiet = min(speeds[-2:]) > QUIET * max(speeds)
                if quiet or time.monotonic() > end + options.seconds:
                    rounds += 1
                else:  # it was something else that took the time
                    for side in sides:
                        side.samples.pop()
        finally:
            for worker in workers:
                worker.close()
    return workers


def _sides(options: Options, ours: Job, cache: str) -> Iterator[Job]:
    """Yields the job of each side; `cache` is a folder for our compiled code."""
    for peer in options.peers:
        if peer == "jaxnorm":
            yield dataclasses.replace(ours, compilation_cache=cache)
            continue
        for layout in ("contiguous", "channels_last"):
            yield dataclasses.replace(ours, peer=peer, layout=layout)


def _start_warm(worker: Worker) -> None:
    """Starts our side, which was started without compiled code, once more with that of the first
    time. Raises `UserError` if one of the two starts fails.
    """
    cold = worker.ready
    if not worker.failed:
        worker.close()
        worker.start()
    if worker.failed:
        raise UserError(f"our own side failed: {worker.failed}")
    warm = worker.ready["first_step_seconds"]
    worker.ready = {**cold, "warm_first_step_seconds": warm}


def matrix_speed() -> float:
    """Returns the FLOP/s of a 1024 x 1024 float32 matrix product in this process now: the best of
    five.
    """
    matrix, times = np.ones((1024, 1024), np.float32), []
    for _ in range(5):
        clock = time.perf_counter()
        np.matmul(matrix, matrix)
        times.append(time.perf_counter() - clock)
    return 2 * 1024**3 / min(times)


def _take_turn(side: Worker, counts: dict[str, int]) -> None:
    """Lets a side make as many steps as take about a second."""
    if side.job.name not in counts:
        counts[side.job.name] = max(1, min(200, round(1 / max(side.seconds_for(1), 1e-4))))
    count = counts[side.job.name]
    side.samples.append(side.seconds_for(count) / count)


def step_flops(job: Job) -> float:
    """Returns the floating-point operations of the convolutions in a training step, or in an
    evaluation.

    A step is the outputs and both gradients, the first layer's input gradient left out.
    """
    from jaxnorm.model.cnn import CNN
    from jaxnorm.model.summary import summarize

    rows = summarize(CNN(job.norm, job.arch))
    forward = [2 * row.shape[0] * row.shape[1] * row.kernel for row in rows]
    if job.task == "evaluate":
        return float(IMAGES * sum(forward))
    return float(job.batch_size * (3 * sum(forward) - forward[0]))


def summarize(workers: Sequence[Worker], ceiling: float) -> dict:
    """Returns a comparison as it is written: each side, and our ratio to PyTorch's best side."""
    ours = next(worker for worker in workers if worker.job.peer == "jaxnorm")
    job, flops = ours.job, step_flops(ours.job)
    images = job.batch_size if job.task == "train" else IMAGES
    sides, medians = {}, {}
    for worker in (worker for worker in workers if not worker.failed):
        median = medians[worker.job.name] = statistics.median(worker.samples)
        sides[worker.job.name] = {
            "milliseconds": median * 1e3,
            "images_per_second": images / median,
            "gflop_per_second": flops / median / 1e9,
            "share_of_ceiling": flops / median / ceiling,
            "peak_megabytes": worker.peak_bytes / 1e6,
            **worker.ready,
            "samples_milliseconds": [sample * 1e3 for sample in worker.samples],
        }
    names = ("norm", "arch", "batch_size", "task")
    failed = {worker.job.name: worker.failed for worker in workers if worker.failed}
    result: dict[str, Any] = {name: getattr(job, name) for name in names}
    result |= {"gflop": flops / 1e9, "sides": sides, "failed": failed}
    others = [worker for worker in workers if worker.job.name.startswith("torch")]
    if others := [worker for worker in others if not worker.failed]:
        best = min(others, key=lambda worker: medians[worker.job.name])
        pairs = zip(best.samples, ours.samples, strict=True)
        ratios = sorted(their_seconds / our_seconds for their_seconds, our_seconds in pairs)
        result["ratio"] = {
            "against": best.job.name,
            "median": statistics.median(ratios),
            "lowest_and_highest": [ratios[0], ratios[-1]],
            "rounds": len(ratios),
        }
    return result


def render(comparison: dict) -> str:
    """Returns a comparison as a table in plain text."""
    from jaxnorm.analysis.tables import Table

    unit = "step" if comparison["task"] == "train" else "10,000 images"
    title = f"\n{comparison['arch']} {comparison['norm']}, batch {comparison['batch_size']}"
    columns = {
        "ms": ("milliseconds", ".1f"),
        "images/s": ("images_per_second", ",.0f"),
        "GFLOP/s": ("gflop_per_second", ".1f"),
        "of ceiling": ("share_of_ceiling", ".0%"),
        "peak MB": ("peak_megabytes", ".0f"),
        "first step s": ("first_step_seconds", ".1f"),
        "warm s": ("warm_first_step_seconds", ".1f"),
    }
    rows = [
        [name, *(format(side[key], how) if side.get(key) else "" for key, how in columns.values())]
        for name, side in comparison["sides"].items()
    ]
    notes = [f"{name} failed: {why}" for name, why in comparison["failed"].items()]
    if ratio := comparison.get("ratio"):
        low, high = ratio["lowest_and_highest"]
        notes.append(
            f"ours is {ratio['median']:.2f} times as fast as {ratio['against']}, the best of "
            f"PyTorch ({low:.2f} to {high:.2f} over {ratio['rounds']} rounds)"
        )
    table = Table(title, ["side", *columns], rows, "\n".join(notes))
    return f"{title}, {comparison['gflop']:.2f} GFLOP a {unit}\n{table.plain()}"


def measure_ceiling() -> float:
    """Returns the FLOP/s of a 2048 x 2048 float32 matrix product: the best of ten, in a fresh
    process.
    """
    code = (
        "import time, jax, jax.numpy as jnp\n"
        "a = jnp.ones((2048, 2048)); f = jax.jit(lambda a: a @ a); best = 1e9\n"
        "for _ in range(11):\n"
        "    clock = time.perf_counter(); jax.block_until_ready(f(a))\n"
        "    best = min(best, time.perf_counter() - clock)\n"
        "print(2 * 2048**3 / best)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"the matrix product ended with {done.returncode}")
    return float(done.stdout)


def describe_machine(ceiling: float) -> dict[str, Any]:
    """Returns the machine, the versions and the time of the measurement."""
    from jaxnorm.runs.environment import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "matrix_product_gflop_per_second": ceiling / 1e9,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(cli.run(app))
