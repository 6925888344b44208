"""What the study does on a GPU, by one command of at most nine minutes:

    python notebooks/tools/gpu.py --out gpu
    python notebooks/tools/gpu.py --out gpu --wheels wheels      # without a network
    JAX_PLATFORMS=cpu python notebooks/tools/gpu.py --out gpu --rehearse

For a machine that has JAX and PyTorch for its GPU already; what else is missing is installed from a
folder of wheels (`pip download -d wheels .` on a machine that has a network). Then come the tests
marked `gpu`; 20 epochs of the study's three nets, with XLA's own choice of what becomes a CUDA
graph, and with convolutions and loops in one as well; eight seeds of each norm in one program,
against one after the other; and PyTorch eager, compiled, and with CUDA graphs. Each part has a
limit, and `gpu.json` is written after each; what a part printed is beside it. `--rehearse` takes
few images and epochs, and has ten times the time.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cyclopts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 540.0
"""The time for all parts."""
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE"
"""Not COLLECTIVES; by default XLA captures no convolution."""
IMAGES = """
import sys
import numpy as np
path, *counts = sys.argv[1:]
draw, arrays = np.random.default_rng(0), {}
for part, count in zip(("train", "test"), map(int, counts)):
    labels = np.arange(count, dtype=np.int32) % 10
    images = draw.integers(0, 200, (count, 32, 32, 3), np.uint8)
    images[np.arange(count), 3 * labels] += 50
    arrays |= {f"{part}_images": images, f"{part}_labels": labels}
np.savez(path, **arrays)
"""
"""Ten classes of noise with a brighter row, as many as CIFAR-10 has."""
app = cyclopts.App(help_format="plaintext")


@app.default
def main(*, out: Path, wheels: Path | None = None, rehearse: bool = False) -> None:
    """Runs every part, and writes what they took to `out`/gpu.json."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    slower = 10 if rehearse else 1
    ends = time.monotonic() + SECONDS * slower
    results: dict[str, Any] = {"rehearsal": rehearse, "parts": {}}
    for name, seconds, command, environment in parts(out, wheels, rehearse):
        left = min(seconds * slower, ends - time.monotonic())
        print(f"{name}, at most {max(left, 0):.0f} s", flush=True)
        results["parts"][name] = run(out / f"{name}.log", command, environment, left)
        results |= measured(out, rehearse)
        (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def parts(
    out: Path, wheels: Path | None, rehearse: bool
) -> Iterator[tuple[str, float, list[str], dict[str, str]]]:
    """Yields the name of each part, its most seconds, its command and its environment."""
    python, site = sys.executable, out / "site"
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")])
    }
    if wheels:
        install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site]
        yield "install", 40, [python, *map(str, [*install, *sorted(wheels.glob("*.whl"))])], {}
    images, counts = out / "images.npz", ["640", "128"] if rehearse else ["50000", "10000"]
    yield "images", 20, [python, "-c", IMAGES, str(images), *counts], {}
    yield "tests", 90, [python, "-m", "pytest", "-m", "gpu", "-n0", "-q", str(ROOT)], paths
    epochs, seeds = ("1", "2") if rehearse else ("20", "8")
    train = [python, "-m", "jaxnorm.run", "--dataset", str(images), "--epochs"]
    flags = os.environ.get("XLA_FLAGS", "")
    for name, more in (("train", ""), ("train-buffers", COMMAND_BUFFERS)):
        if rehearse and more:  # a CPU's XLA knows no such flag
            continue
        command = [*train, epochs, "--out", str(out / name)]
        yield name, 115, command, {**paths, "XLA_FLAGS": f"{flags} {more}".strip()}
    few = "1" if rehearse else "3"
    command = [*train, few, "--seeds", seeds, "--out", str(out / "seeds")]
    yield "seeds", 60, command, paths
    peers = ["jaxnorm", "torch", "torch-compile", "torch-graphs"]
    bench = ["--seconds", "0.1" if rehearse else "2", "--peers", *peers]
    bench += ["--norm", "layer"] if rehearse else ["--arch", "original", "residual"]
    command = [python, "-m", "jaxnorm.bench", *bench, "--out", str(out / "bench.json")]
    yield "bench", 100, command, paths


def run(log: Path, command: list[str], environment: dict[str, str], seconds: float) -> Any:
    """Runs a part; returns its exit code, or None if it took too long, and its seconds."""
    clock, code = time.monotonic(), None
    with log.open("w") as file:
        if seconds > 0:
            try:
                code = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    timeout=seconds,
                    cwd=log.parent,
                ).returncode
            except subprocess.TimeoutExpired:
                file.write(f"stopped after {seconds:.0f} s\n")
    return {"exit code": code, "seconds": round(time.monotonic() - clock, 1)}


def measured(out: Path, rehearsal: bool) -> dict[str, Any]:
    """Returns the median seconds that a net trained for an epoch, by run and norm, without the
    first epoch, which compiles; and the benchmark's ratios.
    """
    seconds: dict[str, dict[str, float]] = {}
    for lines in out.glob("*/metrics.jsonl"):
        norms: dict[str, list[float]] = {}
        for line in map(json.loads, lines.read_text().splitlines()):
            if line.get("epoch", 0) > (0 if rehearsal else 1):
                norms.setdefault(line["norm"], []).append(line["train_seconds"])
        seconds[lines.parent.name] = {
            norm: round(statistics.median(each), 4) for norm, each in norms.items()
        }
    found: dict[str, Any] = {"seconds of a net's epoch": seconds}
    if (out / "bench.json").exists():
        found["bench"] = json.loads((out / "bench.json").read_text())
    return found


if __name__ == "__main__":
    app()
