#!/usr/bin/env python3
"""How fast images come out of the loader, beside the decoder's own speed and other projects' loaders.

    python benchmarks/loader.py --data OUT

Every round runs every side once, one after the other, on the same JPEG streams; medians over the rounds count. On a
GPU, figures of a training loop there as well (loader_gpu.py). Prints a table, appends a line to
benchmarks/results/loader.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import psutil
import torch

from benchmarks import loader_gpu, record
from benchmarks.loader_ours import DecodeLimit, Ours
from benchmarks.loader_peers import Dali, Ffcv, Torchvision, extract
from fasttrain.formats.manifest import Manifest
from fasttrain.input import Order, ThreadLoader, open_dataset
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import Options, Positive

BATCH = 80
DALI_FULL_IMAGES = 160  # of a round: it is by far the slowest side
ROOT = pathlib.Path(__file__).resolve().parents[1]

# A process of its own, from its start to the first batch, and the memory it takes on the way through an epoch.
_FRESH = """
import sys, pathlib, threading, time
sys.path.insert(0, sys.argv[1])
from fasttrain.input import Order, ThreadLoader, open_dataset
store = open_dataset(pathlib.Path(sys.argv[2]), "train")
loader = ThreadLoader(store, Order(store.num_samples, min(256, store.num_samples)), int(sys.argv[3]))
batches = loader.epoch(0)
next(batches)
print("first", flush=True)
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        peak = max(peak, int(lines["RssAnon"].split()[0]) + int(lines["RssShmem"].split()[0]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
for n in range(3):
    for batch in batches: pass
    batches = loader.epoch(n + 1)
print(peak, flush=True)
"""


@dataclass(frozen=True)
class LoaderBenchmark(Options):
    """Compare loaders of paired views on one converted data set. The last line of the output is JSON."""

    data: str
    """Converted data set: .beton, JPEG; for the peers, one shard in its train split."""
    rounds: Positive[int] = 5
    """Rounds; in each, every side runs once."""
    size: Positive[int] = 224
    """Side of the views in pixels."""
    peers: bool = True
    """Also run FFCV, DALI and torchvision."""


def sides(data: pathlib.Path, folder: pathlib.Path, threads: int, peers: bool, size: int) -> dict:
    """Name -> side; a side's epoch(n) runs once through its images and returns how many they were."""
    made: dict = {
        "C decode limit": DecodeLimit(data, threads),
        "ours, decode only": Ours(data, threads, BATCH, "decode", size),
        "ours, two crops": Ours(data, threads, BATCH, "crops", size),
        "ours, full MoCo v2": Ours(data, threads, BATCH, "full", size),
    }
    if peers:
        extract(data, folder)
        made |= {
            "FFCV, two decodes, two crops": Ffcv(data, threads, BATCH, size),
            "DALI, two crops": Dali(folder, threads, BATCH, False, 10 * BATCH, size),
            "DALI, full MoCo v2": Dali(folder, threads, BATCH, True, DALI_FULL_IMAGES, size),
            "torchvision, full MoCo v2": Torchvision(folder, threads, BATCH, size),
        }
    return made


def measure(made: dict, rounds: int) -> dict[str, list[float]]:
    """Images per second of every side in every round, after a first one that warms caches and compiles."""
    rates: dict[str, list[float]] = {name: [] for name in made}
    for n in range(rounds + 1):
        for name, side in made.items():
            began = time.perf_counter()
            count = side.epoch(n)
            if n:
                rates[name].append(count / (time.perf_counter() - began))
    for side in made.values():
        if isinstance(side, Ours):
            side.close()
    return rates


def fresh_process(data: pathlib.Path, threads: int, runs: int) -> tuple[float, float]:
    """Median seconds from the start of a process to its first batch of 256, and most GiB of memory not mapped."""
    seconds, peaks = [], []
    for _ in range(runs):
        began = time.perf_counter()
        command = [sys.executable, "-c", _FRESH, str(ROOT), str(data), str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds.append(time.perf_counter() - began)
            peaks.append(int(process.stdout.readline()) / 2**20)
    return statistics.median(seconds), max(peaks)


def waiting(data: pathlib.Path, threads: int, images_per_sec: float) -> float:
    """Seconds of an epoch that a loop waits for batches, when its own step takes 1.5 times the decoding of one.

    The step leaves the cores alone, as one on a GPU does.
    """
    store = open_dataset(data, "train")
    loader = ThreadLoader(store, Order(store.num_samples, BATCH), threads)
    waited, asked = 0.0, time.perf_counter()
    for _ in loader.epoch(0):
        waited += time.perf_counter() - asked
        time.sleep(1.5 * BATCH / images_per_sec)
        asked = time.perf_counter()
    loader.close()
    return waited


def ratio(rates: dict[str, list[float]], ours: str, other: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(rates[ours], rates[other], strict=True)), 3)


def benchmark(options: LoaderBenchmark) -> int:
    data, threads = pathlib.Path(options.data), len(psutil.Process().cpu_affinity() or [0])
    shards = Manifest.load(data).splits.get("train", [])
    if not shards or (options.peers and len(shards) > 1):
        raise UserError(f"{data} must have a train split, for the peers of one shard: stock FFCV reads one file")
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as folder:
        rates = measure(sides(data, pathlib.Path(folder), threads, options.peers, options.size), options.rounds)
    first_batch, rss = fresh_process(data, threads, options.rounds)
    figures: dict[str, object] = {"decode_vs_limit": ratio(rates, "ours, decode only", "C decode limit")}
    if options.peers:
        figures |= {
            "crops_vs_ffcv": ratio(rates, "ours, two crops", "FFCV, two decodes, two crops"),
            "crops_vs_dali": ratio(rates, "ours, two crops", "DALI, two crops"),
            "full_vs_torchvision": ratio(rates, "ours, full MoCo v2", "torchvision, full MoCo v2"),
            "full_vs_dali": ratio(rates, "ours, full MoCo v2", "DALI, full MoCo v2"),
        }
    figures |= {
        "first_batch_s": round(first_batch, 3),
        "rss_gib": round(rss, 3),
        "wait_s_per_epoch": round(waiting(data, threads, statistics.median(rates["ours, decode only"])), 3),
    }
    if torch.cuda.is_available():
        figures |= loader_gpu.measure(data, threads, BATCH)
    print(f"{'images/s, of ' + str(threads) + ' threads':34}{'median':>9}{'least':>9}{'most':>9}")
    for name, values in rates.items():
        print(f"{name:34}{statistics.median(values):9.0f}{min(values):9.0f}{max(values):9.0f}")
    medians = {name: [round(x, 1) for x in sorted(values)] for name, values in rates.items()}
    print(json.dumps(figures), flush=True)
    record.append(
        "loader", {"threads": threads, "batch": BATCH, "size": options.size, "images_per_sec": medians, **figures}
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: benchmark(parse(LoaderBenchmark, argv)))


if __name__ == "__main__":
    raise SystemExit(main())
