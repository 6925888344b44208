"""Nets spread over devices, and batches that devices share: shapes, choice and refusals.

The child has eight devices (this process has two).
"""

import os
import subprocess
import sys

import jax
import joblib
import numpy as np
import pytest

from jaxnorm.config import Config, UserError
from jaxnorm.training import mesh as meshes
from jaxnorm.training.epoch import train_nets
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.mesh import ONE, MeshShape

EIGHT = """
import dataclasses, os
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
import jax, nets, numpy as np
from jaxnorm import Config, fit, load
from jaxnorm.training.mesh import MeshShape

digits = load("digits")
parts = {"train_images": 176, "train_labels": 176, "test_images": 61, "test_labels": 61}
few = {name: getattr(digits, name)[:count] for name, count in parts.items()}
config = Config("batch", "every-kind", "digits", 1, 48, 0.01, seeds=6, validation=32)
one, spread = (
    fit(config, dataclasses.replace(digits, **few), mesh=MeshShape(rows)) for rows in (1, 8)
)
for net in config.nets:
    for get in (lambda net: net.step_losses, lambda net: net.logits, lambda net: net.state):
        same = jax.tree.map(np.array_equal, get(one[net]), get(spread[net]))
        assert all(jax.tree.leaves(same)), net
    records = [dataclasses.replace(each[net].epochs[0], train_seconds=0, test_seconds=0)
               for each in (one, spread)]
    assert records[0] == records[1], net
assert (spread["batch", 1].step_losses != spread["batch", 6].step_losses).all()
"""


def test_every_core_of_a_containers_share_is_a_device(monkeypatch):
    devices = []
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)  # of 64, say: it knows what Linux allows
    monkeypatch.setattr(meshes.jax.config, "update", lambda name, value: devices.append(value))
    meshes.use_all_cores()
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    meshes.use_all_cores()
    assert devices == [3]


@pytest.mark.slow
def test_on_eight_devices_each_net_is_as_on_one_bit_for_bit(tmp_path, monkeypatch):
    """Six nets on eight rows, so that places are left empty, with images held out."""
    command = [sys.executable, "-c", EIGHT]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("devices", "nets", "size", "shape"),
    [
        (2, 1, 31, (1, 1)),
        (2, 1, 32, (1, 2)),
        (2, 1, 33, (1, 1)),
        (2, 1, 34, (1, 2)),
        (2, 5, 128, (2, 1)),
        (8, 1, 128, (1, 8)),
        (8, 1, 16, (1, 1)),
        (8, 2, 100, (2, 4)),
        (8, 3, 128, (2, 4)),
        (8, 9, 4, (8, 1)),
    ],
)
def test_rows_for_nets_come_first_and_then_devices_share_what_they_divide_into_enough_each(
    monkeypatch, devices, nets, size, shape
):
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    assert meshes.choose(nets, size) == MeshShape(*shape)


@pytest.mark.parametrize(
    ("shape", "shared"),
    [(ONE, [False, False]), (MeshShape(2), [False, False]), (MeshShape(1, 2), [True, True])],
)
def test_devices_of_a_batch_axis_share_each_batch_that_they_divide(tiny, shape, shared):
    """They add up their gradients, which those that train nets of their own do not; also of the
    ragged batch, of 67 - 64 = 3 images, which is filled up.
    """
    config = Config("layer", "three-layers", "tiny", 1, 16, validation=3)
    group = next(Experiment([config], tiny, shape).groups())
    chunks, of_epoch = group.chunks(1)
    states = group.states([None])
    texts = [
        train_nets.lower(*group.arguments(states, chunk, of_epoch)).as_text()
        for chunk in (chunks[0], chunks[-1])
    ]
    assert ["all_reduce" in text for text in texts] == shared


def test_a_mesh_is_read_as_it_is_written():
    for text, shape in (
        ("seed=4,batch=2", (4, 2)),
        ("batch=3", (1, 3)),
        ("batch=2,seed=1", (1, 2)),
    ):
        assert MeshShape.parse(text) == MeshShape.parse(str(MeshShape(*shape))) == MeshShape(*shape)


def test_another_mesh_is_refused():
    for text in ("", "4", "seed=0", "seed=-1", "rows=2", "seed=2;batch=2", "seed="):
        with pytest.raises(UserError, match="must be of the form 'seed=4,batch=2'"):
            MeshShape.parse(text)


def test_a_mesh_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="takes 6 devices: there are 2"):
        MeshShape(3, 2).check(32)
    with pytest.raises(UserError, match="cannot share batches of 33 images"):
        MeshShape(1, 2).check(33)


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("PLATFORMS", RuntimeError("Unable to\ninitialize 'x'"), "Unable to initialize 'x'"),
        ("PLATFORMS", AssertionError(), "JAX has no plugin for them"),  # of cuda without its plugin
        ("PLATFORM_NAME", RuntimeError("Unknown backend x"), "Unknown backend x"),
        ("NUM_CPU_DEVICES", RuntimeError("Unable to initialize"), "Unable to initialize"),
    ],
)
def test_devices_that_do_not_start_are_refused_in_one_line(monkeypatch, name, error, reason):
    def fail():
        raise error

    meshes.check_devices()
    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match=r"of this machine \(.*\): set JAX_PLATFORMS=cpu"):
        meshes.check_devices()
    monkeypatch.setenv(f"JAX_{name}", "x")
    refused = rf"^JAX cannot .* of JAX_{name}='x' \({reason}\): unset JAX_{name}, or"
    with pytest.raises(UserError, match=refused):
        meshes.check_devices()


def test_what_is_placed_is_fetched_and_lies_where_it_should():
    values = {"a": np.arange(8, dtype=np.float32).reshape(4, 2)}
    for shape, by_net, rows in ((ONE, True, 4), (MeshShape(2), False, 4), (MeshShape(2), True, 2)):
        placed = meshes.place(shape, values, by_net)["a"]
        assert len(placed.addressable_shards) == shape.devices
        assert {shard.data.shape for shard in placed.addressable_shards} == {(rows, 2)}
        np.testing.assert_array_equal(meshes.fetch({"a": placed})["a"], values["a"])
