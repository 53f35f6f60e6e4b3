#!/usr/bin/env python3
"""How far a shuffle by blocks is from a global one: what shares a batch, and what a training on sorted shards learns.

    python benchmarks/shuffle.py --data data/demo-shards

First, of how many images of its own shard an image has the company in a batch, counted in orders of 4 million images.
Then the images of --data in many small shards, sorted by class, which is the worst case, and shuffled, as convert.py
writes them: the same short MoCo training with a global shuffle and with windows of few and of many shards, and kNN of
each. The queue is shorter than the data set, so that a poor order shows.
Prints tables, appends a line to benchmarks/results/shuffle.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import numpy as np

from benchmarks import record
from fasttrain.formats.beton import BetonWriter
from fasttrain.formats.manifest import FILE_NAME, Manifest, Shard
from fasttrain.input import Order, open_dataset
from fasttrain.input.stores import StreamStore
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import RunError, UserError
from fasttrain.system.options import Options, Positive

ROOT = pathlib.Path(__file__).resolve().parents[1]
WINDOWS = {"sorted": (0, 1, 4, 16, 64), "shuffled": (1, 16)}  # of shards that are so; 0: a global shuffle
SHARD, SHARDS = 2048, 2048  # of the orders that are counted
COUNTED = (256, (16, 64, 256)), (4096, (16, 64, 256))  # batch sizes and windows
STEPS = 50


@dataclass(frozen=True)
class ShuffleBenchmark(Options):
    """Count and train with global and block shuffles. The last line of the output is JSON."""

    data: str
    """Converted data set of JPEGs with labels: .beton, with train and val."""
    shard_size: Positive[int] = 30
    """Images of a shard of the sorted set."""
    epochs: Positive[int] = 8
    """Epochs of each training."""
    seeds: Positive[int] = 2
    """Trainings of each shuffle."""


def company(batch_size: int, lanes: int) -> float:
    """Mean number of other images of its own shard that an image has in its batch; lanes: 0 for global."""
    block_S = np.arange(SHARDS + 1) * SHARD
    order = Order(SHARDS * SHARD, batch_size, 1, lanes=lanes, block_S=block_S)
    found = []
    for step in range(0, order.steps_per_epoch, order.steps_per_epoch // STEPS):
        count_K = np.unique(order.step(0, step) // SHARD, return_counts=True)[1]
        found.append(float((count_K * (count_K - 1)).sum()) / batch_size)
    return statistics.mean(found)


def expected_company(batch_size: int, lanes: int) -> float:
    """The same by formula: a lane's share of a batch is of one shard, or of two where one ends."""
    return batch_size / lanes - 1 if lanes else (batch_size - 1) * (SHARD - 1) / (SHARDS * SHARD - 1)


def write_again(data: pathlib.Path, out: pathlib.Path, shard_size: int, kind: str) -> None:
    """A data set of the same images, "sorted" by class or "shuffled", in shards of so many; its validation as it is."""
    manifest, store = Manifest.load(data), open_dataset(data, "train")
    if not isinstance(store, StreamStore) or manifest.format != "ffcv":
        raise UserError(f"{data} is not of .beton shards")
    label_N = store.labels(np.arange(store.num_samples))
    shards = []
    of_kind = {
        "sorted": np.argsort(label_N, kind="stable"),
        "shuffled": np.random.default_rng(0).permutation(len(label_N)),
    }
    parts = np.split(of_kind[kind], range(shard_size, len(label_N), shard_size))
    for number, index_B in enumerate(parts):
        path = out / f"train-{number:05d}.beton"
        writer = BetonWriter(path, len(index_B))
        for index in index_B.tolist():
            sample = store.read(index)
            stream = store.stream(sample)
            if not stream.is_jpeg:
                raise UserError(f"{data} holds pixels, not JPEGs")
            writer.write(stream.data.tobytes(), sample.height, sample.width, int(label_N[index]))
        writer.finish()
        shards.append(Shard(path.name, len(index_B), path.stat().st_size, f"{number:064x}"))
    for shard in manifest.splits["val"]:
        for file in shard.files():
            shutil.copy(data / file.name, out)
    replace(manifest, splits={"train": shards, "val": manifest.splits["val"]}).save(out)


def trained(data: pathlib.Path, run: pathlib.Path, epochs: int, seed: int, lanes: int) -> float:
    """kNN top-1, in per cent, of an encoder trained on it."""
    how = ["--shuffle", "block", "--shuffle-window", lanes] if lanes else ["--shuffle", "global"]
    words = ["--preset", "demo", "--method", "moco", "--queue-size", 512, "--epochs", epochs, "--seed", seed, *how]
    _run("train.py", "--data", data, "--run", run, *words)
    return json.loads(_run("evaluate.py", run, "--data", data, "--knn").splitlines()[-1])["knn_top1"]


def _run(command: str, *words: object) -> str:
    line = [sys.executable, str(ROOT / "fasttrain" / command), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{command}: {done.stderr[-500:]}")
    return done.stdout


def count() -> list[dict[str, float]]:
    print(f"{'batch':>6}{'shuffle':>10}{'of its own shard':>18}{'by formula':>12}")
    rows = []
    for batch_size, windows in COUNTED:
        for lanes in (0, *windows):
            counted, formula = company(batch_size, lanes), expected_company(batch_size, lanes)
            row = {"batch": batch_size, "window": lanes, "company": round(counted, 3), "formula": round(formula, 3)}
            print(f"{batch_size:6}{lanes or 'global':>10}{row['company']:18}{row['formula']:12}")
            rows.append(row)
    return rows


def train_all(options: ShuffleBenchmark, folder: pathlib.Path) -> dict[str, list[float]]:
    for kind in WINDOWS:
        (folder / kind).mkdir()
        write_again(pathlib.Path(options.data), folder / kind, options.shard_size, kind)
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for kind, lanes in [(kind, lanes) for kind, windows in WINDOWS.items() for lanes in windows]:
            name = f"{kind}, window {lanes}" if lanes else "global"
            top1 = trained(folder / kind, folder / f"run-{kind}-{lanes}-{seed}", options.epochs, seed, lanes)
            found.setdefault(name, []).append(top1)
            print(f"{name}, seed {seed}: kNN {top1}", file=sys.stderr, flush=True)
    print(f"{'shards':22}{'kNN top-1 %':>12}")
    for name, values in found.items():
        print(f"{name:22}{statistics.mean(values):12.1f}   {min(values)} … {max(values)}")
    return found


def benchmark(options: ShuffleBenchmark) -> int:
    if not (pathlib.Path(options.data) / FILE_NAME).exists():
        raise UserError(f"{options.data} is no converted data set")
    rows = count()
    with tempfile.TemporaryDirectory(prefix="shuffle-benchmark-") as folder:
        top1 = train_all(options, pathlib.Path(folder))
    figures = {"shard_size": options.shard_size, "epochs": options.epochs, "knn_top1": top1, "company": rows}
    print(json.dumps(figures), flush=True)
    record.append("shuffle", figures)
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: benchmark(parse(ShuffleBenchmark, argv)))


if __name__ == "__main__":
    raise SystemExit(main())
