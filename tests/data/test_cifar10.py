"""Archives: the two official kinds, checks before and while reading, and imports that are whole."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
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

PARTS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Batches of 20 drawn images pass for the official ones of 10,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_PER_FILE", 20)
        patch.setattr(data, "CIFAR10_COUNTS", (100, 20))
        known = {part: hashlib.sha256(python_pickle(part)).hexdigest() for part in PARTS}
        patch.setattr(archive, "PYTHON_FILES", known)
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
    values = {b"data": planes, b"labels": labels.tolist(), b"filenames": [b"x"]}
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
    """Writes an archive; `changes` replaces a part's content, or leaves it out if it is None."""
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


def test_what_an_import_makes_is_private_and_its_label_stays_whatever_the_umask(scratch):
    before = os.umask(0o002)
    try:
        load(scratch, make(scratch / "a.tar.gz"), allow_unverified=True)
        again = load(scratch, scratch / "a.tar.gz", allow_unverified=True)
    finally:
        os.umask(before)
    assert again.verified is False
    assert "unverified data" in again.caption
    made = list((scratch / "tfds").rglob("*"))
    assert len(made) > 3
    assert not [path for path in made if path.stat().st_mode & 0o077]


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_both_kinds_are_imported_where_any_tfds_user_finds_them(scratch, kind, monkeypatch):
    import tensorflow_datasets as tfds

    source = make(scratch / f"{kind}.tar.gz", kind)
    if kind == "py":
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


def test_the_first_load_after_an_import_decodes_no_png(scratch, monkeypatch):
    import tensorflow_datasets as tfds

    def load():
        return data.load("cifar10", scratch / "tfds", allow_unverified=True, cache_dir=scratch)

    archive.import_archive(make(scratch / "a"), scratch / "tfds", True, scratch, silent)
    with monkeypatch.context() as patch:
        patch.setattr(
            tfds.features.Image, "decode_example_np", lambda *_: pytest.fail("a PNG is decoded")
        )
        first = load()
        shutil.rmtree(scratch / "decoded")
        with pytest.raises(pytest.fail.Exception):
            load()
    decoded = load()
    assert decoded.fingerprint == first.fingerprint
    assert decoded.class_names == first.class_names


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_other_compressions_and_python_2s_pickles_are_read(scratch, mode, monkeypatch):
    changes = {part: python2_pickle(part) for part in PARTS}
    known = {part: hashlib.sha256(content).hexdigest() for part, content in changes.items()}
    monkeypatch.setattr(archive, "PYTHON_FILES", known)
    dataset = load(scratch, make(scratch / "a", "py", mode, **changes), allow_unverified=True)
    images, labels = drawn("test_batch")
    np.testing.assert_array_equal(dataset.test_labels.sum(), labels.sum())
    np.testing.assert_array_equal(dataset.test_images.sum(0), images.sum(0))


def test_an_official_checksum_is_verified_and_another_is_refused(scratch, monkeypatch):
    source = make(scratch / "a.tar.gz")
    digest = digest_of(source)
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
    (scratch / "tfds/cifar10/3.0.2/more.txt").write_text("x")  # data that was changed since
    assert data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c").verified is None


def test_the_official_checksums_are_those_that_tfds_and_keras_publish():
    assert set(archive.OFFICIAL) == {
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    }


def test_data_imported_unverified_stays_so_and_must_be_allowed_each_time(scratch):
    source = make(scratch / "a.tar.gz")
    load(scratch, source, allow_unverified=True)
    for options in ({}, {"archive": str(source)}):
        with pytest.raises(UserError, match="allow_unverified=True"):
            data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c", **options)
    note = scratch / "tfds/cifar10/3.0.2/jaxnorm_import.json"
    note.write_text(note.read_text().replace("false", "true"))  # by hand: it is not believed
    assert archive.read_origin(note.parent) is None


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


def test_without_data_an_archive_of_the_known_addresses_is_imported(scratch, monkeypatch):
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


def unpacked(folder: Path, kind: str = "py", **changes) -> Path:
    """Writes the files of an archive into a folder; returns the folder."""
    folder.mkdir()
    for part in PARTS:
        content = changes.get(part) or (python_pickle if kind == "py" else binary)(part)
        (folder / (part if kind == "py" else f"{part}.bin")).write_bytes(content)
    return folder


def test_a_folder_of_the_official_python_files_is_their_archive(scratch):
    dataset = load(scratch, unpacked(scratch / "cifar-10-batches-py"))
    assert dataset.verified is True
    np.testing.assert_array_equal(dataset.test_images.sum(0), drawn("test_batch")[0].sum(0))
    origin = archive.read_origin(scratch / "tfds" / "cifar10" / "3.0.2")
    assert origin is not None
    assert archive.OFFICIAL[origin.sha256] == "the official Python archive"
    again = load(scratch, scratch / "cifar-10-batches-py")
    assert again.fingerprint == dataset.fingerprint


def test_a_folder_of_binary_files_is_imported_if_it_is_allowed(scratch):
    folder = unpacked(scratch / "cifar-10-batches-bin", "bin")
    with pytest.raises(UserError, match="allow_unverified=True"):
        load(scratch, folder)
    assert load(scratch, folder, allow_unverified=True).verified is False


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_pickle_that_is_not_official_is_never_loaded(scratch, form, allow):
    evil = pickle.dumps(Evil(scratch / "evil"), protocol=4)
    if form == "folder":
        source = unpacked(scratch / "cifar-10-batches-py", data_batch_3=evil)
    else:
        source = make(scratch / "a.tar.gz", "py", data_batch_3=evil)
    with pytest.raises(UserError, match=r"not the official one \(data_batch_3") as error:
        load(scratch, source, allow_unverified=allow)
    assert "allow_unverified" not in str(error.value)  # which would not help
    assert not (scratch / "evil").exists()


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_what_is_hashed_is_what_is_parsed(scratch, monkeypatch, form):
    """Each file is read once, and another that takes its place meanwhile is not believed."""
    evil = dict.fromkeys(PARTS, pickle.dumps(Evil(scratch / "evil"), protocol=4))
    if form == "folder":
        path, other = unpacked(scratch / "a"), unpacked(scratch / "b", **evil)
        pairs = [(other / part, path / part) for part in PARTS]
    else:
        path, other = (make(scratch / name, "py", **new) for name, new in (("a", {}), ("b", evil)))
        monkeypatch.setitem(archive.OFFICIAL, digest_of(path), "the official archive")
        pairs = [(other, path)]

    def exchange(what, done, total):
        if done == total:
            while pairs:
                os.replace(*pairs.pop())

    prepared = archive.import_archive(path, scratch / "tfds", False, None, exchange)
    assert not pairs
    origin = archive.read_origin(prepared)
    assert origin is not None
    assert origin.verified
    assert not (scratch / "evil").exists()


def test_an_archive_whose_name_is_not_utf_8_is_imported(scratch):
    path = make(scratch / "a.tar.gz").rename(scratch / "caf\udce9.tar.gz")
    dataset = load(scratch, path, allow_unverified=True)
    dataset.source.encode()


def half(path: Path) -> None:
    path.write_bytes(make(path).read_bytes()[: path.stat().st_size // 2])


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cifar-10-batches-py/test_batch", b"")


def test_another_archive_over_the_same_directory_is_refused(scratch):
    load(scratch, make(scratch / "a.tar.gz"), allow_unverified=True)
    other = make(scratch / "b.tar.gz", data_batch_1=binary("test_batch"))
    with pytest.raises(UserError, match="already holds data"):
        load(scratch, other, allow_unverified=True)


def members(path: Path, *infos: tarfile.TarInfo) -> None:
    """Writes an archive of members that hold the first batch, or nothing."""
    with tarfile.open(path, "w:gz") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(binary("data_batch_1")))


def member(name: str = "cifar-10-batches-bin/data_batch_1.bin", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(binary("data_batch_1"))
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def bomb(path: Path, kind: bytes) -> None:
    """Writes an archive of 6 MiB of zeros, in a file or in the header of one."""
    info = member("cifar-10-batches-bin/readme.html", size=6 * 2**20, type=kind)
    path.write_bytes(gzip.compress(info.tobuf()) + gzip.compress(bytes(6 * 2**20)))


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
WRONG = {
    "CIFAR-100": (lambda path: members(path, member("cifar-100-python/train")), "holds CIFAR-100"),
    "half": (half, "is incomplete, because it ends too early"),
    "ZIP": (zipped, "is a ZIP archive"),
    "page": (lambda path: path.write_text("<html>Sign in</html>"), "is a web page"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
        "Git LFS pointer",
    ),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 600)), "is no tar archive"),
    "text": (lambda path: path.write_bytes(b"hello"), "is no tar archive"),
    "empty": (lambda path: path.write_bytes(b""), "is no tar archive"),
    "folder": (lambda path: path.mkdir(), "is a folder without CIFAR-10's batches"),
    "nothing": (lambda path: None, "there is no such file"),
    "short": (lambda path: make(path, test_batch=binary("test_batch")[:-1]), "has 61459 bytes"),
    "long": (lambda path: make(path, test_batch=binary("test_batch") + b"0"), "has 61461 bytes"),
    "label": (
        lambda path: make(path, data_batch_2=b"\x0a" + binary("data_batch_2")[1:]),
        "a label 10, above 9",
    ),
    "part": (lambda path: make(path, data_batch_4=None), "is incomplete: it does not hold data_b"),
    "link": (lambda path: members(path, member(**LINK)), "is not a plain file, once"),
    "outside": (lambda path: members(path, member("../../evil")), "holds other files"),
    "twice": (lambda path: members(path, member(), member()), "is not a plain file, once"),
    "bomb": (lambda path: bomb(path, tarfile.REGTYPE), "more than 4 MiB"),
    "header bomb": (lambda path: bomb(path, tarfile.XHDTYPE), "more than 4 MiB"),
}


@pytest.mark.parametrize(("write", "what"), WRONG.values(), ids=WRONG)
def test_another_file_is_called_what_it_is_in_one_line_and_leaves_nothing(
    scratch, monkeypatch, write, what
):
    monkeypatch.setattr(archive, "_LARGEST", 4 * 2**20)
    write(scratch / "a")
    for allow in (False, True):
        with pytest.raises(UserError, match=f"archive=.*{what}") as error:
            load(scratch, scratch / "a", allow_unverified=allow)
        assert "\n" not in str(error.value)
        assert "allow_unverified" not in str(error.value)  # which would not help
    assert {file.name for file in scratch.rglob("*")} <= {"a"}


@pytest.mark.slow
def test_a_killed_import_leaves_nothing_that_passes_for_complete(scratch):
    """A process is killed in the middle of an import; the next import sweeps up and succeeds."""
    source = make(scratch / "a.tar.gz")
    code = """
import os, signal, sys
from pathlib import Path
from jaxnorm.data import cifar10 as archive
archive._PER_FILE = 20
def dying(splits, directory, progress):
    (directory / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
archive._builder = dying
archive.import_archive(Path(sys.argv[1]), Path(sys.argv[2]), True, None, lambda *at: None)
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
