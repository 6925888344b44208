"""The whole command against PyTorch's: the study's three trainings on CIFAR-10, each side from the
start of its process to its end, in turns of five seconds.

    pip install '.[bench]'
    python notebooks/tools/end_to_end.py --out end-to-end.json     # 20 minutes

Ours is `python -m jaxnorm.run --norm all`: start-up, self-check, compilation without anything
compiled before, training, evaluation after every epoch, checkpoints, measurements inside the nets,
figures and report. PyTorch's trains the same nets eagerly, in the faster of its layouts, on whole
batches of images that lie in memory, evaluates after every epoch and saves a checkpoint. Both read
the same decoded images. Two numbers of epochs tell what an epoch takes and what the rest does; from
these follow 20 epochs.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from cyclopts import Parameter

import jaxnorm
from jaxnorm.analysis.tables import Table
from jaxnorm.bench.__main__ import describe_machine, measure_ceiling, save
from jaxnorm.bench.worker import torch_net
from jaxnorm.config import ALL, Config
from jaxnorm.data.datasets import CIFAR10_DEVIATION, CIFAR10_MEAN

LAYOUTS = {"batch": "channels_last", "group": "channels_last", "layer": "contiguous_format"}
"""PyTorch's faster layout of each of the study's nets, by `jaxnorm.bench`."""
EPOCHS = 20
"""Of the study."""
TURN = 5.0
"""Seconds that a side runs for."""
app = cyclopts.App(help_format="plaintext")


@app.command
def torch(epochs: int, folder: Path) -> None:
    """Trains the study's three nets in PyTorch."""
    import torch

    data = jaxnorm.load(allow_unverified=True)
    mean, deviation = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_DEVIATION)
    images, test_images = map(torch.from_numpy, (data.train_images, data.test_images))
    labels, test_labels = (
        torch.from_numpy(numbers.astype(np.int64))
        for numbers in (data.train_labels, data.test_labels)
    )

    def batch(pixels, layout):
        """Standardized images."""
        pixels = ((pixels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=layout)

    for norm in ALL:
        config, layout = Config(norm), getattr(torch, LAYOUTS[norm])
        torch.manual_seed(config.seed)
        net = torch_net(config).to(memory_format=layout)
        optimizer = torch.optim.SGD(net.parameters(), lr=config.rate(norm), momentum=0.9)
        for epoch in range(1, epochs + 1):
            net.train()
            for rows in torch.randperm(len(labels)).split(config.batch_size):
                logits = net(batch(images[rows], layout))
                loss = torch.nn.functional.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            net.eval()
            with torch.no_grad():
                parts = [net(batch(part, layout)) for part in test_images.split(500)]
            accuracy = (torch.cat(parts).argmax(1) == test_labels).float().mean()
            torch.save([net.state_dict(), optimizer.state_dict()], folder / f"{norm}-{epochs}.pt")
            print(f"{norm} epoch {epoch}: {accuracy:.2%}", flush=True)


@app.default
def main(
    *,
    epochs: Annotated[tuple[int, int], Parameter(consume_multiple=True)] = (1, 2),
    out: Path | None = None,
) -> None:
    """Times both sides for two numbers of epochs, and prints and writes what they took."""
    commands: dict[tuple[str, int], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in epochs:
            run = ["-m", "jaxnorm.run", "--norm", "all", "--epochs", str(count)]
            run += ["--allow-unverified", "--recheck", "--out", f"{folder}/run-{count}"]
            commands["jaxnorm", count] = run
            commands["torch", count] = [__file__, "torch", str(count), folder]
        took = seconds_of(commands, folder)
    seconds = {side: [took[side, count] for count in epochs] for side in ("jaxnorm", "torch")}
    machine = describe_machine(measure_ceiling())
    values = {"machine": machine, "epochs": epochs, "seconds": seconds}
    print(table(values).plain())
    if out:
        save(out, values)


def seconds_of(commands: Mapping[Any, list[str]], folder: str) -> dict[Any, float]:
    """The time of Python processes that must succeed, with nothing compiled before.

    All begin together, and one runs at a time while the others stand still, so that a machine whose
    speed changes is as fast for each.
    """
    seconds = dict.fromkeys(commands, 0.0)
    with contextlib.ExitStack() as stack:
        running = {}
        for number, (side, command) in enumerate(commands.items()):
            environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled-{number}"}
            line = [sys.executable, *command]
            running[side] = process = stack.enter_context(
                subprocess.Popen(line, env=environment, start_new_session=True)
            )
            stack.callback(process.kill)
            os.killpg(process.pid, signal.SIGSTOP)
        while running:
            for side, process in list(running.items()):
                os.killpg(process.pid, signal.SIGCONT)
                clock = time.perf_counter()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    if process.wait(TURN):
                        raise subprocess.CalledProcessError(process.returncode, commands[side])
                    del running[side]
                seconds[side] += time.perf_counter() - clock
                if side in running:
                    os.killpg(process.pid, signal.SIGSTOP)
    return seconds


def table(values: Mapping[str, Any]) -> Table:
    """What each side took, and how many times as fast ours is."""
    (fewer, more), rows = values["epochs"], []
    for a, b in values["seconds"].values():
        epoch = (b - a) / (more - fewer)
        rest = a - fewer * epoch
        rows.append([a, b, epoch, rest, rest + EPOCHS * epoch])
    cells = [
        [side, *(f"{value:.0f}" for value in row)]
        for side, row in zip(values["seconds"], rows, strict=True)
    ]
    cells.append(["ours is times as fast", *(f"{b / a:.2f}" for a, b in zip(*rows, strict=True))])
    head = ["seconds", *(f"{n} epoch{'s' * (n > 1)}" for n in (fewer, more))]
    head += ["each epoch", "all else", f"{EPOCHS} epochs, from these"]
    machine = values["machine"]
    note = (
        f"The study's three nets, one after the other; one time each, in turns of {TURN:g} s; "
        f"{machine['processor']}; {machine['when'][:10]}."
    )
    return Table("End to end", head, cells, note)


if __name__ == "__main__":
    app()
