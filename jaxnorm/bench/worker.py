"""A side that `jaxnorm.bench` times, in a process of its own: our training, or PyTorch's.

It reads a job from standard input, a line of JSON, prepares it (imports, compilation and warm-up,
timed apart), and then answers each further line, a number of steps, with the seconds that they
took. Both sides hold the same images as uint8 in memory, take the same batches, crop and mirror
them if the recipe does, standardize them, and make the same step.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxnorm.config import Config, study, tuned

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGES = 10_000
Peer = Literal["jaxnorm", "torch", "torch-compile", "torch-graphs"]
Stepper = Callable[[int], None]
"""Makes a number of steps, and returns when they are done."""


@dataclass(frozen=True)
class Job:
    """A measurement that a process makes.

    peer: "jaxnorm"; or "torch", eager, compiled, or compiled into CUDA graphs. layout: of PyTorch's
    images. spawned: when the process was started, in seconds since 1970.
    """

    peer: Peer
    norm: str
    arch: str
    batch_size: int
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    task: Literal["train", "evaluate"] = "train"
    compilation_cache: str | None = None
    spawned: float = 0.0

    @property
    def name(self) -> str:
        """The name of its side in tables."""
        return f"{self.peer} {self.layout}" if self.peer.startswith("torch") else self.peer


def draw_data() -> tuple[np.ndarray, np.ndarray]:
    """Returns random images u8[IMAGES, 32, 32, 3] and labels i32[IMAGES]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    return images, rng.integers(0, 10, IMAGES).astype(np.int32)


def batches_of(batch_size: int) -> np.ndarray:
    """Returns an epoch's batches, rows of the images, i32[IMAGES // batch_size, batch_size]."""
    order = np.random.default_rng(1).permutation(IMAGES).astype(np.int32)
    return order[: IMAGES // batch_size * batch_size].reshape(-1, batch_size)


def config_of(job: Job) -> Config:
    """Returns the settings of the net: the residual one is trained by the tuned recipe."""
    recipe = tuned if job.arch == "residual" else study
    return recipe(norm=job.norm, arch=job.arch, batch_size=job.batch_size)


def jax_setup(job: Job) -> tuple[Any, Any, Any, tuple]:
    """Returns the program, its mesh, the initial state, and the arrays that `train_nets` takes
    after it: images, labels, batches, keys, learning rates, weight decays.
    """
    import jax

    from jaxnorm.training import mesh as meshes
    from jaxnorm.training.epoch import epoch_keys
    from jaxnorm.training.experiment import program_of
    from jaxnorm.training.step import init_state, standard_of

    config = config_of(job)
    mesh = meshes.choose(1, job.batch_size)
    program, standard = program_of(config, job.norm, 10), standard_of(MEAN, DEVIATION)
    batches = batches_of(job.batch_size)[None]
    rates = np.full(batches.shape[:2], config.rate(job.norm), np.float32)
    decays = np.full(1, config.weight_decay, np.float32)
    state = jax.tree.map(lambda leaf: leaf[None], jax.device_get(init_state(program, 0, standard)))
    state, batches, rates, decays = meshes.place(mesh, (state, batches, rates, decays), by_net=True)
    images, labels = meshes.place(mesh, draw_data())
    return program, mesh, state, (images, labels, batches, epoch_keys(0, 1)[None], rates, decays)


def jax_stepper(job: Job) -> tuple[Stepper, dict[str, str]]:
    """Returns our training or evaluation, and what it runs on."""
    import jax

    from jaxnorm.training import epoch
    from jaxnorm.training import mesh as meshes

    meshes.use_all_cores()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if job.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", job.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    program, mesh, state, arrays = jax_setup(job)

    def steps(count: int) -> None:
        nonlocal state
        while count > 0:
            stop = min(count, IMAGES // job.batch_size)
            state, done = epoch.train_nets(
                program, mesh, state, *arrays, job.batch_size, 0, 0, stop
            )
            count -= stop
        jax.block_until_ready(done.losses)

    def evaluations(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(epoch.evaluate_nets(program, mesh, state, *arrays[:2]))

    device = f"{jax.devices()[0].device_kind} x{mesh.devices}"
    about = {"jax": jax.__version__, "device": device}
    return (steps if job.task == "train" else evaluations), about


def torch_net(config: Config) -> Any:
    """Returns the same net in PyTorch, from the same layer tables."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    from jaxnorm.model.summary import net_of, summarize

    net = net_of(config, config.norm, 10)
    table, rows = net.table, summarize(net)  # here: torch.compile looks into no module of Flax's

    class Conv(nn.Conv2d):
        """A convolution without a bias, its kernel standardized if the settings say so."""

        def forward(self, input: Any) -> Any:
            """The outputs."""
            kernel = self.weight
            if config.weight_standardization:
                variance, mean = torch.var_mean(kernel, (1, 2, 3), correction=0, keepdim=True)
                fan_in = kernel[0].numel()
                kernel = (kernel - mean) * torch.rsqrt(fan_in * variance + 1e-5)
            return nn.functional.conv2d(input, kernel, padding=self.padding)

    def norm_of(shape: tuple[int, int, int]) -> Any:
        """Returns the norm of an output of this height, width and number of channels."""
        height, width, channels = shape
        if config.norm == "batch":
            return nn.BatchNorm2d(channels)
        if config.norm == "layer" and config.arch == "original":
            return nn.LayerNorm([channels, height, width])
        return nn.GroupNorm({"group": config.groups, "layer": 1}[config.norm], channels)

    class Net(nn.Module):
        """The layer table, row by row, as `model.cnn.CNN`."""

        def __init__(self) -> None:
            super().__init__()
            self.convs, self.norms, inputs = nn.ModuleDict(), nn.ModuleDict(), 3
            for layer, row in zip(table, rows, strict=True):
                if layer.attends or layer.kind == "mixed-pool":
                    raise ValueError(f"the {config.arch} net is not one of the benchmark's")
                channels, window = row.shape[2], {"block": 3, "residual": 3}.get(layer.kind, 1)
                if row.kernel:
                    self.convs[layer.name] = Conv(
                        inputs, channels, window, padding=layer.padding, bias=False
                    )
                if row.norm:
                    self.norms[layer.name] = norm_of(row.shape)
                inputs = channels

        def forward(self, x: Any) -> Any:
            """Logits."""
            inputs = []
            for layer in table:
                inputs.append(x)
                match layer.kind:
                    case "block" | "residual":
                        x = self.norms[layer.name](self.convs[layer.name](x))
                        x = x + inputs[-2] if layer.kind == "residual" else x
                        x = torch.relu(nn.functional.dropout(x, config.dropout, self.training))
                    case "squeeze":
                        x = torch.relu(self.convs[layer.name](x))
                    case "pool":
                        x = nn.functional.max_pool2d(x, 2, 2)
                    case "mean":
                        x = nn.functional.avg_pool2d(x, layer.window)
                    case "mean-max":
                        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
                        x = torch.cat(pooled, 1)
                    case "head":
                        x = self.convs[layer.name](x).flatten(1)
            return x

    return Net()


def torch_stepper(job: Job) -> tuple[Stepper, dict[str, str]]:
    """Returns PyTorch's training or evaluation, and what it runs on."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.backends.cudnn.allow_tf32 = False  # ours is full float32
    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), config_of(job)
    layout = getattr(torch, f"{job.layout}_format" if job.layout == "contiguous" else job.layout)
    net = torch_net(config).to(device).to(memory_format=layout)
    kernels = [weight for weight in net.parameters() if weight.ndim == 4]
    others = [weight for weight in net.parameters() if weight.ndim != 4]
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others}],
        lr=config.rate(job.norm),
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    images, labels = draw_data()
    images = torch.tensor(images, device=device)
    labels = torch.tensor(labels, dtype=torch.int64, device=device)
    batches = torch.tensor(batches_of(job.batch_size), dtype=torch.int64, device=device)
    mean, deviation = (torch.tensor(values, device=device) for values in (MEAN, DEVIATION))
    modes = {"torch-compile": None, "torch-graphs": "reduce-overhead"}
    model = torch.compile(net, mode=modes[job.peer]) if job.peer in modes else net

    def moved(count: int) -> Any:
        """Returns rows or columns of images moved by up to 2 pixels, reflected at the edges."""
        pixels = torch.arange(32, device=device)[None]
        places = (pixels + torch.randint(-2, 3, (count, 1), device=device)).abs()
        return 31 - (31 - places).abs()

    def standardized(rows: Any, augment: bool = False) -> Any:
        """Returns the images of these rows, with `augment` cropped and mirrored."""
        chosen = images[rows]
        if augment:
            down, across = moved(len(rows)), moved(len(rows))
            mirrored = torch.rand(len(rows), 1, device=device) < 0.5
            across = torch.where(mirrored, across.flip(1), across)
            chosen = images[rows[:, None, None], down[:, :, None], across[:, None]]
        chosen = (chosen.float() / 255 - mean) / deviation
        return chosen.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def done() -> None:
        """Waits for the device."""
        if device.type == "cuda":
            torch.cuda.synchronize()

    def steps(count: int) -> None:
        """Trains on a number of batches."""
        net.train()
        for i in range(count):
            rows = batches[i % len(batches)]
            logits = model(standardized(rows, config.augment != "none"))
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done()

    @torch.no_grad()
    def evaluations(count: int) -> None:
        """Evaluates all images a number of times."""
        net.eval()
        for _ in range(count):
            for first in range(0, IMAGES, 500):
                rows = slice(first, first + 500)
                outputs = model(standardized(rows))
                torch.nn.functional.cross_entropy(outputs, labels[rows], reduction="sum")
        done()

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {"torch": torch.__version__, "device": name, "threads": str(torch.get_num_threads())}
    return (steps if job.task == "train" else evaluations), about


def peak_bytes(job: Job) -> int:
    """Returns the most memory taken so far, of an accelerator or else of the process."""
    if job.peer.startswith("torch"):
        import torch  # pyright: ignore[reportMissingImports]

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        import jax

        if account := jax.devices()[0].memory_stats():
            return account["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Prepares the job on the first line, then answers line by line until there are no more."""
    began = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job = Job(**json.loads(sys.stdin.readline()))
    try:
        stepper, about = (torch_stepper if job.peer.startswith("torch") else jax_stepper)(job)
        imported = time.perf_counter()
        stepper(1)
        first, first_step_seconds = time.perf_counter(), time.time() - job.spawned
        stepper(3 if job.task == "train" else 1)
    except Exception as error:  # a variant that does not work here is reported, not hidden
        answer(failed=" ".join(f"{type(error).__name__}: {error}".split())[:200])
        return
    answer(
        about=about,
        start_seconds=imported - began,
        compile_seconds=first - imported,
        first_step_seconds=first_step_seconds,
    )
    for line in sys.stdin:
        clock = time.perf_counter()
        stepper(int(line))
        seconds = time.perf_counter() - clock
        answer(seconds=seconds, peak_bytes=peak_bytes(job))


if __name__ == "__main__":
    main()
