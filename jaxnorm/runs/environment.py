"""What code and devices a run is trained with, for its `run.json`."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

from jaxnorm.config import Config
from jaxnorm.model import fingerprint, layers
from jaxnorm.model.summary import count_parameters, summarize
from jaxnorm.records import DatasetInfo, Environment, RunInfo
from jaxnorm.training.experiment import Experiment

_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")


def describe(config: Config, experiment: Experiment, now: Environment) -> RunInfo:
    """Returns all that `run.json` says of a run that starts now."""
    dataset = experiment.dataset
    names = ("name", "caption", "fingerprint", "source", "verified", "mean", "deviation")
    data = DatasetInfo(
        **{name: getattr(dataset, name) for name in names},
        class_names=list(dataset.class_names),
        train_count=len(dataset.train_labels),
        test_count=len(dataset.test_labels),
    )
    nets = {norm: experiment.program(config, norm).model for norm in config.norms}
    own = [norm for norm in config.norms if layers.is_custom(norm)]
    return RunInfo(
        format=3,
        config=config,
        parameters={norm: count_parameters(net) for norm, net in nets.items()},
        layers={norm: summarize(net) for norm, net in nets.items()},
        dataset=data,
        environment=dataclasses.replace(now, mesh=str(experiment.mesh_for(config))),
        norm_sources={norm: fingerprint.source(norm) for norm in own},
        norm_programs={norm: fingerprint.program(nets[norm]) for norm in own},
    )


def environment(
    command: str = "", self_check: str = "not made", deterministic: bool = False
) -> Environment:
    """Returns the environment now; the mesh is each run's own."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = "not installed"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = jax.local_devices()[0]
    hardware = f"{device.device_kind} x{jax.local_device_count()}"
    if device.platform == "cpu":
        hardware += f" ({processor()})"
    return Environment(
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        device=hardware,
        mesh="",
        versions=versions,
        git_revision=git_revision(),
        self_check=self_check,
        deterministic=deterministic,
        repeatable=repeatable(device.platform, deterministic),
    )


def repeatable(platform_name: str, deterministic: bool) -> str:
    """Says what of a run the same command gives again, and what is not promised."""
    if platform_name == "cpu":
        return "bit for bit except for times, on as many cores of this kind with these versions"
    if deterministic:
        return (
            "on this kind of device with these versions, as far as XLA's deterministic operations "
            "reach; not promised: the same bits on another device, or if compiled code was "
            "tuned again"
        )
    return "within rounding; not promised: the same bits (--deterministic asks for them)"


def processor() -> str:
    """The processor's name and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The revision of the checkout that this package lies in, with "+changes" if its files
    differ from it; None if it is installed.
    """
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "jaxnorm"]):
        command = ["git", "-C", str(_ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append("" if done.returncode else done.stdout.strip())
    revision, changes = answers
    checkout = revision and (_ROOT / "pyproject.toml").exists()
    return revision + ("+changes" if changes else "") if checkout else None
