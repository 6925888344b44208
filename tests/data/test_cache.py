"""Directories: the system's own customs, and privacy."""

import os
import pwd
from pathlib import Path

import pytest
from helpers import refusal

from jaxnorm.config import local_path
from jaxnorm.data import cache as places


def test_the_environment_decides_where_data_and_caches_lie(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "~/somewhere")
    assert places.default_data_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert places.default_data_dir() == Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert places.default_cache_dir() == Path("/some/cache/jaxnorm")


@pytest.mark.parametrize("home", ["", None])
def test_without_a_home_only_what_needs_one_is_refused(monkeypatch, home):
    for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no such user"])
    assert places.default_cache_dir() is None
    assert "no home directory" in refusal(places.default_data_dir)
    monkeypatch.setenv("TFDS_DATA_DIR", "/data")
    assert places.default_data_dir() == Path("/data")
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://tfds-data/datasets")
    assert "gs://tfds-data/datasets is an address" in refusal(places.default_data_dir)
    assert "home folder" in refusal(local_path, "~/run")


def test_a_private_directory_is_made_private_or_not_used(scratch, monkeypatch):
    made = places.private_directory(scratch / "a" / "b")
    assert made is not None
    assert made.stat().st_mode & 0o077 == 0
    made.chmod(0o777)
    assert places.private_directory(made) == made
    assert made.stat().st_mode & 0o077 == 0
    (scratch / "file").write_text("x")
    assert places.private_directory(scratch / "file") is None
    assert places.private_directory(scratch / "file" / "in") is None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert places.private_directory(made) is None
