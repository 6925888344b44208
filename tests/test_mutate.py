"""The list of deliberate faults is of the code as it is now."""

import shutil
from pathlib import Path

import pytest
from mutate import read

import jaxnorm

FAULTS = read()


def test_there_are_enough_in_each_file_that_must_have_no_survivor():
    files = [fault.file for fault in FAULTS]
    assert len(FAULTS) >= 30
    for name in ("ops.py", "train.py", "stats.py"):
        assert files.count(name) >= 10


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.file)
def test_each_fault_can_be_made(fault, tmp_path):
    shutil.copy(Path(jaxnorm.__file__).with_name(fault.file), tmp_path)
    fault.put_into(tmp_path)
    compile((tmp_path / fault.file).read_text(), fault.file, "exec")
    for name in fault.tests:
        assert Path(__file__).with_name(f"{name}.py").exists()
