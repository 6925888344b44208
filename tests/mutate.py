"""Puts each deliberate fault of `faults.txt` into a copy of the package and runs its tests there.

    python tests/mutate.py [WORD]

Without any fault they must pass. Prints a line for each fault (those whose text holds WORD), and
ends with exit code 1 where one survives: where its tests pass all the same.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Fault:
    """A right piece of a file of the package and a wrong one, and the tests that must tell."""

    file: str
    tests: list[str]
    right: str
    wrong: str

    def put_into(self, package: Path) -> None:
        """Makes it; raises ValueError where the right piece is not in the file once."""
        text = (package / self.file).read_text()
        if text.count(self.right) != 1:
            raise ValueError(f"{self.file} does not hold this once: {self.right}")
        (package / self.file).write_text(text.replace(self.right, self.wrong))


def read() -> list[Fault]:
    """The faults in the list."""
    faults = []
    for block in (HERE / "faults.txt").read_text().split("\n\n"):
        head, *lines = [line for line in block.splitlines() if not line.startswith("#")] or [""]
        if not lines:
            continue
        file, _, tests = head.partition(": ")
        right, wrong = (
            "\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+"
        )
        faults.append(Fault(file, tests.split(), right, wrong))
    return faults


def path_of(test: str) -> Path:
    """The file of a test, by its name."""
    (path,) = HERE.rglob(f"{test}.py")
    return path


def passes(tests: list[str], compiled: Path, fault: Fault | None = None) -> bool:
    """Whether these test files pass on a copy of the package, with a fault put into it."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("jaxnorm", "tests", "notebooks"):
            shutil.copytree(HERE.parent / name, root / name)
        shutil.copy(HERE.parent / "pyproject.toml", root)
        if fault is not None:
            fault.put_into(root / "jaxnorm")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-m", "", "-p", "no:cacheprovider"]
            + [str(path_of(name).relative_to(HERE.parent)) for name in tests],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "JAXNORM_TEST_COMPILED": str(compiled)},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0


def main(word: str = "") -> int:
    """Tries every fault whose text holds the word."""
    chosen = [fault for fault in read() if word in f"{fault.file}\n{fault.right}\n{fault.wrong}"]
    if not chosen:
        print(f"no fault holds {word!r}")
        return 1
    survivors = 0
    with tempfile.TemporaryDirectory() as compiled, ThreadPoolExecutor(os.cpu_count()) as pool:
        if not passes(sorted({name for fault in chosen for name in fault.tests}), Path(compiled)):
            print("the tests fail without any fault")
            return 1
        results = pool.map(lambda fault: passes(fault.tests, Path(compiled), fault), chosen)
        for fault, alive in zip(chosen, results, strict=True):
            survivors += alive
            wrong = " ".join(fault.wrong.split())
            print(f"{'SURVIVES' if alive else 'caught':<8}  {fault.file}: {wrong}", flush=True)
    print(f"{len(chosen)} faults, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
