"""Checkpoints: one file each, whole or told to be damaged, the newest two kept."""

import chex
import jax
import numpy as np
import pytest

from jaxnorm.config import UserError
from jaxnorm.storage import checkpoint
from jaxnorm.storage.directory import RunDirectory

NET = ("batch", 1)
VALUES = {
    "state": {"c": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(7)},
    "losses": np.ones(4, np.float32),
}
SHAPES = {
    "state": {"c": np.zeros((2, 3), np.float32), "n": np.int32(0)},
    "losses": np.zeros(0, np.float32),
}


def scaled(epoch):
    return jax.tree.map(lambda leaf: leaf * leaf.dtype.type(epoch), VALUES)


@pytest.fixture
def run(scratch):
    made = RunDirectory(scratch)
    for epoch in (1, 2, 3):
        checkpoint.save(made, NET, epoch, scaled(epoch))
    return made


def path_of(run, epoch=3):
    return run.path / "checkpoints" / "batch-1" / f"epoch-{epoch}.msgpack"


def test_the_newest_two_are_kept_and_read_back(run):
    assert checkpoint.epochs(run, NET) == [2, 3]
    for epoch in (2, 3):
        chex.assert_trees_all_equal(checkpoint.restore(run, NET, epoch, SHAPES), scaled(epoch))
    assert checkpoint.epochs(run, ("group", 1)) == []


def test_one_flipped_bit_anywhere_is_damage(run):
    content = path_of(run).read_bytes()
    for place in range(0, len(content), 7):
        wrong = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        path_of(run).write_bytes(wrong)
        with pytest.raises(checkpoint.Damaged, match="checksum"):
            checkpoint.restore(run, NET, 3, SHAPES)
    for length in (0, 10, 32, len(content) - 1):
        path_of(run).write_bytes(content[:length])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.restore(run, NET, 3, SHAPES)


def test_a_checkpoint_of_other_layers_is_damage(run):
    for other in (
        {**SHAPES, "state": {"c": np.zeros((3, 3), np.float32), "n": np.int32(0)}},
        {**SHAPES, "state": {"c": np.zeros((2, 3), np.float16), "n": np.int32(0)}},
        {**SHAPES, "state": {"d": np.zeros((2, 3), np.float32), "n": np.int32(0)}},
    ):
        with pytest.raises(checkpoint.Damaged):
            checkpoint.restore(run, NET, 3, other)


def test_what_is_damaged_is_set_aside_and_not_deleted(run):
    content = path_of(run).read_bytes()
    aside = checkpoint.set_aside(run, NET, 3)
    assert aside.read_bytes() == content
    assert checkpoint.epochs(run, NET) == [2]


def test_what_cannot_be_read_is_an_oserror(run, monkeypatch):
    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("os.open", stale)
    with pytest.raises(OSError, match="Stale"):
        checkpoint.restore(run, NET, 3, SHAPES)


def test_a_folder_that_cannot_be_read_is_an_oserror_and_not_empty(run, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(f"os.{name}", forbidden)
    with pytest.raises(PermissionError):
        checkpoint.epochs(run, NET)


def test_names_that_are_not_its_own_are_left_alone(run):
    stray = path_of(run).with_name("mine.txt")
    stray.write_text("x")
    checkpoint.save(run, NET, 4, scaled(4))
    assert stray.exists()
    assert checkpoint.epochs(run, NET) == [3, 4]


def test_a_link_out_of_the_run_is_refused(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "epoch-1.msgpack").write_text("mine")
    (run.path / "checkpoints" / "group-1").symlink_to(outside)
    for act in (
        lambda: checkpoint.save(run, ("group", 1), 5, VALUES),
        lambda: checkpoint.epochs(run, ("group", 1)),
        lambda: checkpoint.restore(run, ("group", 1), 1, SHAPES),
    ):
        with pytest.raises(UserError, match="is a link"):
            act()
    assert [file.name for file in outside.iterdir()] == ["epoch-1.msgpack"]
