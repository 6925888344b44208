"""The fault harness: real processes are killed, starved of disk and fed damaged checkpoints, and
what they leave resumes to the bits of an unbroken run.

`pytest -m slow` takes one try of each kind, on a run of one net of three layers; `pytest -m faults`
takes all of them, on a run of two of the study's nets with batch statistics; with `--record-faults
FILE` it writes a line for each, from which the table of `notebooks/pages/trust.md` is made. Every
child runs on one core of its own, so that tries can run side by side.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nets
import numpy as np
import pytest
from helpers import difference, without_times

from jaxnorm.data import cifar10 as archive
from jaxnorm.storage import checkpoint
from jaxnorm.storage.directory import RunDirectory

PATIENCE = 300
"""Seconds after which a child is called hung."""
TRIES = {"SIGKILL": 50, "SIGTERM": 20, "SIGINT": 5, "full disk": 10, "flipped byte": 20}
TRIES |= {"interrupted import": 20}
PLACES = ("start", "training", "training", "checkpoint", "report")
"""Where to kill: random moments within each, told from what is on disk."""


def tries(kind):
    """The tries of a kind; the first is in the slow suite, but for Ctrl-C, which is as SIGTERM."""
    return pytest.mark.parametrize(
        "number",
        [
            pytest.param(
                number,
                marks=[
                    pytest.mark.faults,
                    *([pytest.mark.slow] * (number == 0 and kind != "SIGINT")),
                ],
            )
            for number in range(TRIES[kind])
        ],
    )


@dataclass(frozen=True)
class Reference:
    """An unbroken run, and how to start one like it."""

    directory: RunDirectory
    arguments: list[str]
    seconds: dict[str, float]  # that its parts took
    environment: dict[str, str]
    core: int

    @property
    def command(self) -> list[str]:
        """`python -m jaxnorm.run`, on the core."""
        return ["taskset", "-c", str(self.core), sys.executable, nets.__file__]

    def start(self, *arguments: object) -> subprocess.Popen:
        """Starts it with these arguments."""
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def finish(self, *arguments: object) -> str:
        """Runs it to its end, and returns what it printed."""
        output, error = (process := self.start(*arguments)).communicate(timeout=PATIENCE)
        assert process.returncode == 0, error
        return output + error

    def resume(self, path: Path) -> str:
        """Resumes a run, or where nothing of it was on disk yet starts it again."""
        if (path / "run.json").exists():
            return self.finish("--resume", path)
        return self.finish(*self.arguments, "--out", path)


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory, worker_id):
    """The unbroken run, which the processes of one session share."""
    whole = request.config.option.markexpr == "faults"
    settings = ["--norm", "batch", "--seeds", "2"]
    if not whole:
        settings = ["--norm", "layer", "--arch", "three-layers"]
    arguments = [*settings, "--dataset", "digits", "--epochs", "2"]
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if worker_id != "master" else shared
    cores = sorted(os.sched_getaffinity(0))
    core = (
        cores[int(worker_id.removeprefix("gw") or 0) % len(cores)]
        if "gw" in worker_id
        else cores[0]
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = shared / "unbroken"
    with (shared / "unbroken.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = Reference(RunDirectory(path), arguments, {}, environment, core)
        if not path.exists():
            if whole:
                first.finish(*arguments, "--out", shared / "warming up")  # compiles for all of them
            process, start = first.start(*arguments, "--out", path), time.monotonic()
            seconds = {}
            for place, there in (("start", begun), ("training", trained)):
                wait_until(lambda there=there: there(path, 2 * nets_of(arguments)), process)
                seconds[place] = time.monotonic() - start
                start = time.monotonic()
            process.communicate(timeout=PATIENCE)
            seconds["report"] = time.monotonic() - start
            (shared / "seconds.json").write_text(json.dumps(seconds))
    seconds = json.loads((shared / "seconds.json").read_text())
    return Reference(RunDirectory(path), arguments, seconds, environment, core)


def nets_of(arguments):
    return 2 if "--seeds" in arguments else 1


def lines(path):
    metrics = path / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def begun(path, total):
    return (path / "run.json").exists()


def trained(path, total):
    return lines(path) == total


def wait_until(there, process):
    """Waits until something is there, or the process has ended."""
    limit = time.monotonic() + PATIENCE
    while not there() and process.poll() is None:
        assert time.monotonic() < limit, "it hangs"
        time.sleep(0.001)


@pytest.fixture
def record(request):
    """Writes a line about a try."""

    def write(kind, where, number, complete, kept, same):
        path = request.config.getoption("--record-faults")
        if path:
            values = {"kind": kind, "where": where, "try": number, "complete": complete}
            with Path(path).open("a") as file:
                file.write(json.dumps({**values, "kept": kept, "same": same}) + "\n")

    return write


def kill(reference, number, path, kind):
    """Starts a run and kills it at a moment drawn by the try's number; returns where, the exit code
    and what it said.

    Machines drift, so the moment may lie elsewhere than was meant: see `stopped_politely`.
    """
    draw = random.Random(f"{kind} {number}")
    total = 2 * nets_of(reference.arguments)
    where = PLACES[(number + 1) % len(PLACES)]
    process = reference.start(*reference.arguments, "--out", path)
    if where != "start":
        wait_until(lambda: begun(path, total), process)
    if where == "report":
        wait_until(lambda: trained(path, total), process)
    if where == "checkpoint":
        after = draw.randrange(total)
        wait_until(lambda: lines(path) == after, process)
        wait_until(lambda: any(path.glob("checkpoints/*/.writing-*")), process)
        time.sleep(draw.uniform(0, 0.03))
    else:
        time.sleep(draw.uniform(0, reference.seconds[where]))
    process.send_signal(getattr(signal, kind))
    _, error = process.communicate(timeout=PATIENCE)
    return where, process.returncode, error


def kept_of(printed, complete, total):
    """How many complete epochs a resumed run said that it resumes after; all where it had none."""
    for line in printed.splitlines():
        if line.startswith("resuming after "):
            return int(line.split()[2])
    return complete


def check(reference, record, kind, where, number, path):
    """Resumes what is left of a run and compares it with the unbroken one."""
    complete = lines(path)
    printed = reference.resume(path)
    kept = kept_of(printed, complete, None)
    different = difference(RunDirectory(path), reference.directory)
    record(kind, where, number, complete, kept, not different)
    assert different == ""
    assert (path / "report.html").exists()
    assert not list(path.rglob(".writing-*"))
    return complete, kept, printed


@tries("SIGKILL")
def test_sigkill_loses_no_complete_epoch(reference, record, scratch, number):
    where, code, _ = kill(reference, number, scratch / "run", "SIGKILL")
    assert code in (-9, 0)  # 0: it had ended
    complete, kept, _ = check(reference, record, "SIGKILL", where, number, scratch / "run")
    assert kept == complete


def stopped_politely(reference, record, path, number, kind, code):
    where, got, error = kill(reference, number, path, kind)
    # Before the command listens and after it is done, a signal ends Python as any program.
    idle = not begun(path, 0) or (path / "report.html").exists()
    plainly = got == -getattr(signal, kind) and idle and not error
    assert got in (code, 0) or plainly, (got, error)
    if got == code:
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not begun(path, 0) or "--resume" in error
    complete, kept, _ = check(reference, record, kind, where, number, path)
    assert kept == complete


@tries("SIGTERM")
def test_sigterm_says_how_to_resume(reference, record, scratch, number):
    stopped_politely(reference, record, scratch / "run", number, "SIGTERM", 143)


@tries("SIGINT")
def test_ctrl_c_says_how_to_resume(reference, record, scratch, number):
    stopped_politely(reference, record, scratch / "run", number, "SIGINT", 130)


def can_mount():
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


FULL = """
set -e
mount -t tmpfs -o size=$1 tmpfs "$2"
shift
disk=$1; shift
code=0
"$@" --out "$disk/run" 2> "$disk.error" || code=$?
echo $code > "$disk.code"
mount -o remount,size=64m "$disk"
cp -r "$disk/run" "$disk.kept" 2> /dev/null || true
"""


@tries("full disk")
def test_a_full_disk_is_one_error_and_resumes_when_there_is_room(
    reference, record, scratch, number
):
    if not can_mount():
        pytest.skip("needs unshare -rm, to mount a small disk of its own")
    files = [file for file in reference.directory.path.rglob("*") if file.is_file()]
    needed = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)
    size = int(random.Random(f"disk {number}").uniform(16_384, 0.9 * needed))
    disk = scratch / "disk"
    disk.mkdir()
    command = [*reference.command, *reference.arguments]
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", FULL, "full", str(size), str(disk), *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=reference.environment,
    )
    assert done.returncode == 0, done.stderr
    error = (scratch / "disk.error").read_text()
    assert (scratch / "disk.code").read_text() == "1\n", error
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1
    if (scratch / "disk.kept").exists():
        (scratch / "disk.kept").rename(scratch / "run")
    where = "report" if lines(scratch / "run") == 2 * nets_of(command) else "training"
    complete, kept, _ = check(reference, record, "full disk", where, number, scratch / "run")
    assert kept == complete


@tries("flipped byte")
def test_a_checkpoint_with_a_flipped_byte_is_made_again(reference, record, scratch, number):
    draw = random.Random(f"flip {number}")
    path = scratch / "run"
    shutil.copytree(reference.directory.path, path)
    total = 2 * nets_of(reference.arguments)
    complete = total if number % 2 == 0 else draw.randrange(1, total)
    metrics = path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:complete]))
    epochs = RunDirectory(path).epochs()
    hit = epochs[-1] if number % 2 else draw.choice([epoch for epoch in epochs if epoch.epoch == 2])
    net, run = (hit.norm, hit.seed), RunDirectory(path)
    for epoch in checkpoint.epochs(run, net):
        if epoch > hit.epoch:
            (path / f"checkpoints/{net[0]}-{net[1]}/epoch-{epoch}.msgpack").unlink()
    file = path / f"checkpoints/{net[0]}-{net[1]}/epoch-{hit.epoch}.msgpack"
    content = np.fromfile(file, np.uint8)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    content.tofile(file)
    if hit.epoch == 2:  # a finished net needs no checkpoint; the bits are its records'
        kept = kept_of(reference.resume(path), complete, None)
        ours, wanted = (
            directory.epochs() for directory in (RunDirectory(path), reference.directory)
        )
        same = list(map(without_times, ours)) == list(map(without_times, wanted))
        record("flipped byte", "finished", number, complete, kept, same)
        assert same
        assert kept == complete
        return
    _, kept, printed = check(reference, record, "flipped byte", "training", number, path)
    assert "warning: " in printed
    assert kept == complete - 1


IMPORT = """
import sys
from jaxnorm.data import cifar10 as archive
from jaxnorm.data import datasets as data
archive._PER_FILE = int(sys.argv[3])
data.CIFAR10_COUNTS = (5 * archive._PER_FILE, archive._PER_FILE)
loaded = data.load("cifar10", sys.argv[1], sys.argv[2], allow_unverified=True)
print(loaded.fingerprint)
"""


@pytest.fixture(scope="module")
def pictures(request, tmp_path_factory):
    """An archive of flat images, in the full harness as many as the official one has."""
    import io
    import tarfile

    per_file = 10_000 if request.config.option.markexpr == "faults" else 500
    path = tmp_path_factory.mktemp("pictures") / "archive.tar.gz"
    rng = np.random.default_rng(1)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            records = np.repeat(rng.integers(0, 10, (per_file, 1), np.uint8), 3073, 1)
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    return path, per_file


@pytest.fixture(scope="module")
def imported(pictures, tmp_path_factory):
    """What an import that nobody interrupts prints, and how long it takes."""
    start = time.monotonic()
    done = importing(tmp_path_factory.mktemp("imported"), pictures)
    printed, error = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, error
    return printed, time.monotonic() - start


def importing(directory, pictures):
    path, per_file = pictures
    return subprocess.Popen(
        [sys.executable, "-c", IMPORT, str(directory / "tfds"), str(path), str(per_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(directory / "cache")},
    )


@tries("interrupted import")
def test_an_interrupted_import_is_done_again(pictures, imported, record, scratch, number):
    printed, seconds = imported
    process = importing(scratch, pictures)
    time.sleep(random.Random(f"import {number}").uniform(0, seconds))
    process.kill()
    process.communicate()
    again = importing(scratch, pictures)
    output, error = again.communicate(timeout=PATIENCE)
    same = again.returncode == 0 and output == printed
    record("interrupted import", "import", number, 0, 0, same)
    assert same, error
    assert not (scratch / "tfds" / archive._SCRATCH).exists()
