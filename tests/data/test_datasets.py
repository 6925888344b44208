"""Datasets by name: digits, prepared TFDS directories, the cache, and what the user hears."""

import re
import struct
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from jaxnorm.config import UserError
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

    rng = np.random.default_rng(0)
    features = {"image": tfds.features.Image(shape=shape)}
    if labels:
        features["label"] = tfds.features.ClassLabel(names=labels)
    with tfds.core.registered.skip_registration():
        cls = type(
            name.title().replace("_", ""),
            (tfds.core.GeneratorBasedBuilder,),
            {
                "__module__": __name__,
                "VERSION": tfds.core.Version(version),
                "_info": lambda self: tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                ),
                "_split_generators": lambda self, manager: {s: drawn(s) for s in splits},
                "_generate_examples": lambda self: None,
            },
        )

    from PIL import Image

    def drawn(split):
        for i in range(9):
            pixels = rng.integers(0, 256, shape, np.uint8)
            image = Image.fromarray(pixels if shape[-1] == 3 else pixels[..., 0])
            yield i, {"image": image} | ({"label": i % 3} if labels else {})

    tfds.disable_progress_bar()
    cls(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory / name / version


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
    chex.assert_shape(digits.train_images, (1437, 32, 32, 3))
    chex.assert_shape(digits.test_images, (360, 32, 32, 3))
    chex.assert_type([digits.train_images, digits.test_images], np.uint8)
    chex.assert_type([digits.train_labels, digits.test_labels], np.int32)
    counts = np.bincount(digits.test_labels, minlength=10)
    assert counts.sum() == 360
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
    first = data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    assert first.class_names == ("cat", "dog", "eel")
    assert first.train_images.shape == (9, 32, 32, 3)
    assert sorted(first.train_labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert first.verified is None
    (cached,) = (scratch / "cache" / "decoded").iterdir()
    decoded = []
    decode = prepared_.decode
    monkeypatch.setattr(prepared_, "decode", lambda *args: decoded.append(1) or decode(*args))
    again = data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    assert not decoded
    assert again.fingerprint == first.fingerprint
    good = cached.read_bytes()
    at = good.index(first.train_images.tobytes()) + 1000
    damages = [
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
        good[: len(good) // 2],
        b"",
        b"PK\x03\x04 rubbish",
    ]
    for number, damage in enumerate(damages, 1):
        cached.write_bytes(damage)
        again = data.load("tiny_set", scratch, cache_dir=scratch / "cache")
        assert len(decoded) == number
        np.testing.assert_array_equal(again.train_images, first.train_images)
        assert cached.read_bytes() == good


def test_images_are_read_in_blocks_each_once(scratch, monkeypatch):
    prepare(scratch)
    whole = data.load("tiny_set", scratch, cache_dir=scratch / "a")
    monkeypatch.setattr(prepared_, "BLOCK", 4)
    seen = []
    blocks = data.load(
        "tiny_set", scratch, cache_dir=scratch / "b", progress=lambda *at: seen.append(at)
    )
    assert seen == [("decoding the images", done, 18) for done in (4, 8, 9, 13, 17, 18)]
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))


def test_changed_files_are_not_served_from_the_cache(scratch):
    prepare(scratch)
    first = data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    prepared = scratch / "tiny_set" / "1.2.0"
    test, train = sorted(prepared.glob("*array_record*"))
    train.write_bytes(test.read_bytes())
    second = data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    assert second.fingerprint != first.fingerprint


def test_a_cache_that_cannot_be_written_is_no_error(scratch):
    prepare(scratch)
    (scratch / "cache").write_text("a file, not a directory")
    assert len(data.load("tiny_set", scratch, cache_dir=scratch / "cache").train_labels) == 9


@pytest.mark.parametrize("wrong", [{"shape": (28, 28, 1)}, {"labels": ()}], ids=str)
def test_a_dataset_of_other_shape_is_refused(scratch, wrong):
    prepare(scratch, **wrong)
    with pytest.raises(UserError, match="needs 32x32x3 images and one label"):
        data.load("tiny_set", scratch, cache_dir=scratch / "cache")


def test_a_test_split_of_another_name_is_chosen_and_each_is_cached(scratch):
    prepare(scratch, splits=("train", "val", "dev"))
    with pytest.raises(UserError, match=r"no split called test: it has (dev|train|val), .*NAME"):
        data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    for _ in range(2):
        val, dev = (
            data.load("tiny_set", scratch, test_split=split, cache_dir=scratch / "cache")
            for split in ("val", "dev")
        )
        np.testing.assert_array_equal(val.train_images, dev.train_images)
        assert (val.test_images != dev.test_images).any()
        assert val.fingerprint != dev.fingerprint
        assert val.caption == "tiny_set, tested on val, origin not known"
    assert len(list((scratch / "cache" / "decoded").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "conflicts with dataset=cifar10, which has one test set"),
        ("digits", "conflicts with dataset=digits, which has one test set"),
        ("x.npz", r"conflicts with dataset=x\.npz, which has one test set"),
        ("tiny_set", "no split called val: it has"),
    ],
)
def test_a_test_split_is_refused_if_there_is_none_to_choose(scratch, name, message):
    prepare(scratch)
    with pytest.raises(UserError, match=message):
        data.load(name, scratch, test_split="val", cache_dir=scratch / "cache")
    with pytest.raises(UserError, match="test_split=train"):
        data.load(name, scratch, test_split="train", cache_dir=scratch / "cache")


def test_the_names_and_order_of_the_classes_are_in_the_fingerprint(scratch):
    fingerprints = set()
    for i, labels in enumerate([("a", "b", "c"), ("b", "a", "c"), ("a", "b", "c", "d")]):
        prepare(scratch / str(i), labels=labels)
        loaded = data.load("tiny_set", scratch / str(i), cache_dir=scratch / "cache")
        fingerprints.add(loaded.fingerprint)
    assert len(fingerprints) == 3


def test_a_dataset_prepared_as_tfrecord_is_the_same(scratch):
    folder = prepare(scratch)
    wanted = data.load("tiny_set", scratch, cache_dir=scratch / "a")
    to_tfrecord(folder)
    assert data.load("tiny_set", scratch, cache_dir=scratch / "b").fingerprint == wanted.fingerprint
    assert "tensorflow" not in sys.modules


def test_crc32c_is_the_standards():
    records = [b"123456789", bytes(32), bytes(range(200)), b"abcd"]
    crcs = [crc32c(record) for record in records]
    assert crcs[:2] == [0xE3069283, 0x8A9136AA]  # of RFC 3720 and of Wikipedia's list
    rotated = tfrecord.masked_crc32c(records) - np.uint32(0xA282EAD8)
    np.testing.assert_array_equal(rotated << 15 | rotated >> 17, np.array(crcs, np.uint32))


@pytest.mark.parametrize("damage", ["a bit", "the length", "half", "a record fewer", "empty"])
def test_a_damaged_tfrecord_is_refused_in_one_line(scratch, damage):
    folder = prepare(scratch)
    to_tfrecord(folder)
    path = next(folder.glob("*train*"))
    good = path.read_bytes()
    (length,) = struct.unpack_from("<Q", good)
    damaged = {
        "a bit": good[:-6] + bytes([good[-6] ^ 1]) + good[-5:],
        "the length": struct.pack("<Q", 2**60) + good[8:],
        "half": good[: len(good) // 2],
        "a record fewer": good[length + 16 :],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"cannot be read: (a|its) .*[a-z]$") as error:
        data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    assert "\n" not in str(error.value)


def test_another_file_format_is_refused_in_a_whole_sentence(scratch):
    folder = prepare(scratch)
    note = folder / "dataset_info.json"
    note.write_text(note.read_text().replace('"array_record"', '"riegeli"'))
    with pytest.raises(UserError) as error:
        data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    assert str(error.value).endswith(
        "it is prepared as riegeli, but only array_record and tfrecord can be read"
    )


def test_cifar10_that_somebody_prepared_as_tfrecord_is_used(scratch, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (9, 9))
    to_tfrecord(prepare(scratch, "cifar10", labels=cifar10.CLASSES, version="3.0.2"))
    dataset = data.load("cifar10", scratch, cache_dir=scratch / "cache")
    assert dataset.caption == "cifar10, origin not known"
    assert dataset.mean == data.CIFAR10_MEAN


@pytest.mark.parametrize(("order", "count"), [(-1, 9), (1, 10)], ids=["classes", "counts"])
def test_another_dataset_in_cifar10s_place_is_refused(scratch, monkeypatch, order, count):
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (9, count))
    prepare(scratch, "cifar10", labels=cifar10.CLASSES[::order], version="3.0.2")
    with pytest.raises(UserError, match="is not CIFAR-10"):
        data.load("cifar10", scratch, cache_dir=scratch / "cache")


@pytest.mark.parametrize(
    "damage", ["schema", "records", "no schema", "label above its classes", "foreign feature"]
)
def test_a_damaged_directory_is_refused_in_one_line(scratch, damage):
    prepare(scratch)
    prepared = scratch / "tiny_set" / "1.2.0"
    match damage:
        case "schema":
            (prepared / "features.json").write_text('{"pythonClassName": "os.system"}')
        case "no schema":
            (prepared / "dataset_info.json").write_text("not JSON")
        case "label above its classes":
            names = prepared / "label.labels.txt"
            names.write_text(names.read_text().split()[0] + "\n")
            features = prepared / "features.json"
            one = re.sub(r'"numClasses": "\d+"', '"numClasses": "1"', features.read_text())
            features.write_text(one)
        case "foreign feature":
            features = prepared / "features.json"
            label_class = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
            features.write_text(features.read_text().replace(label_class, "antigravity.Class"))
        case "records":
            next(prepared.glob("*train*")).write_bytes(b"rubbish" * 10_000)
    with pytest.raises(UserError) as error:
        data.load("tiny_set", scratch, cache_dir=scratch / "cache")
    assert "\n" not in str(error.value)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["cifar11", "../x", "/etc", "a b", "tiny_set:9.9.9", "*"])
def test_an_unknown_dataset_is_refused_and_the_known_are_named(scratch, name):
    prepare(scratch)
    with pytest.raises(UserError, match="tiny_set"):
        data.load(name, scratch)


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
    with pytest.raises(UserError, match=re.escape(message)) as error:
        data.load(name, inside / "tfds")
    with pytest.raises(UserError, match=r"of your own data an \.npz file is read"):
        data.load(name, inside / "tfds" / "tiny_set" / "1.0.0")  # which holds no other
    assert ".npz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "~nosuchuser/x"), "^~nosuchuser/x: there is no such home folder"),
        (("cifar10", "/x", "~nosuchuser/x"), "^~nosuchuser/x: there is no such home folder"),
        (("~nosuchuser/x.npz",), "^~nosuchuser/x.npz: there is no such home folder"),
        (("tiny", "gs://bucket/x"), "^gs://bucket/x is an address"),
        (("digits", "/x", "a.tar.gz"), "leave out one of the two"),
    ],
)
def test_wrong_places_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        data.load(*arguments)
    assert "\n" not in str(error.value)


def test_without_data_and_a_route_the_user_hears_at_once_of_three_ways_on(scratch, monkeypatch):
    addresses = {"http://127.0.0.1:9/binary.tar.gz": "", "http://127.0.0.1:9/python.tar.gz": ""}
    monkeypatch.setattr(cifar10, "ADDRESSES", addresses)
    with pytest.raises(UserError) as error:
        data.load("cifar10", scratch, cache_dir=scratch / "cache")
    assert "no route to it" in str(error.value)  # and not that no answer came in eight seconds
    for way in ("archive=", "data_dir=", "dataset=digits", *addresses):
        assert way in str(error.value)
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
