"""A dataset's name to uint8 arrays.

`load` reads CIFAR-10 through TFDS (array_record, no TensorFlow), scikit-learn's digits, or any TFDS
dataset that is already prepared and has 32x32x3 images and one label. Decoded arrays are cached
under the fingerprint of the files they came from; a cache that does not match its own fingerprint
is rebuilt.

A data set that TFDS has prepared, or an .npz file, needs no code. A new source is one more entry in
`SOURCES`.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.config import UserError
from jaxnorm.data import cifar10 as archives
from jaxnorm.data.cache import (
    content_fingerprint,
    default_cache_dir,
    default_data_dir,
    files_fingerprint,
    read_arrays,
    write_arrays,
)
from jaxnorm.data.cifar10 import Origin, Progress

CIFAR10_COUNTS = (50_000, 10_000)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_DEVIATION = (0.2470, 0.2435, 0.2616)
KNOWN_CONTENT = {"195a5f68901b5f7e2da7cba93ab205c0a7466dc0865da2e67b8b4d0bb13ed155": "JPEG mirror"}
"""Labels of contents that are known not to be the official ones, by fingerprint: here CIFAR-10
recompressed as JPEG of quality 75.
"""


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory, and all that is known of where they came from.

    `fingerprint` is the SHA-256 of the arrays' content. `verified` is True for data whose checksum
    is the official one or that ships with a package, False for data let in by allow_unverified,
    None for a directory that somebody else prepared. `mean` and `deviation` are per channel, of
    images scaled to [0, 1].
    """

    name: str
    train_images: np.ndarray  # u8[N, 32, 32, 3]
    train_labels: np.ndarray  # i32[N]
    test_images: np.ndarray  # u8[M, 32, 32, 3]
    test_labels: np.ndarray  # i32[M]
    class_names: tuple[str, ...]
    fingerprint: str
    source: str
    verified: bool | None
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @property
    def caption(self) -> str:
        """What every figure and table says of the data: its name, its label if it has one, and
        "unverified data" where it is.
        """
        parts = [
            self.name,
            KNOWN_CONTENT.get(self.fingerprint, ""),
            "unverified data" if self.verified is False else "",
        ]
        return ", ".join(part for part in parts if part)


def load(
    name: str = "cifar10",
    data_dir: Path | str | None = None,
    archive: str | None = None,
    *,
    allow_unverified: bool = False,
    cache_dir: Path | str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Dataset:
    """Loads a dataset by name.

    name: "cifar10", "digits", a prepared TFDS dataset, or an .npz file with `train_images` and
    `test_images` u8[N, 32, 32, 3], `train_labels`, `test_labels` and `class_names`.
    data_dir: where TFDS datasets lie. archive: an official CIFAR-10 archive, a path or an address,
    to import first. Raises `UserError`.
    """
    directory = Path(data_dir).expanduser() if data_dir else default_data_dir()
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    if archive and name != "cifar10":
        raise UserError(f"archive= holds CIFAR-10, not {name}: leave out one of the two")
    if name in SOURCES:
        return SOURCES[name]()
    if name.endswith(".npz"):
        return _from_file(Path(name).expanduser())
    if name == "cifar10":
        prepared = _cifar10_directory(directory, archive, allow_unverified, cache, progress)
        return _prepared(name, prepared, archives.read_origin(prepared), cache, progress)
    prepared = _find_prepared(name, directory)
    return _prepared(name, prepared, None, cache, progress)


def hold_out(
    labels: np.ndarray,  # i32[N]
    count: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:  # i32[N - count], i32[count], ascending
    """The rows to train on, and `count` rows held out of each class's share of them.

    The held-out rows are drawn by the seed alone (NumPy's frozen `RandomState`). Where a class's
    share is no whole number, the classes with the largest remainders get one more.
    """
    random = np.random.RandomState(seed)
    sizes = np.bincount(labels)
    shares = count * sizes / len(labels)
    wanted = shares.astype(int)
    wanted[np.argsort(wanted - shares, kind="stable")[: count - wanted.sum()]] += 1
    drawn = [random.permutation(np.flatnonzero(labels == i))[:n] for i, n in enumerate(wanted)]
    held = np.zeros(len(labels), bool)
    held[np.concatenate(drawn)] = True
    return np.flatnonzero(~held).astype(np.int32), np.flatnonzero(held).astype(np.int32)


def _dataset(
    name: str,
    arrays: list[np.ndarray],
    class_names: tuple[str, ...],
    fingerprint: str,
    source: str,
    verified: bool | None,
) -> Dataset:
    mean, deviation = (
        (CIFAR10_MEAN, CIFAR10_DEVIATION) if name == "cifar10" else channel_statistics(arrays[0])
    )
    values = dict(zip(_FIELDS, arrays, strict=True))
    about = {"fingerprint": fingerprint, "source": source, "verified": verified}
    return Dataset(name, **values, class_names=class_names, **about, mean=mean, deviation=deviation)


def channel_statistics(images: np.ndarray) -> tuple[Any, Any]:
    """Mean and deviation of each of three channels of u8 images scaled to [0, 1], to four digits; a
    constant channel has deviation 1.
    """
    counts = [
        np.bincount(images[..., channel].ravel(), minlength=256).astype(np.float64)
        for channel in range(3)
    ]
    levels = np.arange(256) / 255
    means = [float(count @ levels / count.sum()) for count in counts]
    deviations = [
        float(np.sqrt(count @ (levels - mean) ** 2 / count.sum()))
        for count, mean in zip(counts, means, strict=True)
    ]
    return tuple(round(mean, 4) for mean in means), tuple(
        round(deviation, 4) or 1.0 for deviation in deviations
    )


def _digits() -> Dataset:
    """8x8 handwritten digits, each pixel drawn 4x4 and grey in three channels; a fixed stratified
    split of 1,437 and 360.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.repeat(np.repeat(levels[..., None], 4, 1), 4, 2), 3, 3)
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    arrays = [images[train], labels[train], images[test], labels[test]]
    return _dataset(
        "digits",
        arrays,
        tuple(map(str, range(10))),
        content_fingerprint(arrays),
        "scikit-learn's load_digits, enlarged from 8x8",
        True,
    )


SOURCES: dict[str, Callable[[], Dataset]] = {"digits": _digits}
"""Data sets that need no file of the user's, by name."""


def _from_file(path: Path) -> Dataset:
    """A data set of the user's own; raises `UserError` where the file holds anything else."""
    wanted = (
        f"dataset={path} must hold train_images and test_images u8[N, 32, 32, 3], train_labels and "
        "test_labels (whole numbers) and class_names (text)"
    )
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = [stored[field] for field in _FIELDS]
            class_names = tuple(map(str, stored["class_names"]))
    except FileNotFoundError:
        raise UserError(f"dataset={path}: there is no such file") from None
    except KeyError as error:
        raise UserError(f"{wanted}: {error.args[0]}") from None
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{wanted}: it cannot be read ({type(error).__name__})") from None
    for images, labels in (arrays[:2], arrays[2:]):
        fits = images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
        fits &= labels.dtype.kind in "iu" and labels.shape == images.shape[:1] and len(labels) > 0
        if not fits:
            raise UserError(
                f"{wanted}; it holds {images.dtype}{list(images.shape)} and "
                f"{labels.dtype}{list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise UserError(f"{wanted}: a label is none of its {len(class_names)} classes")
    arrays[1::2] = [labels.astype(np.int32) for labels in arrays[1::2]]
    fingerprint = content_fingerprint(arrays)
    return _dataset(path.stem, arrays, class_names, fingerprint, f"the file {path.name}", None)


def _cifar10_directory(
    directory: Path, archive: str | None, allow_unverified: bool, cache: Path, progress: Progress
) -> Path:
    prepared = directory / "cifar10" / archives.VERSION
    if archive and not re.match(r"https?://", archive):
        return archives.import_archive(
            Path(archive).expanduser(), directory, allow_unverified, progress
        )
    if prepared.exists() and not archive:
        origin = archives.read_origin(prepared)
        if origin is not None and not origin.verified and not allow_unverified:
            raise UserError(
                f"{prepared} was made from an unofficial archive: add allow_unverified=True to use "
                "it, marked as such"
            )
        return prepared
    from jaxnorm.data.download import fetch

    try:
        path = fetch(archive or archives.URL, cache / "downloads", progress)
    except UserError as error:
        if archive:
            raise
        raise UserError(
            f"CIFAR-10 is not in {directory} and could not be downloaded ({error}). Three ways "
            "on: archive=PATH of cifar-10-binary.tar.gz or "
            "cifar-10-python.tar.gz; data_dir= of a directory in which TFDS has prepared "
            f"cifar10 {archives.VERSION} as array_record; dataset=digits, which needs no "
            "download"
        ) from None
    try:
        return archives.import_archive(path, directory, allow_unverified, progress)
    except UserError as error:
        if (
            archives.sha256_of(path, progress, "checking the archive") not in archives.OFFICIAL
            and not allow_unverified
        ):
            path.unlink()  # a download that is not what it should be is not kept
        raise UserError(f"{error} (downloaded from {archive or archives.URL})") from None


def _find_prepared(name: str, directory: Path) -> Path:
    """DATA_DIR/name[/config]/version, the newest version; name may end in `:version`."""
    known = (
        sorted(
            {
                path.parent.relative_to(directory).parent.as_posix()
                for path in directory.glob("**/dataset_info.json")
            }
            - {"."}
        )
        if directory.is_dir()
        else []
    )
    if re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        base, _, version = name.partition(":")
        versions = [
            path.parent
            for path in (directory / base).glob(f"{version or '*.*.*'}/dataset_info.json")
        ]
        if versions:
            return max(
                versions, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)]
            )
    prepared = f"; prepared there: {', '.join(known)}" if known else ""
    raise UserError(
        f"dataset={name} is neither cifar10 nor digits, and no TFDS dataset of that name is "
        f"prepared in {directory}{prepared}"
    )


def _prepared(
    name: str, prepared: Path, origin: Origin | None, cache: Path, progress: Progress
) -> Dataset:
    """Reads a directory that TFDS or `import_archive` prepared, through the cache."""
    key = files_fingerprint(prepared)
    cached = cache / "decoded" / f"{key}.npys"
    if (found := read_arrays(cached)) is None:
        found = _decode(name, prepared, progress)
        write_arrays(cached, *found)
    arrays, class_names, fingerprint = found
    sizes = (len(arrays[1]), len(arrays[3]))
    if name == "cifar10" and (sizes != CIFAR10_COUNTS or len(class_names) != 10):
        raise UserError(
            f"{prepared} is not CIFAR-10: {len(arrays[1])} and {len(arrays[3])} images of "
            f"{len(class_names)} classes"
        )
    source = origin.source if origin else "a prepared TFDS directory"
    return _dataset(
        name, arrays, class_names, fingerprint, source, origin.verified if origin else None
    )


def _decode(
    name: str, prepared: Path, progress: Progress
) -> tuple[list[np.ndarray], tuple[str, ...], str]:
    """Decodes every image of a prepared dataset, in the order of its files."""
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # it advises OpenCV
    _refuse_foreign_features(prepared)
    try:
        builder: Any = tfds.builder_from_directory(str(prepared))
        features: Any = builder.info.features
        shapes = {key: tuple(feature.shape) for key, feature in features.items()}
        labels = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        ]
    except Exception as error:  # TFDS raises many kinds; what is wrong is the directory
        raise UserError(f"{prepared} is not a dataset that TFDS can read: {_line(error)}") from None
    if (
        shapes.get("image") != (32, 32, 3)
        or not labels
        or not {"train", "test"} <= set(builder.info.splits)
    ):
        raise UserError(
            f"dataset={name} does not fit: it needs 32x32x3 images, one label, and train and "
            f"test splits; it has {shapes}"
        )
    label = "label" if "label" in labels else labels[-1]
    total = sum(builder.info.splits[split].num_examples for split in ("train", "test"))
    arrays, done = [], 0
    try:
        for split in ("train", "test"):
            source: Any = builder.as_data_source(split)
            images = np.empty((len(source), 32, 32, 3), np.uint8)
            numbers = np.empty(len(source), np.int32)
            for i, example in enumerate(source):
                images[i], numbers[i] = example["image"], example[label]
                done += 1
                if done % 500 == 0 or done == total:
                    progress("decoding the images", done, total)
            arrays += [images, numbers]
    except Exception as error:
        raise UserError(
            f"{prepared} cannot be read (it must be prepared as array_record): {_line(error)}"
        ) from None
    names = tuple(features[label].names)
    for numbers in arrays[1::2]:
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(names):
            raise UserError(
                f"{prepared} has an empty split, or a label that is none of its {len(names)} "
                "classes"
            )
    return arrays, names, content_fingerprint(arrays)


def _refuse_foreign_features(prepared: Path) -> None:
    """Raises `UserError` where a dataset's features are not all TFDS's own: TFDS would import
    whatever module the file names.
    """
    try:
        text = (prepared / "features.json").read_text()
        json.loads(text, object_pairs_hook=_check_feature)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{prepared} is not a dataset that TFDS can read: {_line(error)}") from None


def _check_feature(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of features.json; raises ValueError where it names a class of another package."""
    for key, value in pairs:
        named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
        if named and not value.startswith("tensorflow_datasets."):
            raise ValueError(f"its features ask for {value}")
    return dict(pairs)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_FIELDS = ("train_images", "train_labels", "test_images", "test_labels")
