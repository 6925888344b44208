"""What is shown of training: the bar, the lines, TensorBoard's files."""

import dataclasses
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxnorm.config import Config, SweptNet, UserError
from jaxnorm.records import Epoch
from jaxnorm.runs import callbacks
from jaxnorm.runs.callbacks import Bar, TensorBoard, require_tensorboard
from jaxnorm.storage.net import Saved
from jaxnorm.storage.sweep import Sweep

EPOCH = Epoch("batch", 1, 1, 1.5, 0.25, 1.25, 0.5, 3.0, 1.0)


def events(path):
    """The scalars in the one file of a folder, in order: (name, step, value)."""
    (file,) = path.iterdir()
    content, scalars = file.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    return scalars


def test_tensorboard_has_every_loss_and_accuracy_of_each_net(scratch):
    board = TensorBoard(Sweep(scratch / "t", [Config()]), [])
    board.on_epoch(Config(), EPOCH)
    board.close()
    assert events(scratch / "t" / "tensorboard" / "batch-1") == [
        ("loss/train", 1, 1.5),
        ("accuracy/train", 1, 0.25),
        ("loss/test", 1, 1.25),
        ("accuracy/test", 1, 0.5),
    ]
    configs = [Config(batch_size=64), Config(batch_size=32)]
    board = TensorBoard(Sweep(scratch / "s", configs), [])
    board.on_epoch(configs[0], EPOCH)
    board.close()
    (made,) = (scratch / "s" / "tensorboard").iterdir()
    assert made.name == "batch-64-rate-0.01-batch-1"


def test_of_a_run_that_resumes_the_epochs_before_are_written_where_none_are(scratch):
    config = Config(norm="batch,layer")
    sweep = Sweep(scratch, [config])
    for norm in ("batch", "layer"):
        lines = [
            dataclasses.replace(EPOCH, norm=norm, epoch=number, test_loss=number / 2)
            for number in (1, 2)
        ]
        none = np.zeros(0, np.float32)
        sweep.net(SweptNet(0, norm, 1)).commit(Saved(lines, [], {}, none, none, none))
    (scratch / "tensorboard" / "layer-1").mkdir(parents=True)
    board = TensorBoard(sweep, sweep.nets)
    board.on_resume(4)
    board.on_epoch(config, dataclasses.replace(EPOCH, epoch=3))
    board.close()
    written = events(scratch / "tensorboard" / "batch-1")
    losses = [(step, value) for name, step, value in written if name == "loss/test"]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.25)]
    assert list((scratch / "tensorboard" / "layer-1").iterdir()) == []


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install"):
        require_tensorboard()


class Waits:
    """Stands for the event that a bar is closed: it comes after some waits, which move a clock."""

    def __init__(self, clock, waits):
        self.clock, self.waits = clock, waits

    def wait(self, seconds):
        self.waits -= 1
        self.clock.now += seconds * (self.waits >= 0)
        return self.waits < 0

    def is_set(self):
        return False


@pytest.mark.parametrize(("quiet", "terminal"), [(False, False), (False, True), (True, False)])
def test_what_goes_on_is_said_every_five_seconds(monkeypatch, capsys, quiet, terminal):
    clock, threads = SimpleNamespace(now=1_000.0), []

    class Thread(SimpleNamespace):
        def start(self):
            threads.append(self)

    locks = {"RLock": threading.RLock, "Event": threading.Event}
    monkeypatch.setattr(callbacks, "threading", SimpleNamespace(**locks, Thread=Thread))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr(Bar, "SECONDS", 5.0)
    monkeypatch.setattr(Bar, "_spoken", 0.0)
    monkeypatch.setattr(Bar, "_shown", 0.0)
    bar = Bar(quiet)
    for what, total in (("compiling the training step", 0), ("importing the images", 60_000)):
        bar.show(what, 0, total)
        for thread in threads[-1:]:
            closed, *at = thread.args
            bar.show(what, total // 2, total)
            thread.target(Waits(clock, 2), *at)
            assert not closed.is_set()
    bar.close()
    printed = capsys.readouterr().err
    if quiet:
        assert (printed, threads) == ("", [])
    elif terminal:
        assert "compiling the training step (" in printed
        assert "importing the images:  50%" in printed
        assert "\n" not in printed
    else:
        assert printed.splitlines() == [
            "compiling the training step (5 s)",
            "compiling the training step (10 s)",
            "importing the images: 30,000 of 60,000 (5 s)",
            "importing the images: 30,000 of 60,000 (10 s)",
        ]


def test_a_run_on_a_terminal_says_each_part_and_its_line_stands_alone(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(Bar, "show", lambda bar, what, done=0, total=0: shown.append(what))
    terminal = callbacks.Terminal([Config(norm="batch,none", epochs=2)], 2, quiet=False)
    for norm in ("batch", "none"):
        terminal.on_start(norm, [1], 4)
        for number in (1, 2):
            terminal.on_steps(number, 4)
            terminal.on_epoch(Config(epochs=2), dataclasses.replace(EPOCH, epoch=number))
        terminal.on_measuring(0, 3)
        terminal.on_measuring(3, 3)
    terminal.close()
    wanted = []
    for norm in ("batch norm", "no norm"):
        net = f"{norm}, seed 1"
        wanted.append(f"compiling the training step of {norm}")
        for number in (1, 2):
            at = f"{net}, epoch {number} of 2"
            wanted += [at, f"{at}: evaluating", net if number == 1 else "after the last epoch"]
        wanted += 2 * ["measuring inside the net"] + ["writing what was measured"]
    assert shown == ["preparing the nets", *wanted]
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("   batch  epoch") for line in lines)
    assert len(lines) == 4
