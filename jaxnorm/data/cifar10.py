"""CIFAR-10: its archive, downloaded or given, is checked and imported as TFDS would have it.

TFDS itself cannot prepare CIFAR-10 without TensorFlow, so a small `GeneratorBasedBuilder` of the
same name, version and features does; any TFDS user can read what it writes.

An archive may be hostile. Nothing of it is ever written under a name that it chose; it is read to
`_LARGEST` decompressed bytes and no further; and a pickle, which the Python archive holds, is
loaded from the official archive alone, known by its SHA-256.
"""

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import pickle  # of the official archive alone, known by its SHA-256
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxnorm.config import UserError, from_json, typed
from jaxnorm.data.cache import files_fingerprint
from jaxnorm.data.download import Progress, fetch

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OFFICIAL = {
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd": "the official binary "
    "archive",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce": "the official Python "
    "archive",
}
VERSION = "3.0.2"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NOTE = "jaxnorm_import.json"
"""Beside imported data: where it came from."""
_SCRATCH, _LOCK = ".jaxnorm-import", ".jaxnorm-import.lock"
_PER_FILE = 10_000
_PIXELS = 32 * 32 * 3
_PARTS = {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}
_LARGEST = 512 * 2**20
"""Bytes of a decompressed archive; the official ones have 184 million."""


@typed
class Origin:
    """Where prepared data came from: a sentence, the archive's SHA-256, whether that is the
    official one, and the fingerprint of the files that were made of it.
    """

    source: str
    sha256: str
    verified: bool
    files: str


def read_origin(prepared: Path) -> Origin | None:
    """What `import_archive` noted beside the data, or None where somebody else prepared it, or
    changed it since.
    """
    try:
        origin = from_json(Origin, (prepared / NOTE).read_bytes())
    except (OSError, UserError):
        return None
    honest = origin.verified == (origin.sha256 in OFFICIAL)
    return origin if honest and origin.files == files_fingerprint(prepared, NOTE) else None


def find_or_import(
    data_dir: Path, archive: str | None, allow_unverified: bool, downloads: Path, progress: Progress
) -> Path:
    """The directory of the prepared data, which is imported from an archive (a path or an address)
    where one is given, and downloaded where there is none. Raises `UserError`.
    """
    prepared = data_dir / "cifar10" / VERSION
    if archive and not re.match(r"https?://", archive):
        return import_archive(Path(archive).expanduser(), data_dir, allow_unverified, progress)
    if prepared.exists() and not archive:
        origin = read_origin(prepared)
        if origin is not None and not origin.verified and not allow_unverified:
            raise UserError(
                f"{prepared} was made from an unofficial archive: add allow_unverified=True to use "
                "it, marked as such"
            )
        return prepared
    try:
        path = fetch(archive or URL, downloads, progress)
    except UserError as error:
        if archive:
            raise
        raise UserError(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error}). Three ways on: "
            "archive=PATH of cifar-10-binary.tar.gz or cifar-10-python.tar.gz; data_dir= of a "
            f"directory in which TFDS has prepared cifar10 {VERSION} as array_record; "
            "dataset=digits, which needs no download"
        ) from None
    try:
        return import_archive(path, data_dir, allow_unverified, progress)
    except UserError as error:
        if not allow_unverified and _sha256_of(path, progress) not in OFFICIAL:
            path.unlink()  # a download that is not what it should be is not kept
        raise UserError(f"{error} (downloaded from {archive or URL})") from None


def import_archive(path: Path, data_dir: Path, allow_unverified: bool, progress: Progress) -> Path:
    """Imports an archive to `data_dir`/cifar10/3.0.2, complete or not at all, and returns that
    directory. Where it already holds data from the same archive nothing is done.

    Raises `UserError` for an archive that is missing, damaged, of another kind, or of an unofficial
    checksum (unless `allow_unverified`), and where the directory holds other data.
    """
    if not path.is_file():
        raise UserError(f"archive={path}: there is no such file")
    prepared, sha256 = data_dir / "cifar10" / VERSION, _sha256_of(path, progress)
    verified = sha256 in OFFICIAL
    if not verified and not allow_unverified:
        raise UserError(
            f"archive={path}: its SHA-256 is {sha256}, not an official CIFAR-10 archive's: it is "
            "another file, or damaged; allow_unverified=True uses it all the same, marked as such"
        )
    try:
        if not prepared.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            splits = _read_splits(path, progress, verified)
            source = f"{OFFICIAL.get(sha256, 'an unofficial archive')}, {path.name}"
            with filelock.FileLock(data_dir / _LOCK):
                _prepare(splits, data_dir, Origin(source, sha256, verified, ""), progress)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data_dir={data_dir} cannot be written to: {reason}") from None
    origin = read_origin(prepared)
    if origin is None or origin.sha256 != sha256:
        raise UserError(
            f"{prepared} already holds data that did not come from {path}: give another data_dir=, "
            "or leave archive= out"
        )
    return prepared


def _sha256_of(path: Path, progress: Progress) -> str:
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                done += len(block)
                progress("checking the archive", done, size)
    except OSError as error:
        raise UserError(f"archive={path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _read_splits(
    path: Path, progress: Progress, official: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads {"train": (u8[50000, 32, 32, 3], u8[50000]), "test": ...} out of a binary or a Python
    archive.
    """
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_decompressed(path))) as archive:
            for member in archive:
                folder, _, file = member.name.removeprefix("./").partition("/")
                part = file.removesuffix(".bin")
                kind = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}.get(folder)
                if kind is None or part not in _PARTS or file != part + kind:
                    continue
                stream = archive.extractfile(member) if member.isreg() else None
                if stream is None or part in batches:
                    raise ValueError(f"{file} in it is not a plain file, once")
                batches[part] = _parse(stream.read(), file, official)
                progress("reading the archive", len(batches), len(_PARTS))
        if missing := [part for part in _PARTS if part not in batches]:
            raise ValueError(f"{', '.join(missing)} not found in it")
    except Exception as error:  # a damaged or hostile archive can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"archive={path} is damaged, or no CIFAR-10 archive: {reason}") from None
    splits = {}
    for split in ("train", "test"):
        images, labels = zip(
            *(batches[part] for part in _PARTS if _PARTS[part] == split), strict=True
        )
        splits[split] = np.concatenate(images), np.concatenate(labels)
    return splits


def _decompressed(path: Path) -> bytes:
    """The content of a file, by its first bytes gzip, bzip2 or xz, or as it is; no bomb is read
    out.
    """
    with path.open("rb") as file:
        start = file.read(6)
    kinds: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opened = next((kind for magic, kind in kinds.items() if start.startswith(magic)), open)
    with opened(path, "rb") as stream:
        content = stream.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it holds more than {_LARGEST // 2**20} MiB when decompressed")
    return content


def _parse(data: bytes, name: str, official: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[N, 32, 32, 3] and labels u8[N] of a batch: records of a label byte and three 32x32
    planes; or, of the official archive alone, a pickled dictionary.
    """
    if name.endswith(".bin"):
        if len(data) != _PER_FILE * (1 + _PIXELS):
            raise ValueError(f"{name} in it has {len(data)} bytes")
        records = np.frombuffer(data, np.uint8).reshape(_PER_FILE, 1 + _PIXELS)
        planes, labels = records[:, 1:], records[:, 0]
    elif official:
        values = pickle.loads(data, encoding="bytes")
        planes, labels = values[b"data"], np.array(values[b"labels"], np.uint8)
    else:
        raise ValueError("a Python archive that is not official may run anything when it is read")
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{name} in it has a label {labels.max()}, above 9")
    images = planes.reshape(_PER_FILE, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.copy()


def _prepare(splits: dict[str, Any], data_dir: Path, origin: Origin, progress: Progress) -> None:
    """Writes the dataset under a temporary name in `data_dir` and renames it. Under the lock, so
    that what a killed import left there is nobody's.
    """
    prepared, scratch = data_dir / "cifar10" / VERSION, data_dir / _SCRATCH
    if prepared.exists():
        return
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        builder = _builder(splits, scratch, progress)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download; there is none
            builder.download_and_prepare()
        folder = Path(builder.data_dir)
        note = dataclasses.replace(origin, files=files_fingerprint(folder, NOTE))
        (folder / NOTE).write_text(json.dumps(dataclasses.asdict(note), indent=2))
        prepared.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(prepared)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _builder(splits: dict[str, Any], directory: Path, progress: Progress) -> Any:
    """A TFDS builder that yields `splits` as cifar10 3.0.2."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import registered

    total, done = sum(len(labels) for _, labels in splits.values()), 0

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal done
        for i, (pixels, label) in enumerate(zip(*splits[split], strict=True)):
            image = Image.fromarray(pixels)
            yield i, {"id": f"{split}_{i:05d}", "image": image, "label": int(label)}
            done += 1
            if done % 500 == 0:
                progress("importing the images", done, total)

    with registered.skip_registration():

        class Cifar10(tfds.core.GeneratorBasedBuilder):
            """CIFAR-10 with the name, version and features that TFDS gives it."""

            VERSION = tfds.core.Version(VERSION)

            def _info(self):
                features = {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="CIFAR-10",
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager):
                return {split: examples(split) for split in splits}

            def _generate_examples(self):
                raise AssertionError("the splits are given as generators")

    tfds.disable_progress_bar()  # ours counts images
    return Cifar10(data_dir=str(directory), file_format="array_record")
