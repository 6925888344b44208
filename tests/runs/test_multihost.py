"""Jobs of several real processes over loopback: the results of one, and what is said of a lost one.

Every process has a device of its own. The reference is one process with one device.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import nets
import numpy as np
import pytest

from jaxnorm.config import UserError, study
from jaxnorm.data import datasets as data
from jaxnorm.runs import multihost, runner
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.training.fit import fit
from jaxnorm.training.mesh import ONE

pytestmark = pytest.mark.slow
DIGITS = {"dataset": "digits", "learning_rate": 0.01}
CONFIG = study(norm="layer", arch="three-layers", epochs=6, batch_size=479, seeds=4, **DIGITS)
COMMAND = [nets.__file__, "--distributed", "--skip-self-check"]
ARGUMENTS = [
    *("--norm", "layer", "--arch", "three-layers", "--dataset", "digits", "--epochs", "6"),
    *("--batch-size", "479", "--seeds", "4", "--learning-rate", "0.01"),
]
"""479 is a third of the digits: no batch is ragged, and fewer programs are compiled."""
PATIENCE = 240
HERE = Path(__file__).parent
FIT = """
import sys
import numpy as np
from jaxnorm.runs import multihost
from jaxnorm.training.fit import fit
from jaxnorm.training.mesh import MeshShape
sys.path[:0] = sys.argv[4:]
from test_multihost import config_of, few

multihost.join()
fits = fit(config_of(sys.argv[1]), few(), mesh=MeshShape.parse(sys.argv[2]))
if multihost.is_process_0():
    losses = {str(seed): fit.step_losses for (_, seed), fit in fits.items()}
    np.savez(sys.argv[3], **losses)
"""


def without_times(epoch):
    return dataclasses.replace(epoch, train_seconds=0.0, test_seconds=0.0)


def few():
    """The first of the digits: three whole batches."""
    digits = data.load("digits")
    train, test = slice(192), slice(64)
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[train],
        train_labels=digits.train_labels[train],
        test_images=digits.test_images[test],
        test_labels=digits.test_labels[test],
    )


def config_of(norm):
    return study(norm=norm, arch="original", epochs=1, batch_size=64, seeds=2, **DIGITS)


def start(count, *arguments):
    """Starts the processes of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "JAX_NUM_CPU_DEVICES": "1",
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
        )
        for index in range(count)
    ]


def finish(processes):
    """Their exit codes, and what each said on standard error."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return (
        [process.returncode for process in processes],
        [error for _, error in outputs],
        outputs[0][0],
    )


def test_processes_that_share_batches_train_what_one_does(tmp_path):
    """Batch norm's statistics are those of both. Losses differ by rounding: by less than a
    hundred-thousandth in three steps (long training enlarges it).
    """
    arguments = ["-c", FIT, "batch", "seed=1,batch=2", tmp_path / "losses.npz"]
    processes = start(2, *arguments, HERE, HERE.parent)
    wanted = fit(config_of("batch"), few(), mesh=ONE)
    codes, errors, _ = finish(processes)
    assert codes == [0, 0], errors
    with np.load(tmp_path / "losses.npz") as losses:
        for (_, seed), trained in wanted.items():
            assert trained.step_losses.shape == (3,)
            np.testing.assert_allclose(losses[str(seed)], trained.step_losses, rtol=1e-5)


def test_a_lost_process_ends_the_others_and_two_go_on_to_the_same_results(scratch):
    """Of four nets, one on each process at first; then two by two: the bits of one device."""
    path = scratch / "run"
    processes = start(4, *COMMAND, *ARGUMENTS, "--out", path)
    limit = time.monotonic() + PATIENCE
    while not (path / "metrics.jsonl").exists() and processes[0].poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    processes[2].kill()
    killed = time.monotonic()
    codes, errors, _ = finish(processes)
    assert time.monotonic() - killed < 60
    assert codes == [multihost.LOST, multihost.LOST, -signal.SIGKILL, multihost.LOST], errors
    for error in (errors[0], errors[1], errors[3]):
        assert error.count("error: another process of this job was lost, so this one stops") == 1
        assert "resume it with: python -m jaxnorm.run --resume" in error.splitlines()[-1]
        assert "Traceback" not in error
    complete = (path / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(complete) < 24
    codes, errors, printed = finish(start(2, *COMMAND, "--resume", path))
    assert codes == [0, 0], errors
    assert f"resuming after {len(complete)} of 24 epochs" in printed
    assert {*complete} <= {*(path / "metrics.jsonl").read_text().splitlines()}  # not trained again
    info, epochs = RunDirectory(path).info(), RunDirectory(path).epochs()
    whole = fit(CONFIG, data.load("digits"), mesh=ONE)
    for (norm, seed), trained in whole.items():
        of_seed = [epoch for epoch in epochs if epoch.seed == seed]
        assert list(map(without_times, of_seed)) == list(map(without_times, trained.epochs))
        _, state = runner.load_state(path, norm, seed)
        chex.assert_trees_all_equal(jax.device_get(state), trained.state)
    assert (info.environment.mesh, info.resumed[0].mesh) == ("seed=4,batch=1", "seed=2,batch=1")
    assert ", 4 processes" in info.environment.device
    assert (path / "report.html").exists()


AGREE = """
import sys
from jaxnorm import cli
from jaxnorm.runs import multihost
from jaxnorm.config import UserError

def fail():
    if what == "one fails" and not multihost.is_process_0():
        raise UserError("no such data here")
    if what == "the first fails" and multihost.is_process_0():
        raise UserError("the disk is gone")
    return multihost.jax.process_index()

def work(arguments, **options):
    assert multihost.in_every_process(fail) == multihost.jax.process_index()
    assert multihost.from_process_0(lambda: {"a": [1, "\\u00fc"]}) == {"a": [1, "\\u00fc"]}
    zeros, flags = multihost.np.zeros(2, "f4"), multihost.np.array([True, False, False])
    mine = [-zeros, flags, flags[0]] if multihost.is_process_0() else [zeros, ~flags, ~flags[0]]
    zeros, *same = multihost.arrays_from_process_0(mine)
    assert multihost.np.signbit(zeros).all()
    assert [array.tolist() for array in same] == [[True, False, False], True]
    multihost.agree(data="same")
    mine = str(multihost.jax.process_index()) if what == "data differ" else ""
    multihost.agree(data=what + mine)
    return 0

work.name = ("python -m x",)  # as a command has one
what = sys.argv[1]
multihost.join()
cli.before_failing(multihost.leave)
cli.leave(cli.run(work, []))
"""


@pytest.mark.parametrize(
    ("what", "codes", "message"),
    [
        ("all agree", [0, 0], ["", ""]),
        ("data differ", [2, 2], ["do not have the same data: process 1"] * 2),
        (
            "one fails",
            [2, 2],
            ["process 1 of this job stopped: no such data", "error: no such data"],
        ),
        ("the first fails", [2, 2], ["error: the disk is gone", "process 0 of this job stopped"]),
    ],
)
def test_processes_agree_or_all_stop(what, codes, message):
    exit_codes, errors, _ = finish(start(2, "-c", AGREE, what))
    assert exit_codes == codes, errors
    for error, text in zip(errors, message, strict=True):
        assert text in error


def test_a_job_that_nothing_describes_is_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "jaxnorm.run", "--distributed", "--dataset", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --distributed cannot join a job (")
    assert done.stderr.count("\n") == 1
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two': it must be a whole number"):
        multihost.join()


def test_a_first_process_that_is_not_there_is_told():
    code = (
        "import os; os.environ.update(JAX_NUM_PROCESSES='2', JAX_PROCESS_ID='1');"
        "from jaxnorm.runs import multihost; multihost.JOINING_SECONDS = 2; multihost.join()"
    )
    codes, errors, _ = finish(start(1, "-c", code))
    assert codes == [multihost.LOST]
    assert "error: process 0 of this job was not reached in 2 s" in errors[0]


def test_alone_a_process_agrees_with_itself():
    assert multihost.is_process_0()
    assert not multihost.joined()
    assert multihost.from_process_0(lambda: [1]) == [1]
    assert multihost.in_every_process(lambda: 2) == 2
    multihost.agree(anything="x")
    with multihost.watched("go on"):
        pass
    values = dataclasses.asdict(CONFIG)
    assert multihost.arrays_from_process_0(values) is values
    assert json.dumps(values)
