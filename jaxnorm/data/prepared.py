"""Reads, without TensorFlow, a dataset that TFDS or our own import prepared as array_record or as
tfrecord.
"""

import difflib
import json
import logging
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.config import Setting, UserError
from jaxnorm.data import tfrecord
from jaxnorm.data.cache import (
    Decoded,
    content_fingerprint,
    decoded_file,
    read_decoded,
    write_decoded,
)
from jaxnorm.data.download import Progress

BLOCK = 500
"""Images read at a time: one by one takes nearly twice as long."""


def find(name: str, directory: Path) -> Path:
    """Returns DIRECTORY/name[/config]/version, the newest version; name may end in `:version`.

    Raises `UserError` if there is none, which says what the user may have meant.
    """
    if re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        base, _, version = name.partition(":")
        notes = (directory / base).glob(f"{version or '*.*.*'}/dataset_info.json")
        if versions := [note.parent for note in notes]:
            return max(versions, key=lambda path: list(map(int, re.findall(r"\d+", path.name))))
    folders = [note.parent.parent for note in directory.glob("**/dataset_info.json")]
    within = [path for path in folders if directory in path.parents]
    known = sorted(path.relative_to(directory).as_posix() for path in set(within))
    text = f"dataset={name} is neither cifar10 nor digits"
    if os.path.isdir(os.path.expanduser(name)):
        text = f"dataset={name} is a folder"
    elif os.path.isfile(os.path.expanduser(name)):
        text = f"dataset={name} is no .npz file"
    text += f", and no TFDS dataset of that name is prepared in {directory}"
    text += f", where there is {', '.join(known)}" if known else ""
    if meant := difflib.get_close_matches(name.lower(), ["cifar10", "digits", *known], n=1):
        text += f" (did you mean {meant[0]}?)"
    raise UserError(f"{text}; of your own data an .npz file is read, as np.savez writes it")


def read(
    name: str, folder: Path, test_split: str, cache: Path | None, progress: Progress
) -> Decoded:
    """Reads a prepared dataset, through the cache if there is one; raises `UserError`."""
    if cache is None:
        return decode(name, folder, test_split, progress)
    cached = decoded_file(cache, folder, test_split)
    if (decoded := read_decoded(cached)) is None:
        decoded = decode(name, folder, test_split, progress)
        write_decoded(cached, decoded)
    return decoded


def decode(name: str, folder: Path, test_split: str, progress: Progress) -> Decoded:
    """Decodes every image of two splits of a prepared dataset, in the order of its files."""
    builder = _builder(folder)
    info = builder.info
    label, names = _label(name, info)
    both, arrays, done = ("train", test_split), [], 0
    if missing := [split for split in both if split not in info.splits]:
        raise UserError(
            Setting("dataset", name),
            f" has no split called {missing[0]}: it has "
            f"{', '.join(info.splits)}; nets are trained on train, and ",
            Setting("test_split", "NAME"),
            " chooses another to test them on",
        )
    total = sum(info.splits[split].num_examples for split in both)
    try:
        for split in both:
            source = _examples(builder, split)
            images = np.empty((len(source), 32, 32, 3), np.uint8)
            numbers = np.empty(len(source), np.int32)
            for i, example in enumerate(in_blocks(source), 1):
                images[i - 1], numbers[i - 1] = example["image"], example[label]
                if i % BLOCK == 0 or i == len(source):
                    progress("decoding the images", done + i, total)
            done += len(source)
            if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(names):
                raise ValueError(f"a split is empty, or a label none of its {len(names)} classes")
            arrays += [images, numbers]
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {_line(error)}") from None
    return arrays, names, content_fingerprint(arrays)


def in_blocks(source: Any) -> Iterator[Any]:
    """Yields the examples of a TFDS data source, of which it reads `BLOCK` at a time."""
    for first in range(0, len(source), BLOCK):
        yield from source.__getitems__(range(first, min(first + BLOCK, len(source))))


def _builder(folder: Path) -> Any:
    """Returns TFDS's view of a prepared dataset; raises `UserError`."""
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # it advises OpenCV
    try:
        json.loads((folder / "features.json").read_text(), object_pairs_hook=_check_feature)
        return tfds.builder_from_directory(str(folder))
    except Exception as error:  # TFDS raises many kinds; what is wrong is the directory
        raise UserError(f"{folder} is not a dataset that TFDS can read: {_line(error)}") from None


def _label(name: str, info: Any) -> tuple[str, tuple[str, ...]]:
    """Returns the feature that is the label, and the names of its classes; raises `UserError`."""
    import tensorflow_datasets as tfds

    shapes = {key: tuple(feature.shape) for key, feature in info.features.items()}
    kind = tfds.features.ClassLabel
    labels = [key for key, feature in info.features.items() if isinstance(feature, kind)]
    if shapes.get("image") != (32, 32, 3) or not labels:
        raise UserError(
            Setting("dataset", name),
            f" does not fit: it needs 32x32x3 images and one label; it has {shapes}",
        )
    label = "label" if "label" in labels else labels[-1]
    return label, tuple(info.features[label].names)


def _examples(builder: Any, split: str) -> Any:
    """Returns the decoded examples of a split; raises ValueError, or what TFDS raises."""
    info = builder.info
    formats = {kind.value for kind in info.available_file_formats()}
    if "array_record" in formats:
        return builder.as_data_source(split)
    if info.file_format is None or info.file_format.value != "tfrecord":
        raise ValueError(
            f"it is prepared as {', '.join(sorted(formats))}, but only array_record and tfrecord "
            "can be read"
        )
    paths = [Path(path) for path in info.splits[split].filepaths]
    examples = tfrecord.Examples(paths, info.features.deserialize_example_np)
    if len(examples) != info.splits[split].num_examples:
        raise ValueError(f"its split {split} has {len(examples)} images, not as many as it says")
    return examples


def _check_feature(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of features.json; raises ValueError if it names a class of another package,
    which TFDS would import.
    """
    for key, value in pairs:
        named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
        if named and not value.startswith("tensorflow_datasets."):
            raise ValueError(f"its features ask for {value}")
    return dict(pairs)


def _line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")
