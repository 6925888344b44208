"""Where a run comes from: the code, the versions, the machine and the data, for its `run.json`."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

from jaxnorm.config import Config
from jaxnorm.data import Dataset
from jaxnorm.records import RunInfo


def describe(
    config: Config,
    dataset: Dataset,
    parameters: dict[str, int],
    command: str,
    self_check: str = "not made",
    deterministic: bool = False,
    mesh: str = "seed=1,batch=1",
) -> RunInfo:
    """All that `run.json` says of a run that starts now."""
    packages = (
        "jaxnorm",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
        "tensorflow-datasets",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    facts = {
        "name": dataset.name,
        "caption": dataset.caption,
        "fingerprint": dataset.fingerprint,
        "source": dataset.source,
        "verified": dataset.verified,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "deviation": list(dataset.deviation),
        "train_count": len(dataset.train_labels),
        "test_count": len(dataset.test_labels),
    }
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    hardware = f"{device.device_kind} x{jax.device_count()}{processes}" + (
        f" ({_processor()})" if device.platform == "cpu" else ""
    )
    return RunInfo(
        config,
        parameters,
        facts,
        versions,
        hardware,
        _git_revision(),
        started,
        command,
        self_check,
        repeatable(device.platform, deterministic),
        deterministic,
        mesh=mesh,
    )


def repeatable(platform: str, deterministic: bool) -> str:
    """What of a run the same command gives again, and what is not promised."""
    if platform == "cpu":
        return "bit for bit but for the times, on as many cores of this kind with these versions"
    if deterministic:
        return (
            "on this kind of device with these versions, as far as XLA's deterministic operations "
            "reach; not promised: the same bits on another device, or where compiled code was "
            "tuned anew"
        )
    return "within rounding; not promised: the same bits (--deterministic asks for them)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """The revision of the checkout that this package lies in, or None where it is installed."""
    here = Path(__file__).resolve().parent
    if not (here.parent / "pyproject.toml").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
