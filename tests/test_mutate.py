"""The list of deliberate faults is of the code as it is now."""

import shutil
from pathlib import Path

import pytest
from mutate import path_of, read

import jaxnorm

FAULTS = read()


def test_there_are_enough_in_each_file_that_must_have_no_survivor():
    files = [fault.file for fault in FAULTS]
    assert len(FAULTS) >= 30
    for name, least in (("model/ops.py", 10), ("training/epoch.py", 3), ("analysis/stats.py", 5)):
        assert files.count(name) >= least


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.file)
def test_each_fault_can_be_made(fault, tmp_path):
    copy = tmp_path / fault.file
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(Path(jaxnorm.__file__).parent / fault.file, copy)
    fault.put_into(tmp_path)
    compile(copy.read_text(), fault.file, "exec")
    assert fault.tests
    for name in fault.tests:
        assert path_of(name).exists()
