"""Checkpoints: whole or absent, two kept, and any damage to any file of one detected."""

import errno

import chex
import jax
import numpy as np
import pytest

from jaxnorm import checkpoints

STATE = {
    "params": {"c": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "batch_stats": {},
    "opt_state": (np.ones(4, np.float32),),
}
SHAPES = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), STATE)


def scaled(epoch):
    return jax.tree.map(lambda each: each * epoch, STATE)


@pytest.fixture
def path(scratch):
    with checkpoints.writer(scratch / "batch-1") as writer:
        for epoch in (1, 2, 3):
            writer.save(epoch, scaled(epoch))
    return scratch / "batch-1"


def test_the_newest_two_are_kept_and_read_back(path):
    assert checkpoints.epochs(path) == [2, 3]
    for epoch in (2, 3):
        chex.assert_trees_all_equal(checkpoints.restore(path, epoch, SHAPES), scaled(epoch))
    assert checkpoints.epochs(path.parent / "none") == []


def files(path):
    return sorted(each for each in (path / "3").rglob("*") if each.is_file())


def test_one_flipped_bit_in_any_file_is_damage(path):
    for file in files(path):
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(checkpoints.Damaged, match="3 is damaged"):
                checkpoints.restore(path, 3, SHAPES)
        file.write_bytes(content)
    chex.assert_trees_all_equal(checkpoints.restore(path, 3, SHAPES), scaled(3))


def test_a_file_too_few_or_too_many_is_damage(path):
    (path / "3" / "more").write_text("x")
    with pytest.raises(checkpoints.Damaged):
        checkpoints.restore(path, 3, SHAPES)
    (path / "3" / "more").unlink()
    for file in files(path):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(checkpoints.Damaged):
            checkpoints.restore(path, 3, SHAPES)
        file.write_bytes(content)


def test_a_checkpoint_of_other_shapes_cannot_be_read(path):
    other = {**SHAPES, "params": {"c": jax.ShapeDtypeStruct((3, 3), np.float32)}}
    with pytest.raises(checkpoints.Damaged, match="other layers"):
        checkpoints.restore(path, 3, other)


def test_what_is_newer_or_half_written_is_forgotten(path):
    (path / "4.orbax-checkpoint-tmp").mkdir()
    (path / "stray").write_text("x")
    checkpoints.forget_after(path, 2)
    assert [each.name for each in path.iterdir()] == ["2"]
    with checkpoints.writer(path) as writer:
        writer.save(3, scaled(7))
    chex.assert_trees_all_equal(checkpoints.restore(path, 3, SHAPES), scaled(7))
    checkpoints.forget_after(path / "none", 2)


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (ValueError("RESOURCE_EXHAUSTED: write failed"), errno.ENOSPC, "No space left on device"),
        (ValueError("a bad\nday"), errno.EIO, "a bad day"),
        (OSError(30, "Read-only file system"), errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_fails_is_an_oserror_that_names_the_checkpoint(
    path, monkeypatch, error, number, text
):
    with checkpoints.writer(path) as writer:

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(writer._manager, "save", fail)
        with pytest.raises(OSError, match=text) as raised:
            writer.save(4, STATE)
    assert raised.value.errno == number
    assert raised.value.filename == str(path / "4")
