"""Reads a dataset of the user's own from an .npz file, or says in one line what is wrong with it
and which NumPy expression mends it.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.config import Setting, UserError

KERAS = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}
"""The arrays that a file must hold, and Keras's names for them, which are accepted too."""
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: `git lfs "
    "pull` fetches that",
    b"<": "a web page, not the file that was meant to be downloaded",
    b"\x93NUMPY": "a single array: np.savez writes an .npz file of several",
}
"""Kinds of other files, by their first bytes."""


def read(path: Path) -> tuple[list[np.ndarray], tuple[str, ...], list[str]]:
    """Reads images u8[N, 32, 32, 3] and labels i32[N] of training and then of the test, the names
    of the classes, and the names of the arrays that are not used.

    Labels may be a column [N, 1]. Without `class_names` the classes are called "0", "1" and so on.
    Raises `UserError` for a file that holds anything else.
    """
    unused: list[str] = []
    try:
        _check_kind(path)
        with np.load(path, allow_pickle=False) as stored:
            names = _names_of_arrays(stored.files)
            unused = sorted({*stored.files} - {*names, "class_names"})
            arrays = [_array(stored, name) for name in names]
            classes = _array(stored, "class_names") if "class_names" in stored.files else None
        for i in (0, 2):
            _check_images(names[i], arrays[i])
            arrays[i + 1] = _labels(names[i + 1], arrays[i + 1], len(arrays[i]))
        if classes is None:
            classes = np.arange(len(np.unique(arrays[1])))
        class_names = _class_names(classes)
        for i in (1, 3):
            _check_range(names[i], arrays[i], len(class_names))
            arrays[i] = arrays[i].astype(np.int32)
        return arrays, class_names, unused
    except FileNotFoundError:
        reason = "there is no such file"
    except UserError as error:
        reason = f"{error}; not used: {', '.join(unused[:10])}" if unused else error
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or error}"
    except Exception as error:  # a damaged file can fail in any way
        reason = f"it is damaged ({type(error).__name__}: {error})"
    raise UserError(Setting("dataset", path), f": {' '.join(str(reason).split())}")


def check(arrays: Mapping[str, Any], classes: int) -> None:
    """Raises `UserError` if arrays by these names are not images u8[N, 32, 32, 3] and whole labels
    [N] of so many classes, each images and then their labels.
    """
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"{name} is no array but a {type(array).__name__}")
    names = list(arrays)
    for of_images, of_labels in zip(names[::2], names[1::2], strict=True):
        images, labels = arrays[of_images], arrays[of_labels]
        _check_images(of_images, images)
        if _labels(of_labels, labels, len(images)).shape != labels.shape:
            raise _wrong(of_labels, f"int[{len(images)}]", labels, f"{of_labels}[:, 0]")
        _check_range(of_labels, labels, classes)


def _check_kind(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(100).lstrip()
    for magic, what in _OTHER_FILES.items():
        if start.startswith(magic):
            raise UserError(f"it is {what}")
    if not zipfile.is_zipfile(path):
        raise UserError("it is no .npz file, or only a part of one")


def _names_of_arrays(files: list[str]) -> list[str]:
    """Returns the names under which a file holds the four arrays."""
    for names in (list(KERAS), list(KERAS.values())):
        if {*names} <= {*files}:
            return names
    missing = [name for name in KERAS if name not in files]
    raise UserError(
        f"it lacks {', '.join(missing)}; it must hold {', '.join(KERAS)} (or "
        f"{', '.join(KERAS.values())}) and may hold class_names; it holds "
        f"{', '.join(sorted(files)[:10]) or 'nothing'}"
    )


def _array(stored: Any, name: str) -> np.ndarray:
    try:
        array = stored[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"{name} holds Python objects, which may run anything when they are read: "
            f"np.array({name}.tolist()) makes it plain"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{name} is no array")
    return array


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3) and len(images):
        return
    expression = _to_images(name, images)
    raise _wrong(name, "uint8[N, 32, 32, 3]", images, expression)


def _to_images(name: str, images: np.ndarray) -> str:
    """Returns the NumPy expression that makes uint8[N, 32, 32, 3] of images of another type, of
    channels before the rows, of one grey channel, or of fewer pixels; empty if none of these helps.
    """
    text, shape = name, images.shape
    if len(shape) not in (3, 4) or not images.size or images.dtype.kind not in "fiu":
        return ""
    lowest, highest = images.min(), images.max()
    if not (lowest >= 0 and highest <= 255):  # nor NaN
        return ""
    if images.dtype.kind == "f":
        text = f"np.round({text}{' * 255' if highest <= 1 else ''})"
    if images.dtype != np.uint8:
        text += ".astype(np.uint8)"
    if len(shape) == 3:
        text, shape = f"{text}[..., None]", (*shape, 1)
    elif shape[1] in (1, 3) and shape[3] not in (1, 3):
        text, shape = f"{text}.transpose(0, 2, 3, 1)", (shape[0], *shape[2:], shape[1])
    if shape[3] == 1:
        text, shape = f"np.repeat({text}, 3, 3)", (*shape[:3], 3)
    if shape[3] != 3 or max(shape[1:3]) > 32:
        return ""
    if shape[1:3] != (32, 32):
        pads = ", ".join(f"({(32 - n) // 2}, {(33 - n) // 2})" for n in shape[1:3])
        text = f"np.pad({text}, ((0, 0), {pads}, (0, 0)))"
    return text


def _labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Returns labels [N], whole numbers, of a column or as they are."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape == (count,) and labels.dtype.kind in "iu":
        return labels
    expression = ""
    if labels.ndim == 2 and len(labels) == count:
        expression = f"{name}.argmax(1)"
    elif labels.dtype.kind == "f" and labels.shape == (count,):
        expression = f"{name}.astype(np.int32)"
    raise _wrong(
        name, f"whole numbers from 0, int[{count}], one for each image", labels, expression
    )


def _check_range(name: str, labels: np.ndarray, count: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if wrong.size:
        row = wrong[0]
        text = f"{name}[{row}] is {labels[row]}, but the labels of {count} classes are 0 to "
        text += f"{count - 1}: classes start at 0"
        if labels.min() > 0 and labels.max() <= count:
            text += f", as in {name} - 1"
        raise UserError(text)


def _class_names(names: np.ndarray) -> tuple[str, ...]:
    """Returns names from text, bytes or whole numbers [K], or a column of them."""
    if names.ndim == 2 and names.shape[1] == 1:
        names = names[:, 0]
    if names.ndim != 1 or not names.size or names.dtype.kind not in "USiu":
        raise _wrong("class_names", "text, str[classes]", names, "")
    texts = []
    for i, name in enumerate(names.tolist()):
        try:
            text = name.decode() if isinstance(name, bytes) else str(name)
            text.encode()
        except UnicodeError:
            raise UserError(f"class_names[{i}] is no valid text: {name!r}") from None
        texts.append(text)
    return tuple(texts)


def _wrong(name: str, wanted: str, array: np.ndarray, expression: str) -> UserError:
    found = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    mend = f": {expression} converts it" if expression else ""
    return UserError(f"{name} must be {wanted}, not {found}{mend}")
