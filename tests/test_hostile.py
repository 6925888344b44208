"""What a hand, a disk or an enemy may give: never a traceback, a hang, or a file somewhere else.

The default run draws a few examples; `pytest tests/test_hostile.py --hypothesis-profile hostile`
draws 250 of each.
"""

import dataclasses
import io
import json
import shutil
import tarfile

import html5lib
import numpy as np
import pytest
from helpers import epochs_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cifar10 import PARTS
from test_datasets import prepare

from jaxnorm import cli, report, run
from jaxnorm.analysis import figures, inside, page
from jaxnorm.analysis.results import Run
from jaxnorm.bench import __main__ as bench
from jaxnorm.config import UserError
from jaxnorm.data import cifar10 as archive
from jaxnorm.data import datasets as data
from jaxnorm.runs import runner
from jaxnorm.storage.directory import RunDirectory
from jaxnorm.training import selfcheck

FULL = settings().max_examples == 2_000  # the profile
few = settings(
    max_examples=250 if FULL else 5,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["batch", "layer", "all", "digits", "matched", "1", "0.5", "nan", "1e999"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["norm", "epoch"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


def outcome(capsys, app, arguments) -> int:
    """Calls a command; whatever it says is no traceback, and an error is one line."""
    code = cli.run(app, list(arguments))
    captured = capsys.readouterr()
    assert code in (0, 1, 2), code
    assert "Traceback" not in captured.err
    if code:
        assert captured.err.startswith(("error: ", "missing: ", "warning: "))
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert captured.err.count("error: ") >= 1
    return code


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working directory beside an empty one, in which nothing may appear."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    made = {entry.name for entry in tmp_path.iterdir()} - {"a dir's näme"}  # the records' own
    assert made == {"elsewhere", "here"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


FLAGS = [
    "norm",
    "arch",
    "dataset",
    "epochs",
    "batch-size",
    "learning-rate",
    "momentum",
    "dropout",
    "groups",
    "seed",
    "seeds",
    "validation",
    "allow-large",
    "data-dir",
    "archive",
    "allow-unverified",
    "out",
    "resume",
    "deterministic",
    "quiet",
    "summary",
    "skip-self-check",
    "bogus",
]
PLAIN = [
    "batch",
    "layer",
    "rms",
    "all",
    "original",
    "matched",
    "digits",
    "tiny",
    "cifar10",
    "1",
    "0",
    "-1",
    "3",
    "1e-3",
    "nan",
    "inf",
    ".",
    "..",
    "a/b",
    "run",
    "99999999999999999999",
]
STRANGE = ["", " ", "'", '"', "<b>", "ä\u202e", "x" * 300, "no\nline", "a\0b"]
STRANGE += ["~nobody-at-all/x", "gs://a/b", "\udcff"]
WORDS = st.sampled_from(PLAIN + STRANGE) | st.text(max_size=10)
TOKENS = st.lists(
    st.sampled_from(FLAGS).map("--{}".format)
    | st.tuples(st.sampled_from(FLAGS), WORDS).map(lambda pair: f"--{pair[0]}={pair[1]}")
    | WORDS,
    max_size=8,
)


@few
@given(tokens=TOKENS)
def test_any_flags(tokens, alone, tiny, monkeypatch, capsys):
    """Of every command. Where they are right nothing is trained: that is not what is tested."""

    def trained(*_, **__):
        raise ArithmeticError("it would train")

    monkeypatch.setattr(data, "load", lambda *_, **__: tiny)
    monkeypatch.setattr(selfcheck, "self_check", trained)
    monkeypatch.setattr(runner, "run", trained)
    monkeypatch.setattr(bench, "main", trained)
    outcome(capsys, run.app, [token for token in tokens if token != "--help"])
    outcome(capsys, report.app, [token for token in tokens if token != "--help"])
    assert list(alone.iterdir()) == []


def edited(draw, content: bytes) -> bytes:
    """Content with a piece of it changed, taken out, put in, or doubled."""
    start = draw(st.integers(0, len(content)))
    stop = min(len(content), start + draw(st.sampled_from([0, 1, 2, 30, 10**9])))
    new = draw(
        st.binary(max_size=20)
        | st.sampled_from([b"", b"\n", b"{}", b"null", b"NaN", b"1e999", b"-1", b'"<script>"'])
        | st.just(content[start:stop] * 2)
    )
    return content[:start] + new + content[stop:]


@st.composite
def edits(draw):
    """What to do to which file, as a function of a list of paths."""
    index = draw(st.integers(0, 10**6))
    how = draw(st.sampled_from(["edit", "edit", "edit", "remove", "directory", "swap"]))
    chosen = draw(st.randoms(use_true_random=False))
    other = draw(st.integers(0, 10**6))

    def apply(files):
        file = files[index % len(files)]
        match how:
            case "edit":
                content = file.read_bytes()
                start = chosen.randrange(len(content) + 1)
                stop = min(len(content), start + chosen.choice([0, 1, 2, 30, 10**9]))
                new = chosen.choice(
                    [b"", b"\n", b"{}", b"null", b"NaN", b"-1", b'"<script>"', chosen.randbytes(9)]
                )
                file.write_bytes(content[:start] + new + content[stop:])
            case "remove":
                file.unlink()
            case "directory":
                file.unlink()
                file.mkdir()
            case "swap":
                shutil.copy(files[other % len(files)], file.with_name("swapped"))
                file.with_name("swapped").replace(file)

    return apply


def plain_files(directory):
    return sorted(file for file in directory.rglob("*") if file.is_file() and file.name != ".lock")


def names(directory):
    return sorted(entry.relative_to(directory).as_posix() for entry in directory.rglob("*"))


@pytest.fixture(autouse=True)
def fewer_figures(request, monkeypatch):
    """Draws, small, those figures that show a run's own words and every kind of record; all of them
    for damaged runs in the full profile.
    """
    if "reported" not in request.node.name or not FULL:
        drawn = (figures.confusion, figures.training_images, inside.inside)
        monkeypatch.setattr(figures, "FIGURES", drawn)

    def small(figure, original=figures.png):
        """In the short profile not laid out, which takes most of the time."""
        if not FULL:
            figure.set_layout_engine("none")
        return original(figure, dots_per_inch=20)

    monkeypatch.setattr(figures, "png", small)


@few
@given(change=edits())
def test_any_damage_to_a_run_that_is_reported(change, alone, sweep, capsys):
    shutil.rmtree(alone / "run", ignore_errors=True)
    if not (alone / "kept").exists():
        shutil.copytree(sweep("made").path, alone / "kept")
    shutil.copytree(alone / "kept", alone / "run")
    change(plain_files(alone / "run"))
    outcome(capsys, report.app, [str(alone / "run")])
    assert {name.split("/")[0] for name in names(alone)} <= {"kept", "run"}
    shutil.rmtree(alone / "run")


def of_one_norm(run, path):
    """Copies what a run has of layer norm, which trains fastest."""
    shutil.copytree(run.path, path)
    for norm in ("batch", "group"):
        shutil.rmtree(path / "nets" / f"{norm}-3")
    info = RunDirectory(path).info()
    config = dataclasses.replace(info.config, norm="layer")
    RunDirectory(path).write_json("run.json", dataclasses.replace(info, config=config))


@few
@given(change=edits(), again=edits())
def test_any_damage_to_a_run_that_is_resumed(
    change, again, alone, tiny, tiny_run, monkeypatch, capsys
):
    monkeypatch.setattr(data, "load", lambda *_, **__: tiny)
    monkeypatch.setattr(page, "write", lambda _: page.RunPart("not drawn", Run(tiny_run)))
    if not (alone / "kept").exists():
        of_one_norm(tiny_run, alone / "kept")
    shutil.rmtree(alone / "run", ignore_errors=True)
    shutil.copytree(alone / "kept", alone / "run")
    for damage in (change, again):
        damage(plain_files(alone / "run"))
    arguments = ["--resume", str(alone / "run"), "--skip-self-check"]
    if outcome(capsys, run.app, arguments) == 0:
        assert len(epochs_of(RunDirectory(alone / "run"))) == 2
    assert {name.split("/")[0] for name in names(alone)} == {"kept", "run"}


@few
@given(data_=st.data(), value=VALUES)
def test_any_value_in_any_field_of_a_run(data_, value, alone, sweep, capsys):
    """A field of run.json, of its settings or of its data."""
    shutil.rmtree(alone / "run", ignore_errors=True)
    if not (alone / "kept").exists():
        shutil.copytree(sweep("made").path, alone / "kept")
    shutil.copytree(alone / "kept", alone / "run")
    info = json.loads((alone / "run" / "run.json").read_text())
    places = [info, info["config"], info["dataset"]]
    place = places[data_.draw(st.integers(0, 2))]
    place[data_.draw(st.sampled_from([*place, "more"]))] = value
    (alone / "run" / "run.json").write_text(json.dumps(info))
    outcome(capsys, report.app, [str(alone / "run")])
    assert {name.split("/")[0] for name in names(alone)} <= {"kept", "run"}


@few
@given(text=st.text(max_size=40), where=st.sampled_from(["class", "caption", "command", "name"]))
def test_any_text_in_a_run_is_text_in_its_report(text, where, alone, sweep, capsys):
    text = f"<script>alert('{text}')</script> $\\frac{{ {text}"
    shutil.rmtree(alone / "run", ignore_errors=True)
    if not (alone / "kept").exists():
        shutil.copytree(sweep("made").path, alone / "kept")
    shutil.copytree(alone / "kept", alone / "run")
    path = alone / "run" / "run.json"
    info = json.loads(path.read_text())
    match where:
        case "class":
            info["dataset"]["class_names"][0] = text
        case "caption":
            info["dataset"]["caption"] = text
        case "command":
            info["environment"]["command"] = text
        case "name":
            info["dataset"]["source"] = text
    path.write_text(json.dumps(info))
    assert outcome(capsys, report.app, [str(alone / "run")]) == 0
    page = html5lib.parse((alone / "run" / "report.html").read_text(), namespaceHTMLElements=False)
    assert page.findall(".//script") == []


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(archive, "_PER_FILE", 4)
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (20, 4))


def loaded_or_refused(*arguments, **options):
    """A dataset, or None where it was refused in one line."""
    message = ""
    try:
        return data.load(*arguments, **options)
    except UserError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None


@few
@given(data_=st.data())
def test_any_damage_to_an_archive(data_, alone, small):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=data_.draw(st.sampled_from(["w", "w:gz"]))) as tar:
        for part in PARTS:
            planes = rng.integers(0, 2, (4, 3072), np.uint8)
            content = np.concatenate([planes[:, :1], planes], 1).tobytes()
            name = f"cifar-10-batches-bin/{part}.bin"
            tar.addfile(tarinfo(name, len(content)), io.BytesIO(content))
    (alone / "a").write_bytes(edited(data_.draw, buffer.getvalue()))
    loaded = loaded_or_refused(
        "cifar10", alone / "tfds", str(alone / "a"), allow_unverified=True, cache_dir=alone / "c"
    )
    assert loaded is None or loaded.train_images.shape == (20, 32, 32, 3)
    assert {name.split("/")[0] for name in names(alone)} <= {"a", "tfds", "c"}
    for folder in ("tfds", "c"):
        shutil.rmtree(alone / folder, ignore_errors=True)


def tarinfo(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info


@few
@given(change=edits())
def test_any_damage_to_a_prepared_dataset(change, alone):
    if not (alone / "kept").exists():
        prepare(alone / "kept")
    shutil.rmtree(alone / "tfds", ignore_errors=True)
    shutil.copytree(alone / "kept", alone / "tfds")
    change(plain_files(alone / "tfds"))
    loaded = loaded_or_refused("tiny_set", alone / "tfds", cache_dir=alone / "cache")
    assert loaded is None or loaded.train_labels.max() < len(loaded.class_names)
    assert {name.split("/")[0] for name in names(alone)} <= {"kept", "tfds", "cache"}
