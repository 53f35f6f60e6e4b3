#!/usr/bin/env python3
"""Every method trained with its demo preset, and what became of its encoder.

    make demo
    python benchmarks/methods.py --data data/demo-shards

Trains and evaluates one method after the other as a person would, with the commands. An encoder that collapses, or
learns next to nothing, is not LEAST_MARGIN points of kNN better than before training: the command names it and
ends with status 1. Prints a table, appends a line to benchmarks/results/methods.jsonl; the last line of the output is
JSON.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from benchmarks import record
from fasttrain.methods import METHODS
from fasttrain.run.metrics import read_metrics
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import RunError
from fasttrain.system.options import Options

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEAST_MARGIN = 15.0  # points of kNN above the untrained encoder
NEEDED = {"sepclr": ("--background", "0")}  # by method, what has no default
COLUMNS = {
    "steps": 7, "seconds": 9, "knn_top1_untrained": 20, "knn_top1": 10, "linear_top1": 13, "images_per_sec": 16,
    "rss_gib": 9,
}  # fmt: skip


@dataclass(frozen=True)
class MethodsBenchmark(Options):
    """Train every method with its demo preset and evaluate it. The last line of the output is JSON."""

    data: str
    """Converted data set of small images with labels, such as that of make demo."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which ones."""
    runs: str = "runs/methods"
    """Folder of their runs; one that is there already goes on where it ended."""


def trained(name: str, data: str, run: pathlib.Path) -> dict[str, float]:
    """The figures of a method's run."""
    began = time.perf_counter()
    words = "--data", data, "--method", name, *NEEDED.get(name, ()), "--preset", "demo", "--run", str(run)
    command("train.py", *words)
    seconds = time.perf_counter() - began
    evaluated = command("evaluate.py", str(run), "--data", data, "--knn", "--linear", "--untrained")
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "images_per_sec" in entry]
    figures, rates = json.loads(evaluated.splitlines()[-1]), [entry["images_per_sec"] for entry in entries]
    figures |= {"steps": figures["step"], "seconds": seconds, "rss_gib": entries[-1]["rss_gib"]}
    return {name: round(float(figures[name]), 2) for name in COLUMNS if name in figures} | {
        "images_per_sec": round(sorted(rates)[len(rates) // 2], 1)
    }


def command(name: str, *words: str) -> str:
    """What one of the project's commands printed. Raises RunError where it failed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "fasttrain" / name), *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"{name} {' '.join(words)} ended with status {done.returncode}")
    return done.stdout


def benchmark(options: MethodsBenchmark) -> int:
    found: dict[str, dict[str, float]] = {}
    for name in options.methods:
        found[name] = trained(name, options.data, pathlib.Path(options.runs) / name)
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    print(f"{'':10}" + "".join(f"{title:>{width}}" for title, width in COLUMNS.items()))
    for name, figures in found.items():
        print(f"{name:10}" + "".join(f"{figures[title]:{width}.1f}" for title, width in COLUMNS.items()))
    record.append("methods", {"data": options.data, "methods": found})
    print(json.dumps(found), flush=True)
    weak = [name for name, of in found.items() if of["knn_top1"] - of["knn_top1_untrained"] < LEAST_MARGIN]
    if weak:
        raise RunError(f"less than {LEAST_MARGIN:g} points of kNN above the untrained encoder: {', '.join(weak)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: benchmark(parse(MethodsBenchmark, sys.argv[1:]))))
