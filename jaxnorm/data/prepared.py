"""Reads, without TensorFlow, a dataset that TFDS or our own import prepared as array_record."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.config import UserError
from jaxnorm.data.cache import content_fingerprint, files_fingerprint, read_arrays, write_arrays
from jaxnorm.data.download import Progress

Decoded = tuple[list[np.ndarray], tuple[str, ...], str]
"""Images u8 and labels i32 of training and then of the test; class names; their fingerprint."""
BLOCK = 500
"""Images read at a time: one by one takes nearly twice as long."""


def find(name: str, directory: Path) -> Path:
    """DIRECTORY/name[/config]/version, the newest version; name may end in `:version`."""
    if re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        base, _, version = name.partition(":")
        notes = (directory / base).glob(f"{version or '*.*.*'}/dataset_info.json")
        if versions := [note.parent for note in notes]:
            return max(versions, key=lambda path: list(map(int, re.findall(r"\d+", path.name))))
    folders = [note.parent.parent for note in directory.glob("**/dataset_info.json")]
    known = sorted({path.relative_to(directory).as_posix() for path in folders} - {"."})
    prepared = f"; prepared there: {', '.join(known)}" if known else ""
    raise UserError(
        f"dataset={name} is neither cifar10 nor digits, and no TFDS dataset of that name is "
        f"prepared in {directory}{prepared}"
    )


def read(name: str, folder: Path, cache: Path | None, progress: Progress) -> Decoded:
    """Reads a prepared dataset, through the cache if there is one; raises `UserError`."""
    if cache is None:
        return decode(name, folder, progress)
    cached = cache / "decoded" / f"{files_fingerprint(folder)}.npys"
    if (decoded := read_arrays(cached)) is None:
        decoded = decode(name, folder, progress)
        write_arrays(cached, *decoded)
    return decoded


def decode(name: str, folder: Path, progress: Progress) -> Decoded:
    """Decodes every image of a prepared dataset, in the order of its files."""
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # it advises OpenCV
    try:
        json.loads((folder / "features.json").read_text(), object_pairs_hook=_check_feature)
        builder: Any = tfds.builder_from_directory(str(folder))
        splits, features = builder.info.splits, builder.info.features
        shapes = {key: tuple(feature.shape) for key, feature in features.items()}
        kind = tfds.features.ClassLabel
        labels = [key for key, feature in features.items() if isinstance(feature, kind)]
    except Exception as error:  # TFDS raises many kinds; what is wrong is the directory
        raise UserError(f"{folder} is not a dataset that TFDS can read: {_line(error)}") from None
    if shapes.get("image") != (32, 32, 3) or not labels or not {"train", "test"} <= set(splits):
        raise UserError(
            f"dataset={name} does not fit: it needs 32x32x3 images, one label, and train and "
            f"test splits; it has {shapes}"
        )
    label = "label" if "label" in labels else labels[-1]
    names, arrays, done = tuple(features[label].names), [], 0
    total = sum(splits[split].num_examples for split in ("train", "test"))
    try:
        for split in ("train", "test"):
            source: Any = builder.as_data_source(split)
            images = np.empty((len(source), 32, 32, 3), np.uint8)
            numbers = np.empty(len(source), np.int32)
            for first in range(0, len(source), BLOCK):
                rows = range(first, min(first + BLOCK, len(source)))
                for i, example in zip(rows, source.__getitems__(rows), strict=True):
                    images[i], numbers[i] = example["image"], example[label]
                done += len(rows)
                progress("decoding the images", done, total)
            if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(names):
                raise ValueError(f"a split is empty, or a label none of its {len(names)} classes")
            arrays += [images, numbers]
    except Exception as error:
        raise UserError(
            f"{folder} cannot be read (it must be prepared as array_record): {_line(error)}"
        ) from None
    return arrays, names, content_fingerprint(arrays)


def _check_feature(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of features.json; raises ValueError where it names a class of another package,
    which TFDS would import.
    """
    for key, value in pairs:
        named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
        if named and not value.startswith("tensorflow_datasets."):
            raise ValueError(f"its features ask for {value}")
    return dict(pairs)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
