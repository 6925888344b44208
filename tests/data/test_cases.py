"""Files of the user's own as people have them: taken, or refused in one line that mends them."""

import re

import numpy as np
import pytest
from helpers import refusal, run

from jaxnorm import cli, job
from jaxnorm.config import Config, tuned
from jaxnorm.data import datasets
from jaxnorm.runs import environment
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.training.experiment import Experiment
from jaxnorm.training.fit import fit

RANDOM = np.random.default_rng(0)
TRAIN, TEST = (RANDOM.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (12, 6))
LABELS, TEST_LABELS = np.arange(12) % 3, np.arange(6) % 3
NAMES = np.array(["cat", "dog", "eel"])
GRAY = {"train_images": TRAIN[:, 2:30, 2:30, 0], "test_images": TEST[:, 2:30, 2:30, 0]}
GOOD = {
    "train_images": TRAIN,
    "train_labels": LABELS,
    "test_images": TEST,
    "test_labels": TEST_LABELS,
    "class_names": NAMES,
}


@pytest.fixture
def write(scratch):
    """Writes a file, some arrays changed or, if they are None, left out; returns its path."""

    def written(name="own.npz", **changes):
        path = scratch / name
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
        return path

    return written


def renamed(*names):
    """Our names of the four arrays, changed to others."""
    arrays = dict(zip(names, list(GOOD.values())[:4], strict=True))
    return {**dict.fromkeys(GOOD), **arrays}


@pytest.mark.parametrize(
    ("name", "changes", "class_names"),
    [
        ("own.npz", {}, ("cat", "dog", "eel")),
        ("UPPER.NPZ", {}, ("cat", "dog", "eel")),
        ("caf\udce9.npz", {}, ("cat", "dog", "eel")),
        ("column.npz", {"train_labels": LABELS[:, None].astype("u1")}, ("cat", "dog", "eel")),
        ("keras.npz", renamed("x_train", "y_train", "x_test", "y_test"), ("0", "1", "2")),
        ("no-names.npz", {"class_names": None}, ("0", "1", "2")),
        ("names-column.npz", {"class_names": NAMES[:, None]}, ("cat", "dog", "eel")),
        ("names-bytes.npz", {"class_names": NAMES.astype(bytes)}, ("cat", "dog", "eel")),
        ("names-numbers.npz", {"class_names": np.array([7, 8, 9])}, ("7", "8", "9")),
    ],
)
def test_a_good_file_is_taken(write, name, changes, class_names):
    dataset = datasets.load(str(write(name, **changes)))
    assert dataset.class_names == class_names
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(dataset, field), GOOD[field])
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (np.uint8, np.int32)
    assert dataset.verified is None


def test_a_home_directory_is_expanded(write, scratch, monkeypatch):
    monkeypatch.setenv("HOME", str(scratch))
    write()
    assert datasets.load("~/own.npz").name == "own.npz"


ABOVE = {"train_labels": LABELS + 1, "test_labels": TEST_LABELS + 1}
START = "train_labels[2] is 3, but the labels of 3 classes are 0 to 2: classes start at 0"
WRONG = [
    ({"train_images": (TRAIN - 128.0) / 64}, "[N, 32, 32, 3], not float64[12, 32, 32, 3]"),
    ({"test_images": np.zeros((0, 32, 32, 3), np.uint8)}, "test_images must be uint8[N, 32, 32"),
    ({"train_images": np.zeros((12, 64, 64, 3), np.uint8)}, "not uint8[12, 64, 64, 3]"),
    ({"train_images": np.array(3)}, "train_images must be uint8[N, 32, 32, 3], not int64[]"),
    ({"train_images": np.array([*TRAIN, None], object)[:-1]}, "train_images holds Python objects"),
    (GRAY, "train_images must be uint8[N, 32, 32, 3], not uint8[12, 28, 28]: np.pad("),
    ({**GRAY, "val_images": TEST, "val_labels": LABELS}, "; not used: val_images, val_labels"),
    ({"test_labels": TEST_LABELS[:5]}, "test_labels must be whole numbers from 0, int[6],"),
    ({"train_labels": np.array(3)}, "not int64[]"),
    ({"train_labels": np.eye(3, dtype=int)[LABELS]}, "[12, 3]: train_labels.argmax(1) converts"),
    (ABOVE, START),
    ({**ABOVE, "class_names": None}, START),
    ({"test_labels": TEST_LABELS - 1}, "test_labels[0] is -1"),
    ({"train_labels": LABELS * 10**9, "class_names": None}, "train_labels[1] is 1000000000"),
    (
        {"class_names": np.array(["cat", "dog", "\ud800"])},
        r"class_names[2] is no valid text: '\ud800",
    ),
    ({"class_names": np.array([b"cat", b"\xff", b"eel"])}, "class_names[1] is no valid text"),
    ({"class_names": np.eye(3)}, "class_names must be text, str[classes], not float64[3, 3]"),
    (
        {"train_labels": None},
        "it lacks train_labels; it must hold train_images, train_labels, test",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_array_is_one_line_that_names_it(write, changes, message):
    path = write(**changes)
    said = refusal(datasets.load, str(path))
    assert said.startswith(f"dataset={path}: ")
    assert message in said


@pytest.mark.parametrize(
    "changes",
    [
        {"train_images": TRAIN / 255},
        {"train_images": TRAIN.astype(np.float32)},
        {"train_images": TRAIN.astype(np.int64)},
        {"train_images": TRAIN.transpose(0, 3, 1, 2) / 255},
        {"train_images": TRAIN[..., 0]},
        {"train_images": TRAIN[..., :1]},
        {"train_images": TRAIN[:, 2:29, 2:30, :1].transpose(0, 3, 1, 2) / 255},
        {"train_images": np.array([*TRAIN, None], object)[:-1]},
        {"train_labels": np.eye(3)[LABELS]},
        {"train_labels": LABELS.astype(float)},
        {"train_labels": LABELS + 1},
        {"train_labels": LABELS.astype(object)},
        {"class_names": NAMES.astype(object)},
    ],
    ids=lambda changes: " ".join(f"{k} {v.dtype} {v.shape}" for k, v in changes.items()),
)
def test_the_numpy_expression_of_an_error_mends_the_array(write, changes):
    ((name, array),) = changes.items()
    said = refusal(datasets.load, str(write(**changes)))
    (mended,) = re.findall(r": ([^:]+) (?:converts it|makes it plain)$|as in (.+)$", said)
    mended = eval("".join(mended), {"np": np, name: array})
    dataset = datasets.load(str(write(**{name: mended})))
    if "images" not in name:
        np.testing.assert_array_equal(dataset.train_labels, LABELS)
    elif array.dtype == object or array.shape[-1] == 3 or array.shape[1:] == (3, 32, 32):
        np.testing.assert_array_equal(dataset.train_images, TRAIN)
    else:  # grey, and perhaps smaller
        inside = dataset.train_images[:, 2:29, 2:30]
        np.testing.assert_array_equal(inside, np.repeat(TRAIN[:, 2:29, 2:30, :1], 3, 3))


OTHER = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page"),
    (b"\x93NUMPY\x01\x00", "a single array: np.savez writes"),
    (b"", "it is no .npz file, or only a part of one"),
    (lambda good: good[: len(good) // 2], "it is no .npz file, or only a part of one"),
    (lambda good: good[:9_000] + b"x" + good[9_001:], "it is damaged (BadZipFile: Bad CRC-32"),
    ("nothing", "there is no such file"),
    ("folder", "it cannot be read: Is a directory"),
]


@pytest.mark.parametrize(("content", "message"), OTHER)
def test_another_file_is_called_what_it_is(write, content, message):
    path = write()
    good = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content != "nothing":
        path.write_bytes(content(good) if callable(content) else content)
    said = refusal(datasets.load, str(path))
    assert said.startswith(f"dataset={path}: ")
    assert message in said


def test_arrays_that_are_not_used_are_named(write):
    path = write(val_images=TEST, val_labels=TEST_LABELS)
    assert datasets.load(str(path)).source == f"{path} (not used: val_images, val_labels)"


@pytest.mark.parametrize("name", ["cifar10.npz", "DIGITS.NPZ", "caf\udce9.npz"])
def test_renaming_a_file_changes_no_number(write, name):
    wanted = datasets.load(str(write(train_images=TRAIN // 8 + 200)))
    path = str(write(name, train_images=TRAIN // 8 + 200))
    dataset = datasets.load(path)
    rows = np.arange(5)
    assert dataset.statistics(rows) == wanted.statistics(rows)
    assert dataset.statistics(rows) == datasets.channel_statistics(dataset.train_images[rows])
    for field in {*vars(dataset)} - {"name", "source"}:
        np.testing.assert_array_equal(getattr(dataset, field), getattr(wanted, field))
    assert dataset.caption == f"the file {dataset.name}"
    ours, theirs = (vars(tuned(dataset=given)) for given in (path, "own.npz"))
    assert {**ours, "dataset": ""} == {**theirs, "dataset": ""}


def test_a_known_content_is_labelled_in_a_file_too(write, monkeypatch):
    arrays = [TRAIN, LABELS.astype(np.int32), TEST, TEST_LABELS.astype(np.int32)]
    monkeypatch.setitem(datasets.KNOWN_CONTENT, datasets.content_fingerprint(arrays), "JPEG mirror")
    dataset = datasets.load(str(write()))
    shown = "<Dataset own.npz: 12 training and 6 test images, 3 classes; "
    assert repr(dataset) == f"{shown}the file own.npz, JPEG mirror>"


def begun(config, dataset, path):
    """A run that began, as the command that is called in this test, and has trained nothing."""
    out = RunDirectory.create(path)
    now = environment.environment(job._command())
    out.write_json("run.json", environment.describe(config, Experiment([config], dataset), now))
    return out


@pytest.mark.parametrize("names", ["dog cat eel", "cat dog owl", "cat dog eel owl"])
def test_a_run_goes_on_with_the_same_classes_alone(write, scratch, names):
    config = Config("layer", "three-layers", str(write()), 1, 4)
    out = begun(config, datasets.load(config.dataset), scratch / "run")
    other = datasets.load(str(write(class_names=np.array(names.split()))))
    said = refusal(run, config, other, out.path)
    assert "whose classes have other names or another order" in said


def test_a_name_that_is_not_utf8_is_recorded_so_that_it_is_found_again(write, scratch, monkeypatch):
    path = write("caf\udce9.npz")
    dataset = datasets.load(str(path))
    monkeypatch.setattr(cli, "_arguments", ["--dataset", str(path)])
    config = Config(dataset=str(path), batch_size=4)
    info = begun(config, dataset, scratch / "run").info()
    assert info.config == config
    assert r"caf\udce9.npz" in info.environment.command
    assert info.dataset.caption == r"the file caf\udce9.npz"
    assert datasets.load(info.config.dataset).fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    "settings", [{}, {"dataset": "own.npz", "test_split": "x"}, {"dataset": "other.npz"}], ids=str
)
def test_fit_of_another_dataset_than_the_configs_is_refused(write, settings):
    said = refusal(fit, Config(epochs=1, **settings), datasets.load(str(write())))
    assert "is not what is given, <Dataset own.npz" in said
