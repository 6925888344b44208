"""Datasets by name: digits, prepared TFDS directories, the cache, and what the user hears."""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import refusal

from jaxnorm.data import cifar10, tfrecord
from jaxnorm.data import datasets as data
from jaxnorm.data import prepared as prepared_


def prepare(
    directory,
    name="tiny_set",
    shape=(32, 32, 3),
    splits=("train", "test"),
    labels=("cat", "dog", "eel"),
    version="1.2.0",
):
    """Prepares a small TFDS dataset as array_record, as a TFDS user would have it."""
    import tensorflow_datasets as tfds
    from PIL import Image

    rng = np.random.default_rng(0)
    features = {"image": tfds.features.Image(shape=shape)}
    if labels:
        features["label"] = tfds.features.ClassLabel(names=labels)

    def drawn(split):
        for i in range(9):
            pixels = rng.integers(0, 256, shape, np.uint8)
            image = Image.fromarray(pixels if shape[-1] == 3 else pixels[..., 0])
            yield i, {"image": image} | ({"label": i % 3} if labels else {})

    fields = {
        "__module__": __name__,
        "VERSION": tfds.core.Version(version),
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        ),
        "_split_generators": lambda self, manager: {s: drawn(s) for s in splits},
        "_generate_examples": lambda self: None,
    }
    with tfds.core.registered.skip_registration():
        cls = type(name.title().replace("_", ""), (tfds.core.GeneratorBasedBuilder,), fields)
    tfds.disable_progress_bar()
    cls(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory / name / version


def load(directory, name="tiny_set", cache="cache", **options):
    return data.load(name, directory, cache_dir=directory / cache, **options)


def crc32c(data: bytes) -> int:
    """Bit by bit, as the polynomial has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def to_tfrecord(folder) -> None:
    """Turns a prepared dataset's files into what TFDS writes by default."""
    import tensorflow_datasets as tfds

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    builder = tfds.builder_from_directory(str(folder))
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split, info in builder.info.splits.items():
        (path,) = map(Path, info.filepaths)
        with Path(str(path).replace("array_record", "tfrecord")).open("wb") as file:
            for record in builder.as_data_source(split, deserialize_method=raw):
                length = struct.pack("<Q", len(record))
                file.write(length + masked(length) + record + masked(record))
        path.unlink()
    note = folder / "dataset_info.json"
    note.write_text(note.read_text().replace('"array_record"', '"tfrecord"'))


def test_digits_are_32x32x3_stratified_and_fixed():
    digits = data.load("digits")
    for split, count in (("train", 1437), ("test", 360)):
        images, labels = (getattr(digits, f"{split}_{what}") for what in ("images", "labels"))
        assert (images.shape, images.dtype) == ((count, 32, 32, 3), np.uint8)
        assert (labels.shape, labels.dtype) == ((count,), np.int32)
    counts = np.bincount(digits.test_labels, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert digits.train_images.max() == 255
    blocks = digits.test_images.reshape(360, 8, 4, 8, 4, 3)
    assert (blocks == blocks[:, :, :1, :, :1, :1]).all()
    assert digits.fingerprint == "adec317f9625dec19e8482ff1ffbe539909b5cec5e198bf675838c74061625df"
    assert digits.caption == "digits"


def test_channel_statistics_equal_numpys():
    images = np.random.default_rng(0).integers(0, 200, (5, 32, 32, 3), np.uint8)
    images[..., 2] = 51
    mean, deviation = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(deviation[:2], (images / 255).std((0, 1, 2))[:2], atol=5.1e-5)
    assert deviation[2] == 1.0


def test_a_prepared_dataset_is_read_and_cached_and_a_damaged_cache_is_rebuilt(scratch, monkeypatch):
    prepare(scratch)
    first = load(scratch)
    assert first.class_names == ("cat", "dog", "eel")
    assert first.train_images.shape == (9, 32, 32, 3)
    assert sorted(first.train_labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert first.verified is None
    (cached,) = (scratch / "cache" / "decoded").iterdir()
    decoded, decode = [], prepared_.decode
    monkeypatch.setattr(prepared_, "decode", lambda *args: decoded.append(1) or decode(*args))
    assert load(scratch).fingerprint == first.fingerprint
    assert not decoded
    good = cached.read_bytes()
    at = good.index(first.train_images.tobytes()) + 1000
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for number, damage in enumerate([flipped, good[: len(good) // 2], b"", b"PK\x03\x04"], 1):
        cached.write_bytes(damage)
        again = load(scratch)
        assert len(decoded) == number
        np.testing.assert_array_equal(again.train_images, first.train_images)
        assert cached.read_bytes() == good
    test, train = sorted((scratch / "tiny_set" / "1.2.0").glob("*array_record*"))
    train.write_bytes(test.read_bytes())  # other files are not served from the cache
    assert load(scratch).fingerprint != first.fingerprint
    (scratch / "file").touch()
    assert len(load(scratch, cache="file").train_labels) == 9  # one that cannot be written


def test_images_are_read_in_blocks_each_once(scratch, monkeypatch):
    prepare(scratch)
    whole, seen = load(scratch, cache="a"), []
    monkeypatch.setattr(prepared_, "BLOCK", 4)
    blocks = load(scratch, cache="b", progress=lambda *at: seen.append(at))
    assert seen == [("decoding the images", done, 18) for done in (4, 8, 9, 13, 17, 18)]
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))


def test_a_test_split_of_another_name_is_chosen_and_each_is_cached(scratch):
    prepare(scratch, splits=("train", "val", "dev"))
    assert re.search("no split called test: it has (dev|train|val), .*NAME", refusal(load, scratch))
    for _ in range(2):
        val, dev = (load(scratch, test_split=split) for split in ("val", "dev"))
        np.testing.assert_array_equal(val.train_images, dev.train_images)
        assert (val.test_images != dev.test_images).any()
        assert val.fingerprint != dev.fingerprint
        assert val.caption == "tiny_set, tested on val, origin not known"
    assert len(list((scratch / "cache" / "decoded").iterdir())) == 2


@pytest.mark.parametrize("name", ["cifar10", "digits", "x.npz", "tiny_set"])
def test_a_test_split_is_refused_if_there_is_none_to_choose(scratch, name):
    prepare(scratch)
    said = refusal(load, scratch, name, test_split="val")
    conflict = f"conflicts with dataset={name}, which has one test set"
    assert ("no split called val: it has" if name == "tiny_set" else conflict) in said
    assert "test_split=train" in refusal(load, scratch, name, test_split="train")


def test_the_names_and_order_of_the_classes_are_in_the_fingerprint(scratch):
    for labels in ("abc", "bac", "abcd"):
        prepare(scratch / labels, labels=tuple(labels))
    assert len({load(scratch / labels).fingerprint for labels in ("abc", "bac", "abcd")}) == 3


def test_a_dataset_prepared_as_tfrecord_is_the_same(scratch):
    folder = prepare(scratch)
    wanted = load(scratch, cache="a")
    to_tfrecord(folder)
    assert load(scratch, cache="b").fingerprint == wanted.fingerprint
    assert "tensorflow" not in sys.modules


def test_crc32c_is_the_standards():
    records = [b"123456789", bytes(32), bytes(range(200)), b"abcd"]
    crcs = [crc32c(record) for record in records]
    assert crcs[:2] == [0xE3069283, 0x8A9136AA]  # of RFC 3720 and of Wikipedia's list
    rotated = tfrecord.masked_crc32c(records) - np.uint32(0xA282EAD8)
    np.testing.assert_array_equal(rotated << 15 | rotated >> 17, np.array(crcs, np.uint32))


RECORDS = {
    "a bit": lambda good, one: good[:-6] + bytes([good[-6] ^ 1]) + good[-5:],
    "the length": lambda good, one: struct.pack("<Q", 2**60) + good[8:],
    "half": lambda good, one: good[: len(good) // 2],
    "a record fewer": lambda good, one: good[one:],
    "empty": lambda good, one: b"",
}


def test_a_damaged_tfrecord_is_refused_in_one_line(scratch):
    folder = prepare(scratch)
    to_tfrecord(folder)
    path = next(folder.glob("*train*"))
    good = path.read_bytes()
    (length,) = struct.unpack_from("<Q", good)
    for damage, damaged in RECORDS.items():
        path.write_bytes(damaged(good, length + 16))
        assert re.search("cannot be read: (a|its) .*[a-z]$", refusal(load, scratch)), damage


def test_cifar10_that_somebody_prepared_as_tfrecord_is_used(scratch, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (9, 9))
    to_tfrecord(prepare(scratch, "cifar10", labels=cifar10.CLASSES, version="3.0.2"))
    dataset = load(scratch, "cifar10")
    assert dataset.caption == "cifar10, origin not known"
    assert dataset.mean == data.CIFAR10_MEAN


@pytest.mark.parametrize(("order", "count"), [(-1, 9), (1, 10)], ids=["classes", "counts"])
def test_another_dataset_in_cifar10s_place_is_refused(scratch, monkeypatch, order, count):
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (9, count))
    prepare(scratch, "cifar10", labels=cifar10.CLASSES[::order], version="3.0.2")
    assert "is not CIFAR-10" in refusal(load, scratch, "cifar10")


@pytest.mark.parametrize("wrong", [{"shape": (28, 28, 1)}, {"labels": ()}], ids=str)
def test_a_dataset_of_other_shape_is_refused(scratch, wrong):
    prepare(scratch, **wrong)
    assert "needs 32x32x3 images and one label" in refusal(load, scratch)


LABEL = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
FORMAT = "it is prepared as riegeli, but only array_record and tfrecord can be read"
DAMAGES = [
    ("features.json", ".*", '{"pythonClassName": "os.system"}', "its features ask for os.system"),
    ("features.json", LABEL, "antigravity.Class", "its features ask for antigravity.Class"),
    ("features.json", r'"numClasses": "\d+"', '"numClasses": "1"', "a label none of its"),
    ("dataset_info.json", ".*", "not JSON", "is not a dataset that TFDS can read"),
    ("dataset_info.json", "array_record", "riegeli", FORMAT),
    ("*train*", ".*", "rubbish" * 10_000, "cannot be read"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(scratch, name, old, new, message):
    (path,) = prepare(scratch).glob(name)
    if "num" in new:
        path.with_name("label.labels.txt").write_text("cat\n")
    content = path.read_text(errors="ignore")
    path.write_text(re.sub(old, new, content, count=0 if old != ".*" else 1, flags=re.DOTALL))
    assert message in refusal(load, scratch)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["cifar11", "../x", "/etc", "a b", "tiny_set:9.9.9", "*"])
def test_an_unknown_dataset_is_refused_and_the_known_are_named(scratch, name):
    prepare(scratch)
    assert "tiny_set" in refusal(load, scratch, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.parquet", "of your own data an .npz file is read, as np.savez writes it"),
        ("x.npy", "x.npy is no .npz file, and"),
        ("folder", "folder is a folder, and"),
        ("CIFAR10", "(did you mean cifar10?)"),
        ("cifar100", "(did you mean cifar10?)"),
        ("Digits", "(did you mean digits?)"),
        ("tinyset", "(did you mean tiny_set?)"),
    ],
)
def test_what_was_meant_is_guessed_in_one_line(inside, name, message):
    (inside / "tfds" / "tiny_set" / "1.0.0").mkdir(parents=True)
    (inside / "tfds" / "tiny_set" / "1.0.0" / "dataset_info.json").write_text("{}")
    (inside / "folder").mkdir()
    (inside / "x.npy").write_bytes(b"")
    assert message in refusal(data.load, name, inside / "tfds")
    other = inside / "tfds" / "tiny_set" / "1.0.0"  # which holds no other
    assert "of your own data an .npz file is read" in refusal(data.load, name, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "~nosuchuser/x"), "~nosuchuser/x: there is no such home folder"),
        (("cifar10", "/x", "~nosuchuser/x"), "~nosuchuser/x: there is no such home folder"),
        (("~nosuchuser/x.npz",), "~nosuchuser/x.npz: there is no such home folder"),
        (("tiny", "gs://bucket/x"), "gs://bucket/x is an address"),
        (("digits", "/x", "a.tar.gz"), "leave out one of the two"),
    ],
)
def test_wrong_places_are_refused_in_one_line(arguments, message):
    assert message in refusal(data.load, *arguments)


def test_without_data_and_a_route_the_user_hears_at_once_of_three_ways_on(scratch, monkeypatch):
    addresses = {"http://127.0.0.1:9/binary.tar.gz": "", "http://127.0.0.1:9/python.tar.gz": ""}
    monkeypatch.setattr(cifar10, "ADDRESSES", addresses)
    said = refusal(load, scratch, "cifar10")
    for words in ("no route to it", "archive=", "data_dir=", "dataset=digits", *addresses):
        assert words in said  # and not that no answer came in eight seconds
    assert not (scratch / "cifar10").exists()


def test_each_class_gives_its_share_of_the_held_out_rows():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    kept, held = data.hold_out(labels, 10, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(100))
    np.testing.assert_array_equal(np.bincount(labels[held]), [5, 3, 2])
    # 3.5, 2.1 and 1.4 of 7: the first has the largest remainder
    _, seven = data.hold_out(labels, 7, seed=1)
    np.testing.assert_array_equal(np.bincount(labels[seven]), [4, 2, 1])
    np.testing.assert_array_equal(held, data.hold_out(labels, 10, seed=1)[1])
    assert set(held) != set(data.hold_out(labels, 10, seed=2)[1])
    none = data.hold_out(labels, 0, seed=1)
    np.testing.assert_array_equal(none[0], np.arange(100))
    assert len(none[1]) == 0


def test_every_row_of_a_class_is_as_likely_to_be_held_out():
    labels = np.repeat([0, 1], [20, 20])
    counts = np.zeros(40)
    for seed in range(400):
        counts[data.hold_out(labels, 10, seed)[1]] += 1
    assert np.abs(counts - 100).max() < 4.5 * (400 * 0.25 * 0.75) ** 0.5
