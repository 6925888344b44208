"""The notebooks: each runs from a clean kernel, and what is committed is a run of its text."""

import os
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbconvert.preprocessors import ExecutePreprocessor

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("compare_norms", "explore_norms", "norms", "own_norm")
PICTURES = {"norms": 4, "own_norm": 1}
"""How many at least, if not six."""


TINY = [("import jaxnorm\n", "import jaxnorm, nets\n"), ('arch="matched"', 'arch="three-layers"')]
SHORTER = {
    "compare_norms": [
        ('EPOCHS, SEEDS = "digits", 4, 2', 'EPOCHS, SEEDS = "digits", 1, 2'),
        ("learning_rate=0.02,", "learning_rate=0.02, batch_size=479,"),
    ],
    "own_norm": [
        ("EPOCHS, SEEDS = 4, 2", "EPOCHS, SEEDS = 1, 1"),
        ("epochs=EPOCHS,", "epochs=EPOCHS, batch_size=479,"),
    ],
    "norms": [
        ("EPOCHS = 3", "EPOCHS = 1"),
        ("epochs=EPOCHS)", "epochs=EPOCHS, batch_size=479)"),
    ],
    "explore_norms": [
        ("EPOCHS, SIZES = 3, (4, 16, 64, 128)", "EPOCHS, SIZES = 1, (479,)"),
        ("learning_rate=0.02)", "learning_rate=0.02, batch_size=479)"),
    ],
}
"""What says how long each trains, in what batches (with 479, a third of the digits, none is ragged)
and in which net, and another for the test; all else runs as it is.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name, tmp_path, monkeypatch):
    text = (FOLDER / f"{name}.py").read_text()
    for whole, shorter in TINY + SHORTER[name]:
        assert text.count(whole) == 1
        text = text.replace(whole, shorter)
    notebook = jupytext.reads(text, fmt="py:percent")
    shutil.copy(FOLDER / "exploring.py", tmp_path)  # what lies beside the notebook
    path = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    options = {"timeout": 600, "kernel_name": "python3"}
    ExecutePreprocessor(**options).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = ["image/png" in output.get("data", {}) for output in outputs]
    assert sum(pictures) >= PICTURES.get(name, 6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_a_whole_run_of_the_text(name):
    text = jupytext.read(FOLDER / f"{name}.py")
    committed = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(committed)
    assert [cell.source for cell in committed.cells] == [cell.source for cell in text.cells]
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
