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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_cifar10 import PARTS
from test_datasets import prepare

from jaxnorm import cli, report, run, tune
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
    max_examples=250 if FULL else 5, deadline=None, suppress_health_check=list(HealthCheck)
)
STRANGE_JSON = [b"", b"\n", b"{}", b"null", b"NaN", b"1e999", b"-1", b'"<script>"']
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-3, 40) | st.floats()
NAMES = ["batch", "layer", "all", "digits", "1", "0.5", "nan", "1e999"]
SCALARS |= st.text(max_size=12) | st.sampled_from(NAMES)
KEYS = st.text(max_size=8) | st.sampled_from(["norm", "epoch"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
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


FIELDS = [*dataclasses.fields(run.Settings), *dataclasses.fields(run.Options)]
FLAGS = [f"--{field.name.replace('_', '-')}" for field in FIELDS] + ["--bogus", "--trials"]
FLAGS.remove("--distributed")  # waits for other processes
WORDS = "batch layer rms all original matched digits tiny cifar10 1 0 -1 3 1e-3 nan inf . .. a/b"
STRANGE = ["", " ", "'", '"', "<b>", "ä\u202e", "x" * 300, "no\nline", "a\0b", "9" * 20]
STRANGE += ["~nobody-at-all/x", "gs://a/b", "\udcff", "run"]
WORDS = st.sampled_from(WORDS.split() + STRANGE) | st.text(max_size=10)
PAIRS = st.tuples(st.sampled_from(FLAGS), WORDS).map("=".join)
TOKENS = st.lists(st.sampled_from(FLAGS) | PAIRS | WORDS, max_size=8)


@few
@example(tokens=[])
@example(tokens=["--quiet", "--norm=layer"])
@given(tokens=TOKENS)
def test_any_flags_of_every_command(tokens, alone, tiny, monkeypatch, capsys):
    """If they are right nothing is trained or timed: that is not what is tested."""

    def begun(*_, **__):
        raise ArithmeticError("it would begin")

    monkeypatch.setattr(data, "load", lambda *_, **__: tiny)
    for module, name in ((selfcheck, "self_check"), (runner, "run"), (bench, "measure_ceiling")):
        monkeypatch.setattr(module, name, begun)
    for app in (run.app, tune.app, report.app, bench.app):
        outcome(capsys, app, [token for token in tokens if token != "--help"])
    assert list(alone.iterdir()) == []


def edited(content: bytes, draw) -> bytes:
    """Content with a piece of it changed, taken out, put in, or doubled, as `random` draws."""
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice([0, 1, 2, 30, 10**9]))
    new = draw.choice([*STRANGE_JSON, draw.randbytes(9), content[start:stop] * 2])
    return content[:start] + new + content[stop:]


RANDOMS = st.randoms(use_true_random=False)


@st.composite
def edits(draw):
    """What to do to which file, as a function of a list of paths."""
    index, other = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    how = draw(st.sampled_from(["edit", "edit", "edit", "remove", "directory", "swap"]))
    chosen = draw(RANDOMS)

    def apply(files):
        file = files[index % len(files)]
        match how:
            case "edit":
                file.write_bytes(edited(file.read_bytes(), chosen))
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


def copied(alone, make, name="run"):
    """A copy of what `make` makes at the path that it is given, once for all examples."""
    shutil.rmtree(alone / name, ignore_errors=True)
    if not (alone / "kept").exists():
        make(alone / "kept")
    shutil.copytree(alone / "kept", alone / name)
    return alone / name


def names(directory):
    return {entry.name for entry in directory.iterdir()}


@pytest.fixture(autouse=True)
def fewer_figures(request, monkeypatch):
    """Draws, small, those figures that show a run's own words and every kind of record; all of them
    for damaged runs in the full profile.
    """
    damages = "reported" in request.node.name
    if not damages or not FULL:
        drawn = (figures.confusion, figures.training_images, inside.inside)
        monkeypatch.setattr(figures, "FIGURES", drawn if damages else drawn[:2])

    def small(figure, original=figures.png):
        """In the short profile not laid out, which takes most of the time."""
        if not FULL:
            figure.set_layout_engine("none")
        return original(figure, dots_per_inch=20)

    monkeypatch.setattr(figures, "png", small)


@pytest.fixture
def made(alone, sweep):
    """Copies the records of a run that nobody trained."""
    return lambda: copied(alone, lambda path: shutil.copytree(sweep("made").path, path))


@few
@given(change=edits())
def test_any_damage_to_a_run_that_is_reported(change, alone, made, capsys):
    change(plain_files(made()))
    outcome(capsys, report.app, ["run"])
    assert names(alone) == {"kept", "run"}


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
    path = copied(alone, lambda path: of_one_norm(tiny_run, path))
    for damage in (change, again):
        damage(plain_files(path))
    if outcome(capsys, run.app, ["--resume", "run", "--skip-self-check"]) == 0:
        assert len(epochs_of(RunDirectory(path))) == 2
    assert names(alone) == {"kept", "run"}


@few
@given(data_=st.data(), value=VALUES)
def test_any_value_in_any_field_of_a_run(data_, value, alone, made, capsys):
    """A field of run.json, of its settings or of its data."""
    file = made() / "run.json"
    info = json.loads(file.read_text())
    place = data_.draw(st.sampled_from([info, info["config"], info["dataset"]]))
    place[data_.draw(st.sampled_from([*place, "more"]))] = value
    file.write_text(json.dumps(info))
    outcome(capsys, report.app, ["run"])
    assert names(alone) == {"kept", "run"}


@few
@given(
    text=st.text(max_size=40),
    where=st.sampled_from(
        [("dataset", "caption"), ("environment", "command"), ("dataset", "source"), None]
    ),
)
def test_any_text_in_a_run_is_text_in_its_report(text, where, made, capsys):
    text = f"<script>alert('{text}')</script> $\\frac{{ {text}"
    path = made()
    info = json.loads((path / "run.json").read_text())
    if where:
        info[where[0]][where[1]] = text
    else:
        info["dataset"]["class_names"][0] = text
    (path / "run.json").write_text(json.dumps(info))
    assert outcome(capsys, report.app, ["run"]) == 0
    page = html5lib.parse((path / "report.html").read_text(), namespaceHTMLElements=False)
    assert page.findall(".//script") == []


def loaded_or_refused(*arguments, **options):
    """A dataset, or None if it was refused in one line."""
    message = ""
    try:
        return data.load(*arguments, **options)
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


@few
@given(draw=RANDOMS, mode=st.sampled_from(["w", "w:gz"]))
def test_any_damage_to_an_archive(draw, mode, alone, monkeypatch):
    monkeypatch.setattr(archive, "_PER_FILE", 4)
    monkeypatch.setattr(data, "CIFAR10_COUNTS", (20, 4))
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for part in PARTS:
            planes = rng.integers(0, 2, (4, 3072), np.uint8)
            content = np.concatenate([planes[:, :1], planes], 1).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{part}.bin")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (alone / "a").write_bytes(edited(buffer.getvalue(), draw))
    loaded = loaded_or_refused(
        "cifar10", alone / "tfds", str(alone / "a"), allow_unverified=True, cache_dir=alone / "c"
    )
    assert loaded is None or loaded.train_images.shape == (20, 32, 32, 3)
    assert names(alone) <= {"a", "tfds", "c"}
    for folder in ("tfds", "c"):
        shutil.rmtree(alone / folder, ignore_errors=True)


@few
@given(change=edits())
def test_any_damage_to_a_prepared_dataset(change, alone):
    change(plain_files(copied(alone, prepare, "tfds")))
    loaded = loaded_or_refused("tiny_set", alone / "tfds", cache_dir=alone / "cache")
    assert loaded is None or loaded.train_labels.max() < len(loaded.class_names)
    assert names(alone) <= {"kept", "tfds", "cache"}
