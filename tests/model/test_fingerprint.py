"""What tells a norm of the user's own from another one of the same name."""

import sys

import pytest

from jaxnorm.config import UserError
from jaxnorm.model import fingerprint
from jaxnorm.model.cnn import CNN

MINE = """
import flax.linen as nn

class Other(nn.Module):
    pass

class Base(nn.Module):
    def factor(self):
        return 2.0

class Mine(Base):
    @nn.compact
    def __call__(self, x):
        return shifted(x) * self.factor()

def shifted(x):
    return x + 1.0
"""


@pytest.fixture
def fingerprints(scratch, monkeypatch):
    """The SHA-256 of the source and of the program of `Mine` in a module of this text."""
    monkeypatch.syspath_prepend(scratch)

    def of(text):
        sys.modules.pop("mine", None)
        (scratch / "mine.py").write_text(text)
        net = CNN("mine:Mine", "three-layers")
        return fingerprint.source("mine:Mine"), fingerprint.program(net)

    return of


@pytest.mark.parametrize(
    ("change", "source", "program"),
    [
        (("* self", "*  self"), False, True),
        (("return 2.0", "return 2.5"), False, False),  # of a base
        (("x + 1.0", "x + 1.25"), True, False),  # of a function that it calls
        (("class Other", "\n\n# Another.\nclass Another"), True, True),
    ],
)
def test_source_and_program_change_with_what_they_are_of(fingerprints, change, source, program):
    before = fingerprints(MINE)
    after = fingerprints(MINE.replace(*change))
    assert [a == b for a, b in zip(before, after, strict=True)] == [source, program]


def test_a_class_of_a_notebook_is_known_by_its_methods(fingerprints, monkeypatch):
    def of(text):
        fingerprints(text)
        monkeypatch.delattr(sys.modules["mine"], "__file__")  # as of the cells of a notebook
        return fingerprint.source("mine:Mine")

    assert of(MINE) == of(MINE.replace("Other", "Another"))
    assert of(MINE) != of(MINE.replace("return 2.0", "return 2.5"))


def test_a_norm_that_is_gone_is_one_line():
    with pytest.raises(UserError, match=r"norm=gone:Norm cannot be imported \(ModuleNotFoundErr"):
        fingerprint.source("gone:Norm")
