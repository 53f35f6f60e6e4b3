#!/usr/bin/env python3
"""Write the features that a run's encoder gives of images, in their order, as .npy with names, or as parquet.

    python fasttrain/embed.py RUN IMAGES OUT.npy

The last line of the output is one JSON object. The same command continues after an interruption.
"""

from __future__ import annotations

import pathlib
import sys

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.jobs.options import EmbedConfig
from fasttrain.system.cli import finish, parse


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        options = parse(EmbedConfig, argv, positional=True)
        from fasttrain.jobs.embed import embed
        from fasttrain.run.faults import explained

        with explained(f"lower --batch-size (now {options.batch_size})"):
            return embed(options)

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
