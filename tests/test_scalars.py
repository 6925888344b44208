"""TensorBoard's files: what is in them is what the epochs say."""

import struct

import pytest

from jaxnorm import scalars
from jaxnorm.config import UserError
from jaxnorm.records import Epoch


def events(path):
    """The scalars of an event file: {tag: {step: value}}."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_each_net_has_its_scalars(tmp_path):
    observer = scalars.Scalars(tmp_path)
    for norm, seed, epoch in (("batch", 1, 1), ("batch", 1, 2), ("layer", 2, 1)):
        held_out = {"validation_loss": 1.5, "validation_accuracy": 0.75} if norm == "layer" else {}
        observer.on_epoch(Epoch(norm, seed, epoch, 2.0, 0.25, 1.0 / epoch, 0.5, 3, 4, **held_out))
    observer.close()
    found = {path.name: events(next(path.iterdir())) for path in tmp_path.iterdir()}
    assert set(found) == {"batch-1", "layer-2"}
    assert found["batch-1"] == {
        "loss/train": {1: 2.0, 2: 2.0},
        "accuracy/train": {1: 0.25, 2: 0.25},
        "loss/test": {1: 1.0, 2: 0.5},
        "accuracy/test": {1: 0.5, 2: 0.5},
    }
    assert found["layer-2"]["accuracy/validation"] == {1: 0.75}


def test_without_the_extra_one_is_told_of_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install .*tensorboard"):
        scalars.Scalars.check()
