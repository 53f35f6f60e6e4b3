#!/usr/bin/env python3
"""Write a run's encoder for torchvision, timm, safetensors, ONNX, detectron2 or transformers, and prove it.

    python fasttrain/export.py RUN --to timm FOLDER

The file is read again by the library it is for, and features of the run's images are compared. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import pathlib
import sys

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.jobs.options import ExportConfig
from fasttrain.system.cli import finish, parse


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        options = parse(ExportConfig, argv, positional=True)
        from fasttrain.jobs.export import export

        return export(options)

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
