"""TensorBoard's files."""

import dataclasses
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxnorm.config import Config, SweptNet, UserError
from jaxnorm.records import Epoch
from jaxnorm.runs.callbacks import TensorBoard, require_tensorboard
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
