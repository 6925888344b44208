"""TensorBoard's files."""

import sys

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from jaxnorm.config import Config, UserError
from jaxnorm.runs.callbacks import TensorBoard
from jaxnorm.storage.schema import Epoch

EPOCH = Epoch("batch", 1, 1, 1.5, 0.25, 1.25, 0.5, 3.0, 1.0)


def events(path):
    """The scalars in the one file of a folder: {name: value}."""
    (file,) = path.iterdir()
    content, scalars = file.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        scalars.update({value.tag: value.simple_value for value in event.summary.value})
        content = content[16 + size :]
    return scalars


def test_tensorboard_has_every_loss_and_accuracy_of_each_net(scratch):
    assert RecordWriter
    board = TensorBoard(scratch / "t")
    board.on_epoch(Config(), EPOCH)
    board.close()
    scalars = events(scratch / "t" / "batch-1")
    assert scalars == {
        "loss/train": 1.5,
        "accuracy/train": 0.25,
        "loss/test": 1.25,
        "accuracy/test": 0.5,
    }
    board = TensorBoard(scratch / "s", sweep=True)
    board.on_epoch(Config(batch_size=64), EPOCH)
    board.close()
    assert [path.name for path in (scratch / "s").iterdir()] == ["batch-64-rate-0.01-batch-1"]


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, scratch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install"):
        TensorBoard(scratch)
