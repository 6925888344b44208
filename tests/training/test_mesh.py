"""Nets spread over eight simulated devices, and batches that devices share: the same results.

The children have eight devices (this process has two); what they train is compared here.
"""

import json
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
import dataclasses, json, os, sys
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
import jax, numpy as np
from jaxnorm.data import datasets as data
from jaxnorm.training import mesh as meshes
from jaxnorm.training.fit import fit
from jaxnorm.config import Config
from jaxnorm.training.mesh import MeshShape

digits = data.load("digits")
few = {"train_images": digits.train_images[:176], "train_labels": digits.train_labels[:176],
       "test_images": digits.test_images[:61], "test_labels": digits.test_labels[:61]}
digits = dataclasses.replace(digits, **few)
same = {}
for norm, arch, batch in (("batch", "original", 48), ("layer", "matched", 44)):
    held_out = 32 if norm == "batch" else 0  # 144 and 176 images
    config = Config(norm, arch, "digits", 1, batch, 0.01, seeds=6, validation=held_out)
    one, spread = (
        fit(config, digits, mesh=MeshShape(rows)) for rows in (1, 8)
    )
    for net in one:
        pairs = [
            (one[net].step_losses, spread[net].step_losses), (one[net].logits, spread[net].logits),
            *zip(jax.tree.leaves(one[net].state), jax.tree.leaves(spread[net].state)),
        ]
        records = [dataclasses.replace(each[net].epochs[0], train_seconds=0, test_seconds=0)
                   for each in (one, spread)]
        same[f"{norm} {net[1]}"] = records[0] == records[1] and all(
            np.array_equal(a, b) for a, b in pairs
        )
    different = not np.array_equal(spread[norm, 1].step_losses, spread[norm, 6].step_losses)
    same[f"{norm} seeds differ"] = different
chosen = [str(meshes.choose(nets, size)) for nets, size in
          ((1, 128), (3, 128), (8, 128), (1, 16), (9, 4), (2, 100))]
print(json.dumps({"same": same, "chosen": chosen}))
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
def test_on_eight_devices_each_net_is_as_on_one_bit_for_bit(tmp_path):
    """Six nets on eight rows, so that places are left empty; once with images held out."""
    done = subprocess.run(
        [sys.executable, "-c", EIGHT], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results["same"]) == 14
    assert all(results["same"].values()), results["same"]
    assert results["chosen"] == [
        "seed=1,batch=8",
        "seed=2,batch=4",
        "seed=8,batch=1",
        "seed=1,batch=1",
        "seed=8,batch=1",
        "seed=2,batch=4",
    ]


def test_devices_share_what_they_divide_into_enough_each():
    shares = [meshes.choose(1, size).batch for size in (31, 32, 33, 34, 128)]
    assert shares == [1, 2, 1, 2, 2]
    assert [str(meshes.choose(nets, 128)) for nets in (1, 2, 5)] == [
        "seed=1,batch=2",
        "seed=2,batch=1",
        "seed=2,batch=1",
    ]


def test_nets_come_first_in_a_job_of_several_processes_and_no_device_is_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert str(meshes.choose(3, 16)) == "seed=8,batch=1"  # five places are left empty
    assert str(meshes.choose(3, 128)) == "seed=2,batch=4"
    with pytest.raises(UserError, match="must take all of its 8"):
        MeshShape(4).check(16)
    MeshShape(4, 2).check(16)


@pytest.mark.parametrize(
    ("shape", "shared"), [(ONE, False), (MeshShape(2), False), (MeshShape(1, 2), True)]
)
def test_devices_of_a_batch_axis_share_each_batch(tiny, shape, shared):
    """They add up their gradients, which those that train nets of their own do not."""
    config = Config("layer", "three-layers", "tiny", 1, 16)
    group = next(Experiment([config], tiny, shape).groups())
    (chunk, *_), of_epoch = group.chunks(1)
    arguments = group.arguments(group.states([None]), chunk, of_epoch)
    assert ("all_reduce" in train_nets.lower(*arguments).as_text()) == shared


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("seed=4,batch=2", MeshShape(4, 2)),
        ("batch=3", MeshShape(1, 3)),
        ("batch=2,seed=1", MeshShape(1, 2)),
    ],
)
def test_a_mesh_is_read_as_it_is_written(text, shape):
    assert MeshShape.parse(text) == shape
    assert MeshShape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text", ["", "4", "seed=0", "seed=-1", "rows=2", "seed=2;batch=2", "seed="]
)
def test_another_mesh_is_refused(text):
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


def test_processes_take_the_least_of_what_they_measure(monkeypatch):
    assert meshes.least(7) == 7
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def gathered(number):
        return np.array([number, np.int32(3)])

    monkeypatch.setattr(meshes.multihost_utils, "process_allgather", gathered)
    assert (meshes.least(7), meshes.least(2), meshes.least(2**40)) == (3, 2, 3)
