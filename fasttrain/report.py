#!/usr/bin/env python3
"""Write a run's report, one self-contained page with its figures, curves, samples and settings, or compare runs.

python fasttrain/report.py RUN [RUN …]
"""

from __future__ import annotations

import pathlib
import sys

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.jobs.options import ReportConfig
from fasttrain.system.cli import finish, parse


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        options = parse(ReportConfig, argv, positional=True)
        from fasttrain.jobs.report import report

        return report(options)

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
