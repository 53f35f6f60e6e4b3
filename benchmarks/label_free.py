#!/usr/bin/env python3
"""What the label-free figures of a representation cost: each alone, on features of the shapes that encoders have.

    python benchmarks/label_free.py

fp32 features in memory, one core of a CPU or a GPU; medians over the rounds, each of which runs every figure once. The
rank figures and α-ReQ share one spectrum, whose time is theirs. LiDAR has N/8 images of 8 views. Prints a table,
appends a line to benchmarks/results/label_free.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.similarity import seconds
from fasttrain.evaluation import label_free
from fasttrain.system.cli import finish, parse
from fasttrain.system.options import Options, Positive

SHAPES = (2048, 512), (4096, 512), (2048, 2048), (4096, 2048)
VIEWS = 8  # of each image, for LiDAR
FIGURES: dict[str, Callable[[Tensor], object]] = {
    "spectrum": label_free.spectrum,
    "lidar": lambda z_ND: label_free.lidar(z_ND.unflatten(0, (-1, VIEWS))),
    "standard_deviation": label_free.standard_deviation,
    "alignment": lambda z_ND: label_free.alignment(z_ND[::2], z_ND[1::2]),
    "uniformity": label_free.uniformity,
}


@dataclass(frozen=True)
class LabelFreeBenchmark(Options):
    """Time the figures of a representation's health that need no labels."""

    rounds: Positive[int] = 3
    """Rounds; each runs every figure once. Medians over them count."""


def make_features(rows: int, width: int, device: str) -> Tensor:
    """Of uneven scale and not centred, as an encoder's are."""
    generator = torch.Generator(device).manual_seed(0)
    scale_D = torch.arange(1, width + 1, device=device) ** -0.5
    return torch.randn(rows, width, device=device, generator=generator) * scale_D + 0.3


def measure(options: LabelFreeBenchmark) -> int:
    on_gpu = torch.cuda.is_available()
    figures: dict[str, object] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    print(f"{'milliseconds':12}" + "".join(f"{name:>20}" for name in FIGURES))
    for rows, width in SHAPES:
        z_ND = make_features(rows, width, "cuda" if on_gpu else "cpu")
        runs = {name: functools.partial(figure, z_ND) for name, figure in FIGURES.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for attempt in range(options.rounds + 1):
            for name, run in runs.items():
                took = 1000 * seconds(run, 1, on_gpu)
                if attempt:  # the first compiles
                    times[name].append(took)
        ms = {name: round(statistics.median(each), 2) for name, each in times.items()}
        print(f"{rows:5} × {width:4}" + "".join(f"{took:20.1f}" for took in ms.values()), flush=True)
        figures[f"{rows}x{width}"] = ms
    print(json.dumps(figures), flush=True)
    record.append("label_free", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(LabelFreeBenchmark, sys.argv[1:]))))
