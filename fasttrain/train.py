#!/usr/bin/env python3
"""Pre-train an image encoder.

python fasttrain/train.py --data OUT --method xmoco
torchrun --nproc-per-node 8 -- fasttrain/train.py --data OUT --method xmoco
"""

from __future__ import annotations

import pathlib
import sys

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.config import parse_config
from fasttrain.system.cli import finish
from fasttrain.system.signals import interrupt_ends


def main(argv: list[str] | None = None) -> int:
    def command() -> int:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        from fasttrain.jobs.train import train  # torch takes seconds, which --help and a mistyped option need not
        from fasttrain.run.faults import explained

        lower = f"lower --batch-size (now {config.optimisation.batch_size}) or --size (now {config.views.size})"
        cut = "" if config.method.over_batch else "--accumulate or "  # which a loss over the batch refuses
        other = f"try {cut}--checkpoint-activations, or share the batch among more processes"
        with explained(f"{lower}, {other}"), interrupt_ends():
            finished = train(config)
        return 128 + finished.stopped if finished.stopped else 0

    return finish(command)


if __name__ == "__main__":
    raise SystemExit(main())
