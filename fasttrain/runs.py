#!/usr/bin/env python3
"""List the runs under a folder: method, data, steps, accuracies, images/s, and whether each runs or how it ended.

python fasttrain/runs.py runs --sort knn
"""

from __future__ import annotations

import pathlib
import sys

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.jobs.options import RunsConfig
from fasttrain.system.cli import finish, parse, with_place


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        words = with_place("folder", RunsConfig, sys.argv[1:] if argv is None else argv, RunsConfig())
        options = parse(RunsConfig, words)
        from fasttrain.jobs.runs import runs

        return runs(options)

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
