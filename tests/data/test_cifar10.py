"""Archives: the two official kinds, checks before and while reading, and imports that are whole."""

import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Evil

from jaxnorm.config import UserError
from jaxnorm.data import cifar10 as archive
from jaxnorm.data import datasets as data
from jaxnorm.data import prepared

PARTS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Batches of 20 images stand for the official 10,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_PER_FILE", 20)
        yield


def drawn(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[20, 32, 32, 3] and labels u8[20] of a part."""
    rng = np.random.default_rng(PARTS.index(part))
    return rng.integers(0, 256, (20, 32, 32, 3), np.uint8), rng.integers(0, 10, 20).astype(np.uint8)


def binary(part: str) -> bytes:
    images, labels = drawn(part)
    planes = images.transpose(0, 3, 1, 2).reshape(20, -1)
    return np.concatenate([labels[:, None], planes], 1).tobytes()


def python_pickle(part: str) -> bytes:
    """As the official files: byte-string keys. Protocol 4, as Python 3 would call codecs in 2."""
    images, labels = drawn(part)
    planes = images.transpose(0, 3, 1, 2).reshape(20, -1).copy()
    values = {
        b"data": planes,
        b"labels": labels.tolist(),
        b"batch_label": b"",
        b"filenames": [b"x"],
    }
    return pickle.dumps(values, protocol=4)


def python2_pickle(part: str) -> bytes:
    """As Python 2 wrote the official files, opcode by opcode: its strings are bytes."""
    images, labels = drawn(part)
    planes = images.transpose(0, 3, 1, 2).tobytes()

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b")
    kind = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|")
    kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"T" + len(planes).to_bytes(4, "little") + planes
    array += b"tR(K\x01K\x14M\x00\x0c\x86" + kind + b"\x89" + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def make(path: Path, kind: str = "bin", mode: Any = "w:gz", **changes) -> Path:
    """Writes an archive; `changes` replaces a part's content, or leaves it out where it is None."""
    folder = {"bin": "cifar-10-batches-bin", "py": "cifar-10-batches-py"}[kind]
    content = {part: (binary if kind == "bin" else python_pickle)(part) for part in PARTS} | changes
    with tarfile.open(path, mode) as tar:
        for part, values in content.items():
            if values is not None:
                info = tarfile.TarInfo(f"{folder}/{part}{'.bin' if kind == 'bin' else ''}")
                info.size = len(values)
                tar.addfile(info, io.BytesIO(values))
    return path


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(directory: Path, source: Path, **options):
    return data.load(
        "cifar10", directory / "tfds", str(source), cache_dir=directory / "c", **options
    )


@pytest.fixture
def counts(monkeypatch):
    """`load` then expects 100 and 20 images of CIFAR-10."""
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (100, 20))


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_both_kinds_are_imported_where_any_tfds_user_finds_them(scratch, kind, counts, monkeypatch):
    import tensorflow_datasets as tfds

    source = make(scratch / f"{kind}.tar.gz", kind)
    if kind == "py":  # a pickle is read of the official archive alone
        monkeypatch.setitem(archive.OFFICIAL, digest_of(source), "the official one")
    dataset = load(scratch, source, allow_unverified=True)
    assert dataset.train_images.shape == (100, 32, 32, 3)
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (np.uint8, np.int32)
    wanted = {drawn(part)[0][i].tobytes(): drawn(part)[1][i] for part in PARTS for i in range(20)}
    for images, labels in [
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ]:
        assert [wanted[image.tobytes()] for image in images] == labels.tolist()
    assert dataset.class_names == archive.CLASSES
    assert dataset.verified is (kind == "py")
    assert ("unverified data" in dataset.caption) == (kind == "bin")
    theirs = tfds.data_source(
        "cifar10:3.0.2", split="test", data_dir=scratch / "tfds", download=False
    )
    assert theirs[0]["image"].tobytes() == dataset.test_images[0].tobytes()
    assert theirs[0]["label"] == dataset.test_labels[0]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_other_compressions_and_python_2s_pickles_are_read(scratch, mode, counts, monkeypatch):
    changes = {part: python2_pickle(part) for part in PARTS}
    source = make(scratch / "a", "py", mode, **changes)
    monkeypatch.setitem(archive.OFFICIAL, digest_of(source), "the official one")
    dataset = load(scratch, source)
    images, labels = drawn("test_batch")
    np.testing.assert_array_equal(dataset.test_labels.sum(), labels.sum())
    np.testing.assert_array_equal(dataset.test_images.sum(0), images.sum(0))


def test_an_official_checksum_is_verified_and_another_is_refused(scratch, monkeypatch, counts):
    source = make(scratch / "a.tar.gz")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"{digest}.*allow_unverified=True"):
        load(scratch, source)
    assert not (scratch / "tfds").exists()
    monkeypatch.setitem(archive.OFFICIAL, digest, "the official archive")
    dataset = load(scratch, source)
    assert dataset.verified is True
    assert dataset.caption == "cifar10"
    note = json.loads((scratch / "tfds/cifar10/3.0.2/jaxnorm_import.json").read_text())
    assert note["sha256"] == digest
    again = data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c")
    assert (again.fingerprint, again.verified) == (dataset.fingerprint, True)


def test_the_official_checksums_are_those_that_tfds_and_keras_publish():
    assert set(archive.OFFICIAL) == {
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    }


def test_data_imported_unverified_stays_so_and_must_be_allowed_each_time(scratch, counts):
    source = make(scratch / "a.tar.gz")
    load(scratch, source, allow_unverified=True)
    for options in ({}, {"archive": str(source)}):
        with pytest.raises(UserError, match="allow_unverified=True"):
            data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c", **options)
    note = scratch / "tfds/cifar10/3.0.2/jaxnorm_import.json"
    note.write_text(note.read_text().replace("false", "true"))  # by hand: it is not believed
    assert archive.read_origin(note.parent) is None


@pytest.fixture
def official(scratch, monkeypatch, counts):
    """An archive whose checksum passes for an official one, imported."""
    source = make(scratch / "a.tar.gz")
    monkeypatch.setitem(archive.OFFICIAL, digest_of(source), "the official archive")
    assert load(scratch, source).verified is True
    return scratch / "tfds" / "cifar10" / "3.0.2"


def test_data_that_was_changed_after_its_import_is_not_verified(official, scratch):
    (official / "more.txt").write_text("x")
    assert data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c").verified is None


def test_data_and_caches_that_others_may_write_to_are_not_verified(official, scratch, monkeypatch):
    decoded = []
    original = prepared.decode
    monkeypatch.setattr(prepared, "decode", lambda *args: decoded.append(1) or original(*args))
    assert data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c").verified is True
    assert not decoded
    (scratch / "c" / "decoded").chmod(0o777)
    assert data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c").verified is True
    assert decoded
    official.chmod(0o777)
    assert data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c").verified is None


@pytest.mark.parametrize(("allowed", "official"), [(False, False), (True, False), (False, True)])
def test_a_download_that_is_another_file_is_not_kept(scratch, monkeypatch, allowed, official):
    """Kept are one that the user allows, and an official one that is not to blame."""
    address, path = "https://example.org/a.tar.gz", scratch / "a.tar.gz"
    path.write_bytes(b"rubbish")
    if official:
        monkeypatch.setitem(archive.OFFICIAL, digest_of(path), "the official archive")
    monkeypatch.setattr(archive, "fetch", lambda *_: path)
    with pytest.raises(UserError, match=rf"\(downloaded from {address}\)"):
        archive.find_or_import(scratch / "tfds", address, allowed, scratch, silent)
    assert path.exists() == (allowed or official)


def test_an_address_that_gives_nothing_is_named_without_other_ways(scratch, monkeypatch):
    def fetch(address, *_):
        raise UserError(f"{address}: no route to it")

    monkeypatch.setattr(archive, "fetch", fetch)
    with pytest.raises(UserError) as error:
        archive.find_or_import(scratch, "https://example.org/a", False, scratch, silent)
    assert str(error.value) == "https://example.org/a: no route to it"


def test_another_archive_over_the_same_directory_is_refused(scratch, counts):
    load(scratch, make(scratch / "a.tar.gz"), allow_unverified=True)
    other = make(scratch / "b.tar.gz", data_batch_1=binary("test_batch"))
    with pytest.raises(UserError, match="already holds data"):
        load(scratch, other, allow_unverified=True)


def bomb(path: Path, kind: str) -> None:
    """Writes an archive of 600 MiB of zeros, in a file or in the header of one."""
    info = tarfile.TarInfo("cifar-10-batches-bin/readme.html")
    info.size = 600 * 2**20
    info.type = tarfile.XHDTYPE if kind == "header bomb" else tarfile.REGTYPE
    zeros = gzip.compress(bytes(2**20), 9)
    path.write_bytes(gzip.compress(info.tobuf()) + zeros * 600)


def wrong_archive(kind: str, path: Path) -> None:
    """Writes an archive that is wrong in the way of `kind`."""
    changed = {
        "one byte short": {"test_batch": binary("test_batch")[:-1]},
        "one byte long": {"test_batch": binary("test_batch") + b"0"},
        "label ten": {"data_batch_2": b"\x0a" + binary("data_batch_2")[1:]},
        "part missing": {"data_batch_4": None},
    }
    if kind == "python call":
        evil = pickle.dumps(Evil(path.parent / "evil"), protocol=4)
        make(path, "py", data_batch_1=evil)
    elif kind in ("bomb", "header bomb"):
        bomb(path, kind)
    elif kind in changed:
        make(path, **changed[kind])
    elif kind == "truncated":
        path.write_bytes(make(path).read_bytes()[: path.stat().st_size // 2])
    elif kind in ("link", "outside", "twice"):
        make(path)
        with tarfile.open(path, "w:gz") as tar:
            name = {"outside": "../../evil"}.get(kind, "cifar-10-batches-bin/data_batch_1.bin")
            info = tarfile.TarInfo(name)
            if kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            content = b"" if kind == "link" else binary("data_batch_1")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if kind == "twice":
                tar.addfile(info, io.BytesIO(content))
    else:
        path.write_bytes({"text": b"hello", "empty": b"", "gzip": gzip.compress(b"hello")}[kind])


WRONG = ["text", "empty", "gzip", "truncated", "one byte short", "one byte long", "label ten"]
WRONG += ["part missing", "link", "outside", "twice", "python call", "bomb", "header bomb"]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_archive_is_refused_in_one_line_and_leaves_nothing(scratch, kind):
    path = scratch / "wrong.tar.gz"
    wrong_archive(kind, path)
    with pytest.raises(UserError, match="archive=") as error:
        load(scratch, path, allow_unverified=True)
    assert "\n" not in str(error.value)
    left = {file.name for file in scratch.rglob("*")}
    assert left <= {"wrong.tar.gz", "tfds", ".jaxnorm-import.lock"}


def test_a_missing_archive_and_a_directory_are_refused(scratch):
    for path in (scratch / "none", scratch):
        with pytest.raises(UserError, match="no such file"):
            load(scratch, path)


@pytest.mark.slow
def test_a_killed_import_leaves_nothing_that_passes_for_complete(scratch, counts):
    """A process is killed in the middle of an import; the next import sweeps up and succeeds."""
    source = make(scratch / "a.tar.gz")
    code = """
import os, signal, sys
from pathlib import Path
from jaxnorm.data import cifar10 as archive
archive._PER_FILE = 20
def progress(what, done, total):
    pass
real = archive._builder
def dying(splits, directory, progress):
    def examples():
        os.kill(os.getpid(), signal.SIGKILL)
    (directory / "half").write_text("x")
    examples()
archive._builder = dying
archive.import_archive(Path(sys.argv[1]), Path(sys.argv[2]), True, progress)
"""
    done = subprocess.run([sys.executable, "-c", code, str(source), str(scratch / "tfds")])
    assert done.returncode == -9
    assert list((scratch / "tfds").glob(".jaxnorm-import/half"))
    assert not (scratch / "tfds" / "cifar10").exists()
    assert len(load(scratch, source, allow_unverified=True).test_labels) == 20
    assert not (scratch / "tfds" / ".jaxnorm-import").exists()


def test_a_disk_without_room_is_one_line(scratch, monkeypatch):
    source = make(scratch / "a.tar.gz")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "_builder", full)
    with pytest.raises(UserError, match="cannot be written to: No space left"):
        load(scratch, source, allow_unverified=True)
    assert not (scratch / "tfds" / ".jaxnorm-import").exists()
    assert not (scratch / "tfds" / "cifar10").exists()
