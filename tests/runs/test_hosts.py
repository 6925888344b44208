"""Several real processes that train one run: shares of it, and jobs of `jax.distributed`.

Every process has a device of its own. The reference is one process with one device.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import jax
import nets
import numpy as np
import pytest
from helpers import refusal, without_times

from jaxnorm.analysis.results import Run
from jaxnorm.config import SweptNet, study
from jaxnorm.data import datasets
from jaxnorm.runs import hosts, runner
from jaxnorm.runs.hosts import Share
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.training.fit import fit
from jaxnorm.training.mesh import ONE

DIGITS = {"dataset": "digits", "learning_rate": 0.01}
CONFIG = study(norm="layer", arch="three-layers", epochs=6, batch_size=479, seeds=6, **DIGITS)
COMMAND = [nets.__file__, "--skip-self-check"]
SMALL = ["--norm", "layer", "--arch", "three-layers", "--dataset", "digits", "--batch-size", "479"]
SMALL += ["--learning-rate", "0.01"]
ARGUMENTS = (*SMALL, "--epochs", "6", "--seeds", "6")
"""479 is a third of the digits: no batch is ragged, and fewer programs are compiled."""
PATIENCE = 240


def start(*arguments, **variables):
    """Starts a process with one device."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **variables},
    )


def start_job(count, *arguments):
    """Starts the processes of a job of `jax.distributed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [start(*arguments, **job, JAX_PROCESS_ID=str(index)) for index in range(count)]


def finish(processes):
    """Their exit codes, and what they printed and said on standard error."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


def assert_bits_of_one_process(path):
    """The run in a folder is the one that one process trains on one device."""
    run = Run(RunDirectory(path))
    assert len(run.finished) == 6
    for net, trained in fit(CONFIG, datasets.load("digits"), mesh=ONE).items():
        epochs = map(without_times, run.epochs[net])
        assert list(epochs) == list(map(without_times, trained.epochs))
        _, state = runner.load_state(path, *net)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(trained.state), strict=True)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.slow
def test_a_killed_share_costs_its_own_nets_and_three_processes_take_the_rest(scratch):
    path = scratch / "run"
    shares = [
        start(*COMMAND, *ARGUMENTS, "--out", path, "--share", share) for share in ("0/2", "1/2")
    ]
    limit = time.monotonic() + PATIENCE
    while not list(path.glob("nets/layer-2/state-*")) and shares[1].poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    shares[1].kill()
    codes, printed, errors = finish(shares)
    assert codes == [0, -signal.SIGKILL], errors
    run = Run(RunDirectory(path))
    assert {seed for _, seed in run.finished} >= {1, 3, 5}
    left = 6 - len(run.finished)
    assert f"{left} of 6 nets are trained by other processes" in printed[0]
    assert not (path / "report.html").exists()
    before = dict(run.epochs)
    codes, printed, errors = finish([start(*COMMAND, "--resume", path) for _ in range(3)])
    assert codes == [0, 0, 0], errors
    assert sum("the report is" in text for text in printed) >= 1
    assert (path / "report.html").exists()
    after = Run(RunDirectory(path))
    assert all(after.epochs[net][: len(lines)] == lines for net, lines in before.items())
    assert_bits_of_one_process(path)


@pytest.mark.slow
def test_two_processes_that_start_at_once_do_not_both_make_the_run(scratch):
    path = scratch / "run"
    arguments = (*COMMAND, *SMALL, "--epochs", "1", "--out", path)
    codes, _, errors = finish([start(*arguments) for _ in range(2)])
    assert sorted(codes) == [0, 2], errors
    refused = errors[codes.index(2)]
    assert re.fullmatch(r"error: --out .* is already used.*\n", refused)
    assert len(Run(RunDirectory(path)).finished) == 1


@pytest.mark.slow
def test_a_job_of_two_processes_ends_with_one_report(scratch):
    path = scratch / "run"
    codes, printed, errors = finish(
        start_job(2, *COMMAND, *ARGUMENTS, "--out", path, "--distributed")
    )
    assert codes == [0, 0], errors
    assert ["the report is" in text for text in printed] == [True, False]
    lines = Counter(re.findall(r"seed (\d)  epoch", "".join(printed)))
    assert lines == dict.fromkeys("123456", 6)
    assert_bits_of_one_process(path)


@pytest.mark.slow
def test_a_process_of_a_job_that_fails_ends_at_once_and_ends_the_others(scratch):
    (scratch / "used").write_text("no folder")
    first, second = start_job(2, *COMMAND, *ARGUMENTS, "--distributed", "--out", scratch / "used")
    codes, _, errors = finish([first, second])
    assert 2 in codes
    assert 0 not in codes
    assert any("error: --out" in error for error in errors)


@pytest.mark.slow
def test_a_job_that_nothing_describes_is_refused():
    done = start("-m", "jaxnorm.run", "--distributed", "--dataset", "digits", "--out", "x")
    (code,), (printed,), (error,) = finish([done])
    assert (code, printed) == (2, "")
    assert re.fullmatch(r"error: --distributed cannot join a job \(.*\n", error)


def test_shares_are_every_net_once():
    every = [SweptNet(0, norm, seed) for seed in range(4) for norm in ("batch", "layer")]
    shares = [Share.parse(f"{index}/3").of(every) for index in range(3)]
    assert sorted(net for share in shares for net in share) == sorted(every)
    assert {len(share) for share in shares} == {2, 3}
    assert Share().of(every) == every


SLURM = {"ID": "9", "COUNT": "4", "MIN": "5", "MAX": "11", "STEP": "2"}  # 5, 7, 9, 11
ARRAY = {f"SLURM_ARRAY_TASK_{name}": value for name, value in SLURM.items()}
KUBERNETES = {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}


@pytest.mark.parametrize(("variables", "share"), [(ARRAY, (2, 4)), (KUBERNETES, (0, 2))])
def test_a_job_array_gives_its_share(monkeypatch, variables, share):
    assert "share=array finds no job array" in refusal(Share.parse, "array")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Share.parse("array") == share


def test_a_job_array_with_gaps_is_refused(monkeypatch):
    for name, value in {**ARRAY, "SLURM_ARRAY_TASK_MAX": "13"}.items():
        monkeypatch.setenv(name, value)
    said = refusal(Share.parse, "array")
    assert "share=array: the 4 tasks of the array are not every" in said


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "1/0", "a/b", "1/2/3", ""])
def test_a_share_that_is_none_is_refused(text):
    assert " is wrong: it must be of the form '0/8'" in refusal(Share.parse, text)


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert "JAX_NUM_PROCESSES is 'two': it must be a whole number" in refusal(hosts.join)
