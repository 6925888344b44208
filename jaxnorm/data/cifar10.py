"""An archive file of CIFAR-10, checked and imported into the standard TFDS directory.

TFDS itself cannot prepare CIFAR-10 without TensorFlow, so a small `GeneratorBasedBuilder` of the
same name, version and features does; any TFDS user can read what it writes.

An archive may be hostile. Nothing of it is ever written under a name that it chose; it is read to
`_LARGEST` decompressed bytes and no further; and a pickle, which the Python archive holds, is
loaded from the official archive alone, known by its SHA-256.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle  # of the official archive alone, known by its SHA-256
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxnorm.config import UserError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OFFICIAL = {
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd": "the official binary "
    "archive",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce": "the official Python "
    "archive",
}
VERSION = "3.0.2"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_NOTE = "jaxnorm_import.json"
_PER_FILE = 10_000
_PIXELS = 32 * 32 * 3
_PARTS = {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}
_LARGEST_MEMBER = 64 * 2**20
_LARGEST = 512 * 2**20
"""Bytes of a decompressed archive; the official ones have 184 million."""


@dataclass(frozen=True)
class Origin:
    """Where prepared data came from: a sentence, the archive's SHA-256, and whether that is the
    official one.
    """

    source: str
    sha256: str
    verified: bool


def sha256_of(path: Path, progress: Progress, what: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            done += len(block)
            progress(what, done, size)
    return digest.hexdigest()


def read_origin(prepared: Path) -> Origin | None:
    """What `import_archive` noted beside a prepared dataset, or None where somebody else prepared
    it.
    """
    try:
        note = json.loads((prepared / _NOTE).read_text())
        origin = Origin(note["source"], note["sha256"], note["verified"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    valid = (
        isinstance(origin.source, str)
        and isinstance(origin.sha256, str)
        and isinstance(origin.verified, bool)
    )
    return origin if valid and origin.verified == (origin.sha256 in OFFICIAL) else None


def import_archive(path: Path, data_dir: Path, allow_unverified: bool, progress: Progress) -> Path:
    """Imports an archive to `data_dir`/cifar10/3.0.2, complete or not at all, and returns that
    directory.

    Where the directory already holds data from the same archive nothing is done. Raises `UserError`
    for an archive that is missing, truncated, of another kind, or of an unofficial checksum (unless
    `allow_unverified`), and where the directory holds other data.
    """
    if not path.is_file():
        raise UserError(f"archive={path}: there is no such file")
    try:
        sha256 = sha256_of(path, progress, "checking the archive")
    except OSError as error:
        raise UserError(f"archive={path} cannot be read: {error.strerror}") from None
    verified = sha256 in OFFICIAL
    prepared = data_dir / "cifar10" / VERSION
    if prepared.exists():
        origin = read_origin(prepared)
        if origin is None or origin.sha256 != sha256:
            raise UserError(
                f"{prepared} already holds data that did not come from {path}: give another "
                "data_dir=, or leave archive= out"
            )
        if not verified and not allow_unverified:
            raise UserError(_unofficial(path, sha256))
        return prepared
    if not verified and not allow_unverified:
        # Of another kind altogether? Then say that instead.
        _read_splits(path, lambda *_: None, only_first=True)
        raise UserError(_unofficial(path, sha256))
    splits = _read_splits(path, progress, verified)
    origin = Origin(
        f"{OFFICIAL.get(sha256, 'an unofficial archive')}, {path.name}", sha256, verified
    )
    try:
        _prepare(splits, data_dir, prepared, origin, progress)
    except OSError as error:
        raise UserError(
            f"data_dir={data_dir} cannot be written to: {error.strerror or error}"
        ) from None
    return prepared


def _unofficial(path: Path, sha256: str) -> str:
    return (
        f"archive={path}: its SHA-256 is {sha256}, not an official CIFAR-10 archive's; "
        "add allow_unverified=True to use it all the same, marked as such"
    )


def _read_splits(
    path: Path, progress: Progress, official: bool = False, only_first: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads {"train": (u8[50000, 32, 32, 3], u8[50000]), "test": ...} out of a binary or a Python
    archive.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with _decompressed(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                folder, _, file = name.partition("/")
                part = file.removesuffix(".bin")
                kind = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}.get(folder)
                if kind is None or part not in _PARTS or file != part + kind:
                    continue
                if not member.isreg() or member.size > _LARGEST_MEMBER or part in found:
                    raise UserError(
                        f"archive={path}: {file} in it is not a plain file of the expected "
                        "size, once"
                    )
                stream = archive.extractfile(member)
                assert stream is not None
                data = stream.read()
                if not kind and not official:
                    raise UserError(
                        f"archive={path} is a Python archive, but not the official one: a pickle "
                        "may run anything when it is read; give a binary archive"
                    )
                parse = _parse_binary if kind else _parse_python
                found[part] = parse(data, file, path)
                progress("reading the archive", len(found), len(_PARTS))
                if only_first:
                    return {}
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile archive can fail in any way
        raise UserError(
            f"archive={path} is damaged, truncated or no tar archive: {error}"
        ) from None
    if missing := [part for part in _PARTS if part not in found]:
        raise UserError(
            f"archive={path} is not a complete CIFAR-10 archive: {', '.join(missing)} not found "
            "in it"
        )

    def joined(split: str, i: int) -> np.ndarray:
        """The images (0) or labels (1) of all parts of a split."""
        return np.concatenate([found[part][i] for part in _PARTS if _PARTS[part] == split])

    return {split: (joined(split, 0), joined(split, 1)) for split in ("train", "test")}


class _Limited(io.RawIOBase):
    """A decompressed stream that ends in an error at `_LARGEST` bytes: a bomb is not read out."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, _LARGEST

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads as much as the stream gives at once, if that is still allowed."""
        content = self._stream.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"it holds more than {_LARGEST // 2**20} MiB when decompressed")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Closes the file too."""
        self._stream.close()
        super().close()


def _decompressed(path: Path) -> io.BufferedReader:
    """The content of a file, by its first bytes gzip, bzip2 or xz, or as it is."""
    with path.open("rb") as file:
        start = file.read(6)
    kinds: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opened = next((kind for magic, kind in kinds.items() if start.startswith(magic)), open)
    return io.BufferedReader(_Limited(opened(path, "rb")))


def _parse_binary(data: bytes, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label byte and three 32x32 planes."""
    if len(data) != _PER_FILE * (1 + _PIXELS):
        raise UserError(
            f"archive={path}: {name} in it has {len(data)} bytes, not {_PER_FILE * (1 + _PIXELS)}"
        )
    records = np.frombuffer(data, np.uint8).reshape(_PER_FILE, 1 + _PIXELS)
    return _checked(records[:, 1:], records[:, 0], name, path)


def _parse_python(data: bytes, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary of a u8[10000, 3072] array and a list of labels. Of an official archive
    alone: a pickle may call anything.
    """
    values = pickle.loads(data, encoding="bytes")
    pixels, labels = values[b"data"], np.array(values[b"labels"], np.uint8)
    if pixels.shape != (_PER_FILE, _PIXELS) or labels.shape != (_PER_FILE,):
        raise UserError(f"archive={path}: {name} in it is not a CIFAR-10 batch (other shapes)")
    return _checked(pixels, labels, name, path)


def _checked(
    planes: np.ndarray, labels: np.ndarray, name: str, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    if labels.max() >= len(CLASSES):
        raise UserError(f"archive={path}: {name} in it has a label {labels.max()}, above 9")
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.copy()


def _prepare(
    splits: dict[str, Any], data_dir: Path, prepared: Path, origin: Origin, progress: Progress
) -> None:
    """Writes the dataset under a temporary name in `data_dir` and renames it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    _sweep(data_dir)
    scratch = Path(tempfile.mkdtemp(prefix=f".jaxnorm-import-{os.getpid()}-", dir=data_dir))
    try:
        builder = _builder(splits, scratch, progress)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # TFDS announces a download that there is not
            builder.download_and_prepare()
        made = Path(builder.data_dir)
        (made / _NOTE).write_text(
            json.dumps(
                {"source": origin.source, "sha256": origin.sha256, "verified": origin.verified},
                indent=2,
            )
        )
        prepared.parent.mkdir(parents=True, exist_ok=True)
        made.rename(prepared)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(data_dir: Path) -> None:
    """Removes what killed imports left behind: scratch directories whose process is gone."""
    for scratch in data_dir.glob(".jaxnorm-import-*-*"):
        process = scratch.name.split("-")[2]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(scratch, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _builder(splits: dict[str, Any], directory: Path, progress: Progress) -> Any:
    """A TFDS builder that yields `splits` as cifar10 3.0.2."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import registered

    total = sum(len(labels) for _, labels in splits.values())
    done = 0

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """A split's images with their keys, told to `progress`."""
        nonlocal done
        for i, (pixels, label) in enumerate(zip(*splits[split], strict=True)):
            yield (
                i,
                {"id": f"{split}_{i:05d}", "image": Image.fromarray(pixels), "label": int(label)},
            )
            done += 1
            if done % 500 == 0:
                progress("importing the images", done, total)

    with registered.skip_registration():

        class Cifar10(tfds.core.GeneratorBasedBuilder):
            """CIFAR-10 with the name, version and features that TFDS gives it."""

            VERSION = tfds.core.Version(VERSION)

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "image": tfds.features.Image(shape=(32, 32, 3)),
                        "label": tfds.features.ClassLabel(names=CLASSES),
                    }
                )
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="CIFAR-10",
                    features=features,
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager):
                return {split: examples(split) for split in splits}

            def _generate_examples(self):
                raise AssertionError("the splits are given as generators")

    tfds.disable_progress_bar()  # ours counts images
    return Cifar10(data_dir=str(directory), file_format="array_record")
