"""What a run says of its code and devices."""

import subprocess

from jaxnorm.runs import environment


def test_the_revision_says_where_files_were_changed(monkeypatch, tmp_path):
    """In a checkout; where the package is installed there is no revision."""
    answers = {"rev-parse": "abc\n", "status": ""}

    def answer(command, **options):
        return subprocess.CompletedProcess(command, 0, answers[command[3]], "")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.git_revision() is None
    (tmp_path / "pyproject.toml").touch()
    assert environment.git_revision() == "abc"
    answers["status"] = " M jaxnorm/run.py\n"
    assert environment.git_revision() == "abc+changes"
    answers["rev-parse"] = ""
    assert environment.git_revision() is None


def test_what_is_not_promised_is_said():
    assert environment.repeatable("cpu", False).startswith("bit for bit")
    assert "not promised" in environment.repeatable("gpu", True)
    assert "--deterministic" in environment.repeatable("gpu", False)
