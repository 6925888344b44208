"""Archives: the two official kinds, checks before and while reading, and imports that are whole."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Evil, failing, refusal

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
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01b"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|"
    kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"T" + len(planes).to_bytes(4, "little") + planes
    array += b"tR(K\x01K\x14M\x00\x0c\x86" + kind + b"\x89" + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


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


def test_what_an_import_makes_is_private_and_unverified_whatever_the_umask(scratch):
    before = os.umask(0o002)
    try:
        source = make(scratch / "a.tar.gz")
        for _ in range(2):
            dataset = load(scratch, source, allow_unverified=True)
    finally:
        os.umask(before)
    assert dataset.verified is False
    assert "unverified data" in dataset.caption
    made = list((scratch / "tfds").rglob("*"))
    assert len(made) > 3
    assert not [path for path in made if path.stat().st_mode & 0o077]
    for options in ({}, {"archive": str(source)}):
        said = refusal(data.load, "cifar10", scratch / "tfds", cache_dir=scratch / "c", **options)
        assert "allow_unverified=True" in said
    other = make(scratch / "b.tar.gz", data_batch_1=binary("test_batch"))
    assert "already holds data" in refusal(load, scratch, other, allow_unverified=True)
    note = scratch / "tfds/cifar10/3.0.2/jaxnorm_import.json"
    note.write_text(note.read_text().replace("false", "true"))  # by hand: it is not believed
    assert archive.read_origin(note.parent) is None


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_both_kinds_are_imported_where_any_tfds_user_finds_them(scratch, kind, monkeypatch):
    import tensorflow_datasets as tfds

    source = make(scratch / "a.tar.gz", kind).rename(scratch / "caf\udce9.tar.gz")
    if kind == "py":
        monkeypatch.setitem(archive.OFFICIAL, digest_of(source), "the official one")
    dataset = load(scratch, source, allow_unverified=True)
    assert (dataset.train_images.shape, dataset.train_images.dtype) == ((100, 32, 32, 3), np.uint8)
    wanted = {drawn(part)[0][i].tobytes(): drawn(part)[1][i] for part in PARTS for i in range(20)}
    for split in ("train", "test"):
        images, labels = (getattr(dataset, f"{split}_{what}") for what in ("images", "labels"))
        assert labels.dtype == np.int32
        assert [wanted[image.tobytes()] for image in images] == labels.tolist()
    assert dataset.class_names == archive.CLASSES
    dataset.source.encode()
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

    decode, decoded = tfds.features.Image.decode_example_np, []
    monkeypatch.setattr(
        tfds.features.Image, "decode_example_np", lambda *of: decoded.append(1) or decode(*of)
    )
    first = load(scratch, make(scratch / "a"), allow_unverified=True)
    assert not decoded
    shutil.rmtree(scratch / "c" / "decoded")
    again = data.load("cifar10", scratch / "tfds", allow_unverified=True, cache_dir=scratch / "c")
    assert len(decoded) == 120
    assert (again.fingerprint, again.class_names) == (first.fingerprint, first.class_names)


def test_an_image_is_a_png_whose_rows_are_neither_filtered_nor_compressed():
    from PIL import Image

    for pixels in drawn("data_batch_1")[0]:
        png = archive._png(pixels)
        Image.open(io.BytesIO(png)).verify()  # its checksums
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)
        assert b"".join(b"\0" + row.tobytes() for row in pixels) in png


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
    said = refusal(load, scratch, source)
    assert digest in said
    assert "allow_unverified=True" in said
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


@pytest.mark.parametrize(("rubbish", "allowed"), [(True, False), (True, True), (False, False)])
def test_a_download_that_is_another_file_is_not_kept(scratch, monkeypatch, rubbish, allowed):
    address, path = "https://example.org/a.tar.gz", scratch / "a.tar.gz"
    path.write_bytes(b"rubbish" if rubbish else make(path).read_bytes())
    monkeypatch.setattr(archive, "fetch", lambda *_: path)
    with pytest.raises(UserError, match=rf"\(downloaded from {address}\)"):
        archive.find_or_import(scratch / "tfds", address, allowed, scratch, silent)
    assert not path.exists()


def test_without_data_an_archive_of_the_known_addresses_is_imported(scratch, monkeypatch):
    path = make(scratch / "a.tar.gz", "py")
    monkeypatch.setitem(archive.OFFICIAL, digest_of(path), "the official one")
    asked = []
    monkeypatch.setattr(archive, "fetch_known", lambda *of: asked.append(of) or path)
    dataset = data.load("cifar10", scratch / "tfds", cache_dir=scratch / "c")
    assert dataset.verified is True
    assert asked[0][0] is archive.ADDRESSES
    assert set(archive.ADDRESSES.values()) <= set(archive.OFFICIAL)


@pytest.mark.parametrize("address", ["gs://bucket/a.tar.gz", "file:///a.tar.gz"])
def test_an_address_of_another_kind_is_refused_as_what_it_is(scratch, address):
    said = refusal(archive.find_or_import, scratch, address, False, scratch, silent)
    assert f"archive={address}: only http:// and https://" in said


def test_an_address_that_gives_nothing_is_named_without_other_ways(scratch, monkeypatch):
    address = "https://example.org/a"
    monkeypatch.setattr(archive, "fetch", failing(UserError(f"{address}: no route to it")))
    said = refusal(archive.find_or_import, scratch, address, False, scratch, silent)
    assert said == f"{address}: no route to it"


def unpacked(folder: Path, kind: str = "py", **changes) -> Path:
    """Writes the files of an archive into a folder; returns the folder."""
    folder.mkdir(exist_ok=True)
    for part in PARTS:
        content = changes.get(part) or (python_pickle if kind == "py" else binary)(part)
        (folder / (part if kind == "py" else f"{part}.bin")).write_bytes(content)
    return folder


def test_a_folder_of_the_official_python_files_is_their_archive(scratch):
    for _ in range(2):
        dataset = load(scratch, unpacked(scratch / "cifar-10-batches-py"))
        assert dataset.verified is True
    np.testing.assert_array_equal(dataset.test_images.sum(0), drawn("test_batch")[0].sum(0))
    origin = archive.read_origin(scratch / "tfds" / "cifar10" / "3.0.2")
    assert origin is not None
    assert archive.OFFICIAL[origin.sha256] == "the official Python archive"


def test_a_folder_of_binary_files_is_imported_if_it_is_allowed(scratch):
    folder = unpacked(scratch / "cifar-10-batches-bin", "bin")
    assert "allow_unverified=True" in refusal(load, scratch, folder)
    assert load(scratch, folder, allow_unverified=True).verified is False


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_pickle_that_is_not_official_is_never_loaded(scratch, form):
    evil = pickle.dumps(Evil(scratch / "evil"), protocol=4)
    if form == "folder":
        source = unpacked(scratch / "cifar-10-batches-py", data_batch_3=evil)
    else:
        source = make(scratch / "a.tar.gz", "py", data_batch_3=evil)
    for allow in (False, True):
        said = refusal(load, scratch, source, allow_unverified=allow)
        assert "not the official one (data_batch_3" in said
        assert "allow_unverified" not in said  # which would not help
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

    origin = archive.read_origin(
        archive.import_archive(path, scratch / "tfds", False, None, exchange)
    )
    assert not pairs
    assert origin is not None
    assert origin.verified
    assert not (scratch / "evil").exists()


def member(name: str = "cifar-10-batches-bin/data_batch_1.bin", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(binary("data_batch_1"))
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def members(*infos: tarfile.TarInfo) -> bytes:
    """An archive of members that hold the first batch, or nothing."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(binary("data_batch_1")))
    return buffer.getvalue()


def bomb(kind: bytes) -> bytes:
    """An archive of 6 MiB of zeros, in a file or in the header of one."""
    info = member("cifar-10-batches-bin/readme.html", size=6 * 2**20, type=kind)
    return gzip.compress(info.tobuf()) + gzip.compress(bytes(6 * 2**20))


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
BATCH = binary("test_batch")
WRONG = {
    "CIFAR-100": (members(member("cifar-100-python/train")), "holds CIFAR-100"),
    "half": (lambda path: make(path).read_bytes()[:99_999], "is incomplete, because it ends too"),
    "ZIP": (b"PK\x03\x04" + bytes(99), "is a ZIP archive"),
    "page": (b"<html>Sign in</html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    "gzip": (gzip.compress(b"x" * 600), "is no tar archive"),
    "text": (b"hello", "is no tar archive"),
    "empty": (b"", "is no tar archive"),
    "folder": (lambda path: path.mkdir(), "is a folder without CIFAR-10's batches"),
    "nothing": (lambda path: None, "there is no such file"),
    "short": (lambda path: make(path, test_batch=BATCH[:-1]), "has 61459 bytes"),
    "long": (lambda path: make(path, test_batch=BATCH + b"0"), "has 61461 bytes"),
    "label": (lambda path: make(path, data_batch_2=b"\x0a" + BATCH[1:]), "a label 10, above 9"),
    "part": (lambda path: make(path, data_batch_4=None), "is incomplete: it does not hold data_b"),
    "link": (members(member(**LINK)), "is not a plain file, once"),
    "outside": (members(member("../../evil")), "holds other files"),
    "twice": (members(member(), member()), "is not a plain file, once"),
    "bomb": (bomb(tarfile.REGTYPE), "more than 4 MiB"),
    "header bomb": (bomb(tarfile.XHDTYPE), "more than 4 MiB"),
}


@pytest.mark.parametrize(("content", "what"), WRONG.values(), ids=WRONG)
def test_another_file_is_called_what_it_is_in_one_line_and_leaves_nothing(
    scratch, monkeypatch, content, what
):
    monkeypatch.setattr(archive, "_LARGEST", 4 * 2**20)
    path = scratch / "a"
    if isinstance(content := content(path) if callable(content) else content, bytes):
        path.write_bytes(content)
    for allow in (False, True):
        said = refusal(load, scratch, path, allow_unverified=allow)
        assert f"archive={path}" in said
        assert what in said
        assert "allow_unverified" not in said  # which would not help
    assert {file.name for file in scratch.rglob("*")} <= {"a"}


def test_a_full_disk_is_one_line_and_the_download_stays(scratch, monkeypatch):
    path = make(scratch / "a.tar.gz")
    monkeypatch.setattr(archive, "_builder", failing(OSError(28, "No space left on device")))
    monkeypatch.setattr(archive, "fetch", lambda *_: path)
    address = "https://example.org/a"
    said = refusal(archive.find_or_import, scratch / "tfds", address, True, scratch, silent)
    assert "cannot be written to: No space left" in said
    assert path.exists()
    assert [left.name for left in (scratch / "tfds").iterdir()] == [".jaxnorm-import.lock"]
