"""The fault harness: real processes are killed, starved of disk and fed damaged files of every
kind; what they leave resumes to the bits of an unbroken run, and nothing that is whole is lost.

`pytest -m slow` takes one try of each kind, on a run of one net of three layers; `pytest -m faults`
takes all of them, on a run of two of the study's nets with batch statistics; with `--record-faults
FILE` it writes a line for each, from which the table of `notebooks/pages/trust.md` is made. Every
child runs on one core of its own, so that tries can run side by side.
"""

import dataclasses
import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import nets
import numpy as np
import pytest
from helpers import SMALL, difference

from jaxnorm.config import UserError
from jaxnorm.data import cifar10 as archive
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.storage.net import NetFolder
from jaxnorm.storage.sweep import Sweep

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
PATIENCE = 300
"""Seconds after which a child is called hung."""
TRIES = {"SIGKILL": 50, "SIGTERM": 20, "SIGINT": 5, "full disk": 10, "flipped byte": 18}
TRIES |= {"flipped image": 2, "interrupted import": 20}
PLACES = ("training", "writing a state", "measuring", "report", "start")
"""Where to kill: random moments within each, told from what is on disk."""
FILES = ("newest state", "state of a finished net", "metrics.jsonl", "result.npz", "probes.npz")
FILES += ("lost.json", "run.json", "sweep.json", "compiled code")
"""What to damage."""
REFUSED = ("run.json", "sweep.json")


def tries(*kinds):
    """The tries of kinds; the first is in the slow suite, except for Ctrl-C, like SIGTERM."""
    values = []
    for kind in kinds:
        for number in range(TRIES[kind]):
            slow = [pytest.mark.slow] * (number == 0 and kind != "SIGINT")
            values.append(pytest.param(kind, number, marks=[pytest.mark.faults, *slow]))
    return pytest.mark.parametrize(("kind", "number"), values)


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

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen:
        """Starts it with these arguments."""
        command = [*self.command, *map(str, arguments)]
        return subprocess.Popen(command, **PIPES, env={**self.environment, **environment})

    def finish(self, *arguments: object) -> str:
        """Runs it to its end, and returns what it printed."""
        code, printed = self.attempt(*arguments)
        assert code == 0, printed
        return printed

    def attempt(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """Runs it to its end; returns its exit code and what it printed."""
        process = self.start(*arguments, **environment)
        printed = "".join(process.communicate(timeout=PATIENCE))
        return process.returncode, printed

    def resume(self, path: Path) -> str:
        """Resumes a run, or where nothing of it was on disk yet starts it again."""
        if (path / "run.json").exists():
            return self.finish("--resume", path)
        return self.finish(*self.arguments, "--out", path)


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory, worker_id):
    """The unbroken run, which the processes of one session share."""
    whole = request.config.option.markexpr == "faults"
    settings = ["--norm", "batch", "--seeds", "2"] if whole else list(SMALL[6:])
    arguments = [*settings, "--dataset", "digits", "--epochs", "2"]
    shared, cores = tmp_path_factory.getbasetemp(), sorted(os.sched_getaffinity(0))
    shared = shared.parent if worker_id != "master" else shared
    core = cores[int(worker_id[2:]) % len(cores)] if "gw" in worker_id else cores[0]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if not whole:
        environment["FIGURES"] = "together"
    path, times = shared / "unbroken", shared / "seconds.json"
    with (shared / "unbroken.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = Reference(RunDirectory(path), arguments, {}, environment, core)
        if not path.exists():
            if whole:
                first.finish(*arguments, "--out", shared / "warming up")  # compiles for all of them
            process, start = first.start(*arguments, "--out", path), time.monotonic()
            seconds = {}
            for place, there in REACHED.items():
                wait_until(lambda there=there: there(path, nets_of(arguments)), process)
                seconds[place] = time.monotonic() - start
                start = time.monotonic()
            process.communicate(timeout=PATIENCE)
            seconds["report"] = time.monotonic() - start
            times.write_text(json.dumps(seconds))
    return dataclasses.replace(first, seconds=json.loads(times.read_text()))


def nets_of(arguments):
    return 2 if "--seeds" in arguments else 1


def complete_in(path):
    """The number of complete epochs, by the names of the states."""
    nets = [[int(f.stem[6:]) for f in net.glob("state-*.msgpack")] for net in path.glob("nets/*")]
    return sum(max(epochs, default=0) for epochs in nets)


REACHED = {
    "start": lambda path, nets: (path / "run.json").exists(),
    "training": lambda path, nets: complete_in(path) == 2 * nets,
    "measuring": lambda path, nets: len(list(path.glob("nets/*/result.npz"))) == nets,
}
"""What ends each part of a run, all but the report."""


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

    Machines drift, so the moment may lie elsewhere than was meant: see the test of signals.
    """
    draw = random.Random(f"{kind} {number}")
    nets = nets_of(reference.arguments)
    where = PLACES[number % len(PLACES)]
    process = reference.start(*reference.arguments, "--out", path)
    before = {"start": None, "measuring": "training", "report": "measuring"}.get(where, "start")
    if before:
        wait_until(lambda: REACHED[before](path, nets), process)
    if where == "writing a state":
        after = draw.randrange(2 * nets)
        wait_until(lambda: complete_in(path) >= after, process)
        wait_until(lambda: any(path.glob("nets/*/.writing-*")), process)
        time.sleep(draw.uniform(0, 0.03))
    else:
        time.sleep(draw.uniform(0, reference.seconds[where]))
    process.send_signal(getattr(signal, kind))
    _, error = process.communicate(timeout=PATIENCE)
    return where, process.returncode, error


def kept_of(printed, complete):
    """How many complete epochs a resumed run said that it resumes after; all where it had none."""
    for line in printed.splitlines():
        if line.startswith("resuming after "):
            return int(line.split()[2])
    return complete


def records(path):
    """The content of every file of a run's nets, and of its `run.json` and `sweep.json`."""
    found = [*path.rglob("nets/*/*"), *path.rglob("run.json"), *path.rglob("sweep.json")]
    return {file: file.read_bytes() for file in found}


def check(reference, record, kind, where, number, path):
    """Resumes what is left of a run and compares it with the unbroken one."""
    complete, before = complete_in(path), records(path)
    printed = reference.resume(path)
    kept, after = kept_of(printed, complete), records(path)
    different = difference(RunDirectory(path), reference.directory)
    record(kind, where, number, complete, kept, not different)
    assert different == ""
    assert (path / "report.html").exists()
    assert not list(path.glob("nets/*/.writing-*"))
    ended = [file for file in before if file.with_name("result.npz") in before]
    assert all(after[file] == before[file] for file in ended)
    return complete, kept


@tries("SIGKILL", "SIGTERM", "SIGINT")
def test_a_signal_loses_no_complete_epoch_and_all_but_a_kill_say_how_to_resume(
    reference, record, scratch, kind, number
):
    path, code = scratch / "run", {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[kind]
    where, got, error = kill(reference, number, path, kind)
    # Before the command listens and after it is done, a signal ends Python as any program.
    begun = (path / "run.json").exists()
    idle = not begun or (path / "report.html").exists()
    plainly = got == -getattr(signal, kind) and idle and not error
    assert got in (code, 0) or plainly, (got, error)  # 0: it had ended
    if got == code and kind != "SIGKILL":
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not begun or "--resume" in error or "jaxnorm.report" in error
    complete, kept = check(reference, record, kind, where, number, path)
    assert kept == complete


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
    reference, record, scratch, kind, number
):
    if not can_mount():
        pytest.skip("needs unshare -rm, to mount a small disk of its own")
    sizes = [f.stat().st_size for f in reference.directory.path.rglob("*") if f.is_file()]
    needed = sum(-(-size // 4096) * 4096 for size in sizes)
    size = int(random.Random(f"disk {number}").uniform(16_384, 0.9 * needed))
    disk = scratch / "disk"
    disk.mkdir()
    command = [*reference.command, *reference.arguments]
    alone = ["unshare", "-rm", "bash", "-c", FULL, "full", str(size), str(disk)]
    done = subprocess.run([*alone, *command], **PIPES, timeout=PATIENCE, env=reference.environment)
    assert done.returncode == 0, done.stderr
    error = (scratch / "disk.error").read_text()
    assert (scratch / "disk.code").read_text() == "1\n", error
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1
    if (scratch / "disk.kept").exists():
        (scratch / "disk.kept").rename(scratch / "run")
    ended = REACHED["measuring"](scratch / "run", nets_of(command))
    where = "report" if ended else "training"
    complete, kept = check(reference, record, kind, where, number, scratch / "run")
    assert kept == complete


def flip(file, draw):
    """Flips one bit of a file."""
    content = np.fromfile(file, np.uint8)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    content.tofile(file)


def damage(run, where, draw, sweep):
    """Flips a bit of a file of a finished run or of its sweep; returns the file."""
    folder = NetFolder(run, draw.choice(run.info().config.nets))
    number = 2 if where == "newest state" else draw.choice((1, 2))
    file = folder.path / (f"state-{number}.msgpack" if "state" in where else where)
    if where in ("newest state", "lost.json"):
        (folder.path / "result.npz").unlink()
    if where == "lost.json":
        (folder.path / "state-2.msgpack").unlink()
        folder.lose(2, "x")
    if where in REFUSED:
        file = (sweep.folder.path if where == "sweep.json" else run.path) / where
        sweep.write_info(sweep.info("x"))
    content = file.read_bytes()
    read = {"lost.json": folder.lost, "result.npz": folder.result, "run.json": run.info}
    read["sweep.json"] = lambda: Sweep.open(sweep.folder.path)
    while True:
        flip(file, draw)
        try:
            if where in read:
                read[where]()
                file.write_bytes(content)  # it was in a text or a date, which may be any other
                continue
        except UserError:
            pass
        return file


@tries("flipped byte")
def test_whatever_file_is_damaged_nothing_whole_is_lost(reference, record, scratch, kind, number):
    """A record of all is refused; one of a net is made again, or left if nothing needs it."""
    where, draw = FILES[number % len(FILES)], random.Random(f"flip {number}")
    if where == "compiled code":
        flipped_compiled_code(reference, record, scratch, number)
        return
    configs = [reference.directory.info().config]
    if where == "sweep.json":
        configs.append(dataclasses.replace(configs[0], weight_decay=0.5))
    sweep = Sweep(scratch / "run", configs)
    run = sweep.directories[0]
    shutil.copytree(reference.directory.path, run.path)
    file = damage(run, where, draw, sweep)
    complete, before = complete_in(run.path), records(sweep.folder.path)
    code, printed = reference.attempt("--resume", sweep.folder.path)
    after = records(sweep.folder.path)
    made_again = where in ("newest state", "lost.json", "result.npz")
    whole = [one for one in before if not made_again or one.parent != file.parent]
    assert all(after[one] == before[one] for one in whole)
    assert before[file] in after.values()  # set aside, or left
    assert code == (2 if where in REFUSED else 0), printed
    assert printed.count("\nwarning: ") == made_again
    if code:
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
    if not made_again and where != "sweep.json":  # the rest is whole
        shutil.copy(reference.directory.path / file.relative_to(run.path), file)
    kept = kept_of(printed, complete)
    different = difference(run, reference.directory)
    record(kind, where, number, complete, kept, not different)
    assert different == ""
    assert kept == complete - (where == "newest state")


def flipped_compiled_code(reference, record, scratch, number):
    """Code that was compiled for an earlier run is compiled again."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled")}
    for name in ("before", "run"):
        code, printed = reference.attempt(*reference.arguments, "--out", scratch / name, **cache)
        assert code == 0, printed
        for file in scratch.glob("compiled/*-cache"):
            flip(file, random.Random(f"{number} {file.name}"))
    different = difference(RunDirectory(scratch / "run"), reference.directory)
    record("flipped byte", "compiled code", number, 0, 0, not different)
    assert different == ""


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
    """What an import that nobody interrupts prints, how long it takes, and where it is."""
    start, directory = time.monotonic(), tmp_path_factory.mktemp("imported")
    done = importing(directory, pictures)
    printed, error = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, error
    return printed, time.monotonic() - start, directory


def importing(directory, pictures):
    command = [sys.executable, "-c", IMPORT, *map(str, (directory / "tfds", *pictures))]
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
    return subprocess.Popen(command, **PIPES, env=environment)


@tries("interrupted import")
def test_an_interrupted_import_is_done_again(pictures, imported, record, scratch, kind, number):
    printed, seconds, _ = imported
    process = importing(scratch, pictures)
    time.sleep(random.Random(f"import {number}").uniform(0, seconds))
    process.kill()
    process.communicate()
    again = importing(scratch, pictures)
    output, error = again.communicate(timeout=PATIENCE)
    same = again.returncode == 0 and output == printed
    record(kind, "import", number, 0, 0, same)
    assert same, error
    assert not (scratch / "tfds" / archive._SCRATCH).exists()


@tries("flipped image")
def test_decoded_images_that_are_damaged_are_decoded_again(
    pictures, imported, record, scratch, kind, number
):
    printed, _, directory = imported
    for name in ("tfds", "cache"):
        shutil.copytree(directory / name, scratch / name)
    (file,) = scratch.glob("cache/**/*.npys")
    flip(file, random.Random(f"image {number}"))
    output, error = (process := importing(scratch, pictures)).communicate(timeout=PATIENCE)
    same = process.returncode == 0 and output == printed
    record("flipped byte", "decoded images", number, 0, 0, same)
    assert same, error
