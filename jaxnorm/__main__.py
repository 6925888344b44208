"""`jaxnorm run`, `jaxnorm tune`, `jaxnorm report`, `jaxnorm bench`: also as `python -m jaxnorm`."""

import importlib
import importlib.metadata
import sys

from jaxnorm import cli

COMMANDS = {
    "run": "jaxnorm.run",
    "tune": "jaxnorm.tune",
    "report": "jaxnorm.report",
    "bench": "jaxnorm.bench.__main__",
}
USAGE = """usage: jaxnorm COMMAND [FLAGS]

  run     train the nets of the study, or go on with a run
  tune    find a good learning rate for every norm, with the same trials for each
  report  write the reports of run directories
  bench   time our training against PyTorch's

jaxnorm COMMAND --help lists the flags; jaxnorm --version says which version this is."""


def main() -> None:
    """Calls the command that is named first."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--version", "-V"):
        print(f"jaxnorm {importlib.metadata.version('jaxnorm')}")
    elif name in ("--help", "-h"):
        print(USAGE)
    elif name in COMMANDS:
        sys.path.insert(0, "")  # as `python -m` does: the user's own norm may lie here
        cli.leave(cli.run(importlib.import_module(COMMANDS[name]).app, arguments))
    else:
        print(f"error: there is no command {name!r}: choose {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(cli.MISTAKE)


if __name__ == "__main__":
    main()
