#!/usr/bin/env python3
"""Does a run of fasttrain learn what a plain loop in fp32 learns? MoCo by both, compared by their curves of kNN.

    python benchmarks/equivalence.py --data data/cifar10 --seeds 0 1 2 --epochs 10 \\
        --options="--preset cifar10 --arch small --no-cifar-stem --size 16 --batch-size 256 --lr 0.06 \\
        --warmup-epochs 1 --head mlp"

One side is train.py: fused losses, bf16, channels-last, torch.compile. The other one is the published loop
(step_peers.py) in fp32. They share initial weights and queue, images and their order, what is drawn for views, and
each step's learning rate; the same function measures both, on the same images. What is left different:

- the arithmetic, which is what is compared: networks, gradients, losses, views and updates are rounded otherwise;
- on a GPU, fp32 convolves in TF32, which is the published loop's default there;
- an encoder that draws in training (dropped paths) draws otherwise. The loop's shuffle of keys only changes the order
  of sums: batch norm is plain.

Appends a line for each seed to benchmarks/results/equivalence.jsonl. A seed that is there with the same options and
data is left out; one that was interrupted goes on with train.py, and starts over with the loop. Images per second are
of one side after the other, on whatever else the machine does: step.py compares speeds. The last line of the output is
JSON.
"""

from __future__ import annotations

import json
import pathlib
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch

from benchmarks import record
from benchmarks.equivalence_sides import check_plain, fast, plain
from fasttrain import open_dataset
from fasttrain.config import parse_config
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import NotNegative, Options, Positive

SIDES = "fasttrain", "plain fp32"
FAST = "--method moco --batch-norm plain --compile on --precision bf16 --knn-k 200"  # options may say otherwise


@dataclass(frozen=True)
class EquivalenceBenchmark(Options):
    """Train with fasttrain and with a plain fp32 loop: do they learn the same? The last line of the output is JSON."""

    data: str
    """Converted data set with labels and a val split."""
    options: str
    """Those of train.py that both sides share, in one text: --options="--preset cifar10 --arch small"."""
    seeds: NotNegative[tuple[int, ...]] = (0, 1, 2)
    """Both sides are trained with each."""
    epochs: Positive[int] = 10
    """Length of a training."""
    knn_every: Positive[int] = 2
    """Epochs between measurements."""
    runs: str = "runs/equivalence"
    """Folder of fasttrain's runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise UserError("--seeds: give one at least")
        if self.knn_every > self.epochs:
            raise UserError(f"--knn-every {self.knn_every} measures nothing in --epochs {self.epochs}")


def words_of(options: EquivalenceBenchmark, seed: int) -> list[str]:
    """What is typed behind train.py for a seed."""
    words = [*shlex.split(FAST), *shlex.split(options.options), "--data", options.data, "--seed", str(seed)]
    words += ["--epochs", str(options.epochs), "--knn-every", str(options.knn_every)]
    return [*words, "--run", str(pathlib.Path(options.runs) / f"seed-{seed}")]


def measured(options: EquivalenceBenchmark, seed: int) -> dict[str, Any]:
    """A seed's figures, of which a line is kept."""
    words, run = words_of(options, seed), pathlib.Path(options.runs) / f"seed-{seed}"
    config = parse_config(words)
    check_plain(config)
    found = dict(zip(SIDES, (fast(words, run), plain(config, run)), strict=True))
    on_gpu = torch.cuda.is_available() and config.machine.device != "cpu"
    figures = {
        "seed": seed, **identity(options), "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "knn": {
            name: {str(step): round(top1, 3) for step, top1 in side.knn.items()} for name, side in found.items()
        },
        "images_per_sec": {name: round(side.images_per_sec, 1) for name, side in found.items()},
    }  # fmt: skip
    record.append("equivalence", figures)
    return figures


def identity(options: EquivalenceBenchmark) -> dict[str, Any]:
    """What figures belong together."""
    return {
        "options": shlex.split(options.options), "epochs": options.epochs, "knn_every": options.knn_every,
        "fingerprint": open_dataset(options.data, "train").fingerprint,
    }  # fmt: skip


def kept(options: EquivalenceBenchmark) -> dict[int, dict[str, Any]]:
    """The figures that there are, by seed; the newest of each."""
    file, mine = record.RESULTS / "equivalence.jsonl", identity(options)
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return {each["seed"]: each for each in map(json.loads, lines) if mine.items() <= each.items()}


def show(found: Sequence[dict[str, Any]], knn_every: int) -> dict[str, Any]:
    """Prints the table of the seeds' curves; returns how far their means are from each other."""
    print(f"kNN top-1, mean of {len(found)} seeds" + " ± standard deviation" * (len(found) > 1))
    print(f"{'epoch':>5}" + "".join(f"{name:>16}" for name in SIDES) + f"{'difference':>12}")
    curves = {name: list(zip(*(each["knn"][name].values() for each in found), strict=True)) for name in SIDES}
    differences = []
    for number, of_sides in enumerate(zip(*curves.values(), strict=True), 1):
        ours, theirs = map(statistics.fmean, of_sides)
        differences.append(ours - theirs)
        print(f"{number * knn_every:5}" + "".join(map(_told, of_sides)) + f"{differences[-1]:+12.2f}")
    stds = {name: round(statistics.stdev(curve[-1]), 3) for name, curve in curves.items() if len(found) > 1}
    return {
        "seeds": [each["seed"] for each in found], "largest_difference": round(max(map(abs, differences)), 3),
        "final_difference": round(abs(differences[-1]), 3), "std": stds,
    }  # fmt: skip


def _told(top1: Sequence[float]) -> str:
    std = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    return f"{statistics.fmean(top1):.2f}{std}".rjust(16)


def benchmark(options: EquivalenceBenchmark) -> int:
    before = kept(options)
    found = [before.get(seed) or measured(options, seed) for seed in options.seeds]
    print(json.dumps(show(found, options.knn_every)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: benchmark(parse(EquivalenceBenchmark, sys.argv[1:]))))
