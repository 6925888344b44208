"""Archives: the two official kinds, checks before and while reading, and imports that are whole."""

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
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
    if kind == "py":  # an official pickle alone is read
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


@pytest.mark.parametrize(("rubbish", "allowed"), [(True, False), (True, True), (False, False)])
def test_a_download_that_is_another_file_is_not_kept(scratch, monkeypatch, rubbish, allowed):
    address, path = "https://example.org/a.tar.gz", scratch / "a.tar.gz"
    path.write_bytes(b"rubbish" if rubbish else make(path).read_bytes())
    monkeypatch.setattr(archive, "fetch", lambda *_: path)
    with pytest.raises(UserError, match=rf"\(downloaded from {address}\)"):
        archive.find_or_import(scratch / "tfds", address, allowed, scratch, silent)
    assert not path.exists()


def test_a_download_is_kept_if_it_is_not_to_blame(scratch, monkeypatch):
    path = make(scratch / "a.tar.gz")
    monkeypatch.setattr(archive, "fetch", lambda *_: path)
    (scratch / "tfds").write_text("not a directory")
    with pytest.raises(UserError, match="cannot be written to"):
        archive.find_or_import(scratch / "tfds", "https://example.org/a", True, scratch, silent)
    assert path.exists()


def test_without_data_an_archive_of_the_known_addresses_is_imported(scratch, monkeypatch, counts):
    path = make(scratch / "a.tar.gz", "py")
    monkeypatch.setitem(archive.OFFICIAL, digest_of(path), "the official one")
    asked = []
    monkeypatch.setattr(archive, "fetch_known", lambda *of: asked.append(of) or path)
    dataset = data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c")
    assert dataset.verified is True
    assert asked[0][0] is archive.ADDRESSES
    assert set(archive.ADDRESSES.values()) <= set(archive.OFFICIAL)


@pytest.mark.parametrize("address", ["gs://bucket/a.tar.gz", "s3://b/a.tar.gz", "file:///a.tar.gz"])
def test_an_address_of_another_kind_is_refused_as_what_it_is(scratch, address):
    with pytest.raises(UserError, match=f"archive={address}: only http:// and https://") as error:
        archive.find_or_import(scratch, address, False, scratch, silent)
    assert "\n" not in str(error.value)


def test_an_address_that_gives_nothing_is_named_without_other_ways(scratch, monkeypatch):
    def fetch(address, *_):
        raise UserError(f"{address}: no route to it")

    monkeypatch.setattr(archive, "fetch", fetch)
    with pytest.raises(UserError) as error:
        archive.find_or_import(scratch, "https://example.org/a", False, scratch, silent)
    assert str(error.value) == "https://example.org/a: no route to it"


def test_what_an_import_makes_is_private_and_its_label_stays_whatever_the_umask(scratch, counts):
    before = os.umask(0o002)
    try:
        load(scratch, make(scratch / "a.tar.gz"), allow_unverified=True)
        options: Any = {"allow_unverified": True, "cache_dir": scratch / "c"}
        again = data.load("cifar10", scratch / "tfds", **options)
    finally:
        os.umask(before)
    assert again.verified is False
    assert "unverified data" in again.caption
    made = list((scratch / "tfds").rglob("*"))
    assert len(made) > 3
    assert not [path for path in made if path.stat().st_mode & 0o077]


def unpacked(folder: Path, kind: str = "py", **changes) -> Path:
    """Writes the files of an archive into a folder; returns the folder."""
    folder.mkdir()
    for part in PARTS:
        content = changes.get(part) or (python_pickle if kind == "py" else binary)(part)
        (folder / (part if kind == "py" else f"{part}.bin")).write_bytes(content)
    return folder


@pytest.fixture
def known_files(monkeypatch):
    """The drawn Python files pass for the official ones."""
    for part in PARTS:
        digest = hashlib.sha256(python_pickle(part)).hexdigest()
        monkeypatch.setitem(archive.PYTHON_FILES, part, digest)


def test_a_folder_of_the_official_python_files_is_their_archive(scratch, counts, known_files):
    dataset = load(scratch, unpacked(scratch / "cifar-10-batches-py"))
    assert dataset.verified is True
    np.testing.assert_array_equal(dataset.test_images.sum(0), drawn("test_batch")[0].sum(0))
    origin = archive.read_origin(scratch / "tfds" / "cifar10" / "3.0.2")
    assert origin is not None
    assert archive.OFFICIAL[origin.sha256] == "the official Python archive"
    again = load(scratch, scratch / "cifar-10-batches-py")
    assert again.fingerprint == dataset.fingerprint


def test_a_folder_of_binary_files_is_imported_if_it_is_allowed(scratch, counts):
    folder = unpacked(scratch / "cifar-10-batches-bin", "bin")
    with pytest.raises(UserError, match="allow_unverified=True"):
        load(scratch, folder)
    assert load(scratch, folder, allow_unverified=True).verified is False


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_pickle_that_is_not_official_is_never_loaded(scratch, known_files, form, allow):
    evil = pickle.dumps(Evil(scratch / "evil"), protocol=4)
    if form == "folder":
        source = unpacked(scratch / "cifar-10-batches-py", data_batch_3=evil)
    else:
        source = make(scratch / "a.tar.gz", "py", data_batch_3=evil)
    with pytest.raises(UserError, match=r"not the official one \(data_batch_3") as error:
        load(scratch, source, allow_unverified=allow)
    assert "allow_unverified" not in str(error.value)  # which would not help
    assert not (scratch / "evil").exists()


def test_the_bytes_that_were_checked_are_those_that_are_loaded(scratch, monkeypatch):
    evil = pickle.dumps(Evil(scratch / "evil"), protocol=4)
    other = make(scratch / "other", "py", data_batch_1=evil)
    path = make(scratch / "a.tar.gz", "py")
    monkeypatch.setitem(archive.OFFICIAL, digest_of(path), "the official archive")

    def exchange(what, done, total):
        if done == total and other.exists():
            other.replace(path)

    archive.import_archive(path, scratch / "tfds", False, exchange)
    assert not other.exists()
    assert not (scratch / "evil").exists()


def test_an_archive_whose_name_is_not_utf_8_is_imported(scratch, counts):
    path = make(scratch / "a.tar.gz").rename(scratch / "caf\udce9.tar.gz")
    dataset = load(scratch, path, allow_unverified=True)
    dataset.source.encode()


def cifar_100(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-100-python/train"))


def half(path: Path) -> None:
    path.write_bytes(make(path).read_bytes()[: path.stat().st_size // 2])


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cifar-10-batches-py/test_batch", b"")


OTHER_FILES = [
    (cifar_100, "holds CIFAR-100"),
    (half, "is incomplete, because it ends too early"),
    (zipped, "is a ZIP archive"),
    (lambda path: path.write_text("<html>Sign in</html>"), "is a web page"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
    (lambda path: path.write_bytes(gzip.compress(b"x" * 600)), "is not a tar archive"),
    (lambda path: path.mkdir(), "is a folder without CIFAR-10's batches"),
]


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(("write", "what"), OTHER_FILES)
def test_another_file_is_called_what_it_is_and_no_flag_is_named(scratch, write, what, allow):
    write(scratch / "a")
    with pytest.raises(UserError, match=what) as error:
        load(scratch, scratch / "a", allow_unverified=allow)
    assert "allow_unverified" not in str(error.value)


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


def test_a_missing_archive_is_refused(scratch):
    with pytest.raises(UserError, match="no such file"):
        load(scratch, scratch / "none")


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
