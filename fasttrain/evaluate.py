#!/usr/bin/env python3
"""Evaluate the encoder of a run, or of several, on labelled images it was not trained on, by the papers' protocols.

    python fasttrain/evaluate.py RUN --data OUT --knn --linear

The last line of the output is one JSON object; it is also kept as RUN/evaluation.json and shown in RUN/report.html.
"""

from __future__ import annotations

import pathlib
import sys

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.jobs.options import EvaluateConfig
from fasttrain.system.cli import finish, parse


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        options = parse(EvaluateConfig, argv, positional=True)
        from fasttrain.jobs.evaluate import evaluate
        from fasttrain.run.faults import explained

        with explained(f"lower --batch-size (now {options.batch_size}), or evaluate where there is more"):
            return evaluate(options)

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
