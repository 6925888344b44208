"""A dataset's name to uint8 arrays.

`load` reads CIFAR-10 through TFDS (without TensorFlow), scikit-learn's digits, any TFDS dataset
that is already prepared and has 32x32x3 images and one label, or an .npz file. A dataset that TFDS
has prepared, or an .npz file, needs no code. A new source is one more entry in `SOURCES`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.config import Setting, UserError, local_path, names_a_file, valid_text
from jaxnorm.data import cifar10, npz, prepared
from jaxnorm.data.cache import Decoded, content_fingerprint, default_cache_dir, default_data_dir
from jaxnorm.data.download import Progress

CIFAR10_COUNTS = (50_000, 10_000)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_DEVIATION = (0.2470, 0.2435, 0.2616)
KNOWN_CONTENT = {"195a5f68901b5f7e2da7cba93ab205c0a7466dc0865da2e67b8b4d0bb13ed155": "JPEG mirror"}
"""Labels of contents that are known not to be the official ones, by fingerprint: here CIFAR-10
recompressed as JPEG of quality 75.
"""


@dataclass(frozen=True, repr=False)
class Dataset:
    """Images and labels in memory, and all that is known of where they came from.

    `name` is what `load` was given, or the name of the file. `fingerprint` is a SHA-256 of the
    arrays and, if the classes are not named by this package (as CIFAR-10's and the digits' are), of
    their names in order. `verified` is True for data whose checksum is the official one or that
    ships with a package, False for data let in by allow_unverified, None for a file and for a
    directory that somebody else prepared. `mean` and `deviation` are per channel, of images scaled
    to [0, 1]. `label` says what is known of the content.
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
    test_split: str = "test"
    label: str = ""

    def __repr__(self) -> str:
        counts = f"{len(self.train_labels):,} training and {len(self.test_labels):,} test images"
        return f"<Dataset {self.name}: {counts}, {len(self.class_names)} classes; {self.caption}>"

    @property
    def caption(self) -> str:
        """The name of the data in every figure and table: its own, or that of the file; its label;
        a test split of another name; and "unverified data" or "origin not known" if it is so.
        """
        if names_a_file(self.name):
            return ", ".join(filter(None, [f"the file {self.name}", self.label]))
        origin = {True: "", False: "unverified data", None: "origin not known"}[self.verified]
        split = "" if self.test_split == "test" else f"tested on {self.test_split}"
        return ", ".join(filter(None, [self.name, self.label, split, origin]))

    def check(self) -> None:
        """Raises `UserError` if its arrays are not of the shapes and types above, or its labels not
        of its classes.
        """
        npz.check({name: getattr(self, name) for name in npz.KERAS}, len(self.class_names))

    def check_unchanged(self) -> None:
        """Raises `UserError` if its arrays are not those that its fingerprint is of."""
        content = content_fingerprint([getattr(self, name) for name in npz.KERAS])
        if self.fingerprint not in (content, _named_fingerprint(content, self.class_names)):
            raise UserError(
                f"the arrays of {self!r} are not those that were loaded: save your own by "
                f"np.savez('mine.npz', {', '.join(f'{name}=...' for name in npz.KERAS)}), and ",
                Setting("dataset", "mine.npz"),
                " loads them",
            )

    def statistics(self, rows: np.ndarray) -> tuple[Any, Any]:
        """Returns mean and deviation of the training images of these rows alone: held-out images
        have no part in them. CIFAR-10's are the published ones.
        """
        if self.name == "cifar10" or len(rows) == len(self.train_labels):
            return self.mean, self.deviation
        return channel_statistics(self.train_images[rows])


def load(
    name: Path | str = "cifar10",
    data_dir: Path | str | None = None,
    archive: str | None = None,
    *,
    allow_unverified: bool = False,
    test_split: str = "test",
    cache_dir: Path | str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Dataset:
    """Returns the dataset of a name.

    name: "cifar10", "digits", a prepared TFDS dataset, or an .npz file with `train_images` and
    `test_images` u8[N, 32, 32, 3], `train_labels` and `test_labels` (or Keras's `x_train`,
    `x_test`, `y_train` and `y_test`), and `class_names` if the classes have any.
    data_dir: the directory of TFDS datasets. archive: an official CIFAR-10 archive, a path or an
    address, or the folder that the Python one was unpacked to, to import first. test_split: the
    split of a prepared TFDS dataset to test on. Raises `UserError`.
    """
    name = os.fspath(name)
    if archive and name != "cifar10":
        raise UserError(
            Setting("archive"), f" holds CIFAR-10, not {name}: leave out one of the two"
        )
    if test_split != "test" and (name == "cifar10" or name in SOURCES or names_a_file(name)):
        raise UserError(
            Setting("test_split", test_split),
            " conflicts with ",
            Setting("dataset", name),
            ", which has one test set: only a prepared TFDS dataset has splits to choose from",
        )
    if test_split == "train":
        raise UserError(
            Setting("test_split", "train"), " is wrong: it is the split that nets are trained on"
        )
    if name in SOURCES:
        return SOURCES[name]()
    if names_a_file(name):
        return _from_file(name)
    directory = local_path(data_dir) if data_dir else default_data_dir()
    cache = local_path(cache_dir) if cache_dir else default_cache_dir()
    if name != "cifar10":
        folder = prepared.find(name, directory)
        decoded = prepared.read(name, folder, test_split, cache, progress)
        return _dataset(name, decoded, "a prepared TFDS directory", None, test_split)
    folder = cifar10.find_or_import(directory, archive, allow_unverified, cache, progress)
    decoded = prepared.read(name, folder, test_split, cache, progress)
    (_, labels, _, test_labels), class_names, _ = decoded
    if (len(labels), len(test_labels)) != CIFAR10_COUNTS or class_names != cifar10.CLASSES:
        raise UserError(f"{folder} is not CIFAR-10: it has other counts of images or other classes")
    origin = cifar10.read_origin(folder)
    source = origin.source if origin else "a prepared TFDS directory"
    return _dataset(name, decoded, source, origin.verified if origin else None)


def hold_out(
    labels: np.ndarray,  # i32[N]
    count: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:  # i32[N - count], i32[count], ascending
    """Returns the rows to train on, and `count` rows held out of each class's share of them.

    The held-out rows are drawn by the seed alone (NumPy's frozen `RandomState`). If a class's share
    is no whole number, the classes with the largest remainders get one more.
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


def channel_statistics(images: np.ndarray) -> tuple[Any, Any]:
    """Returns mean and deviation of each of three channels of u8 images scaled to [0, 1], to four
    digits; a constant channel has deviation 1.
    """
    levels, means, deviations = np.arange(256) / 255, [], []
    for channel in range(3):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., 0].size
        mean = float(share @ levels)
        means.append(round(mean, 4))
        deviations.append(round(float(np.sqrt(share @ (levels - mean) ** 2)), 4) or 1.0)
    return tuple(means), tuple(deviations)


def _dataset(
    name: str, decoded: Decoded, source: str, verified: bool | None, test_split: str = "test"
) -> Dataset:
    """Returns a dataset of what was decoded."""
    (images, labels, test_images, test_labels), class_names, content = decoded
    mean, deviation = CIFAR10_MEAN, CIFAR10_DEVIATION
    if name != "cifar10":
        mean, deviation = channel_statistics(images)
    own_names = name != "cifar10" and name not in SOURCES
    return Dataset(
        name,
        images,
        labels,
        test_images,
        test_labels,
        class_names,
        _named_fingerprint(content, class_names) if own_names else content,
        source,
        verified,
        mean,
        deviation,
        test_split,
        KNOWN_CONTENT.get(content, ""),
    )


def _named_fingerprint(content: str, class_names: tuple[str, ...]) -> str:
    """Returns the fingerprint of arrays, of this fingerprint, whose classes are named so."""
    return content_fingerprint([np.array([content, *class_names])])


def _digits() -> Dataset:
    """Returns 8x8 handwritten digits, each pixel drawn 4x4 and grey in three channels; a fixed
    stratified split of 1,437 and 360.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.repeat(np.repeat(levels[..., None], 4, 1), 4, 2), 3, 3)
    labels, rows = digits.target.astype(np.int32), np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=360, random_state=0, stratify=labels)
    arrays = [images[train], labels[train], images[test], labels[test]]
    decoded = arrays, tuple(map(str, range(10))), content_fingerprint(arrays)
    return _dataset("digits", decoded, "scikit-learn's load_digits, enlarged from 8x8", True)


SOURCES: dict[str, Callable[[], Dataset]] = {"digits": _digits}
"""Datasets that need no file of the user's, by name."""


def _from_file(name: str) -> Dataset:
    """Returns a dataset of the user's own, whose path may be as `valid_text` spells it in the
    records of a run; raises `UserError`.
    """
    path = local_path(name)
    if not os.path.exists(path):
        spelled = re.sub(r"\\u(dc[0-9a-f]{2})", lambda match: chr(int(match[1], 16)), str(path))
        path = Path(spelled) if os.path.exists(spelled) else path
    arrays, class_names, unused = npz.read(path)
    source = f"{path} (not used: {', '.join(unused)})" if unused else str(path)
    decoded = arrays, class_names, content_fingerprint(arrays)
    return _dataset(valid_text(path.name), decoded, valid_text(source), None)
