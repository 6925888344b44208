"""The rooms: imports go down only, and a new thing goes in one place."""

import ast
import graphlib
from pathlib import Path

import pytest

import jaxnorm

PACKAGE = Path(jaxnorm.__file__).parent
BELOW = {
    "config": set(),
    "records": {"config"},
    "norms": set(),
    "model": {"config", "records", "norms"},
    "data": {"config"},
    "storage": {"config", "records"},
    "training": {"config", "records", "model", "data"},
    "runs": {"config", "records", "model", "data", "storage", "training"},
    "analysis": {"config", "records", "data", "storage"},
}
COMMANDS = {"cli", "run", "job", "tune", "report", "bench", "api", "__main__", "__init__"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(text):
    """The rooms that code imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxnorm"):
            parts = node.module.split(".")
            yield from [parts[1]] if parts[1:] else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (parts[1] for parts in names if parts[0] == "jaxnorm" and parts[1:])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in COMMANDS:
        assert set(imported(path.read_text())) - {room} <= BELOW[room]
    elif room != "__init__":
        assert set(imported(path.read_text())) <= {*BELOW, *COMMANDS}


def test_the_command_that_trains_imports_one_module_of_ours_after_it_has_begun():
    """So that `--help` answers before JAX is loaded."""
    nodes = ast.parse((PACKAGE / "run.py").read_text()).body
    functions = [ast.unparse(node) for node in nodes if isinstance(node, ast.FunctionDef)]
    assert [name for function in functions for name in imported(function)] == ["job"]


def test_what_a_file_imports_when_it_is_loaded_never_leads_back_to_it():
    parts = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in FILES}
    names = {path: ".".join(parts[path]) for path in FILES}
    arrows = {}
    for path, name in names.items():
        inner = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                inner |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        arrows[name] = inner & {*names.values()}
    assert len([*graphlib.TopologicalSorter(arrows).static_order()]) == len(FILES)
