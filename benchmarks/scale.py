#!/usr/bin/env python3
"""What a large set costs before and while it is read: opening, memory, the first batch, and planning the batches.

    python benchmarks/scale.py

The set is made for it, in a temporary folder: real shards of small JPEGs, each of which lies there under thousands of
names, as hard links do, with a manifest that says of every name what is true of it. So every shard is opened, mapped
and read as its own, while the disk holds a few. Storage is the page cache: what a disk or a network takes is not
measured. Each shuffle runs in a process of its own. Prints a table, appends a line to benchmarks/results/scale.jsonl;
the last line of the output is JSON.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import numpy as np
import psutil
from PIL import Image

from benchmarks import record
from fasttrain.dataprep.shards import checksum
from fasttrain.formats.beton import BetonWriter
from fasttrain.formats.manifest import Manifest, Shard, SideFile, glimpses
from fasttrain.formats.names import NamesWriter, names_path
from fasttrain.input import Order, Store, ThreadLoader, choose_shuffle, located, open_dataset
from fasttrain.input.loader import AHEAD
from fasttrain.system.cli import finish, parse
from fasttrain.system.options import Options, Positive

BATCH = 4096
SIDE, PICTURES = 32, 500
LINKS = 10_000  # names of a file: file systems allow 65,000
RANKS = {"1 rank": (0, 1), "rank 3 of 8": (3, 8)}


@dataclass(frozen=True)
class ScaleBenchmark(Options):
    """Open a set of very many shards, and plan and read its batches. The last line of the output is JSON."""

    shards: Positive[int] = 100_000
    """Shards."""
    shard_size: Positive[int] = 10_000
    """Images of each."""
    steps: Positive[int] = 20
    """Steps that are planned; their median counts."""
    window: Positive[int] = 64
    """Shards that --shuffle block mixes at a time."""


class Memory(NamedTuple):
    """Of this process, in MiB: its own, which no file stands for, and the most there was, with pages of files."""

    own: float
    peak: float


def streams() -> list[bytes]:
    """Small JPEGs of smooth noise."""
    generator, found = np.random.default_rng(0), []
    for _ in range(PICTURES):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def real_shard(path: pathlib.Path, number: int, count: int, pictures: list[bytes]) -> Shard:
    """Write a shard and its names."""
    names = NamesWriter(path)
    with BetonWriter(path, count) as writer:
        for row in range(count):
            writer.write(pictures[(row + number) % PICTURES], SIDE, SIDE, row % 10)
            names.write(f"{row % 10}/{number:06d}-{row:06d}.jpg")
    names.publish()
    beside = names_path(path)
    side = SideFile(beside.name, beside.stat().st_size, checksum(beside))
    return Shard(path.name, count, path.stat().st_size, checksum(path), None, glimpses(path), side)


def make_set(folder: pathlib.Path, num_shards: int, count: int) -> None:
    """Write the real shards, give them their other names, and write the manifest."""
    pictures, shards, origin = streams(), [], folder / "train-00000.beton"
    for number in range(num_shards):
        path = folder / f"train-{number:05d}.beton"
        if number % LINKS == 0:
            origin, real = path, real_shard(path, number, count, pictures)
        else:
            os.link(origin, path)
            os.link(names_path(origin), names_path(path))
        side = dataclasses.replace(real.names, name=names_path(path).name) if real.names else None
        shards.append(dataclasses.replace(real, name=path.name, names=side))
    class_counts = [num_shards * len(range(c, count, 10)) for c in range(10)]
    counts = {"train": class_counts}
    Manifest("ffcv", [str(c) for c in range(10)], {"train": shards}, [0.5] * 3, [0.25] * 3, {}, [], counts, {}).save(
        folder
    )


def measure(folder: pathlib.Path, kind: str, options: ScaleBenchmark) -> dict[str, float]:
    """What one shuffle costs, in a process that has done nothing before."""
    began, before = time.perf_counter(), memory()
    store = open_dataset(folder, "train")
    opened, after = time.perf_counter(), memory()
    shuffle = choose_shuffle(store, located(folder), kind, options.window)
    batch_size = min(BATCH, store.num_samples // 8 * 8)

    def order(rank: int, world_size: int) -> Order:
        return Order(store.num_samples, batch_size, 0, True, rank, world_size, shuffle.lanes, shuffle.block_S)

    loader = ThreadLoader(store, order(0, 1), len(psutil.Process().cpu_affinity() or [0]))
    batches = loader.epoch(0)
    next(batches)
    figures = {"open_s": opened - began, "first_batch_s": time.perf_counter() - opened}
    took = [time.perf_counter() for _ in itertools.islice(batches, 3 * AHEAD)][AHEAD - 1 :]  # not those made meanwhile
    loader.close()
    figures["images_per_sec"] = batch_size * (len(took) - 1) / max(took[-1] - took[0], 1e-9) if took else 0.0
    read = memory()
    for name, place in RANKS.items():
        figures |= {f"{key}, {name}": value for key, value in plan(store, order(*place), options.steps).items()}
    return figures | {
        "imports_mib": before.own,
        "opened_mib": after.own,
        "read_mib": read.own,
        "peak_mib": read.peak,  # with the pages of mapped shards, which are the page cache's
        "open_files": float(psutil.Process().num_fds()),
    }


def plan(store: Store, order: Order, steps: int) -> dict[str, float]:
    """Steps per second of one thread that computes the order, and of one that also reads what tables say of samples."""
    order.step(1, 0)
    numbers, reads = [], []
    for step in range(min(steps, order.steps_per_epoch)):
        began = time.perf_counter()
        index_B = order.step(1, step).tolist()
        numbers.append(time.perf_counter() - began)
        for index in index_B:
            store.read(index)
        reads.append(time.perf_counter() - began)
    return {"orders_per_sec": 1 / statistics.median(numbers), "plans_per_sec": 1 / statistics.median(reads)}


def memory() -> Memory:
    """As the kernel counts it."""
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text("ascii").splitlines())
    own, peak = int(status["RssAnon"].split()[0]), int(status["VmHWM"].split()[0])
    return Memory(own / 1024, peak / 1024)


def benchmark(options: ScaleBenchmark) -> int:
    with tempfile.TemporaryDirectory(prefix="scale-benchmark-") as name:
        folder = pathlib.Path(name)
        make_set(folder, options.shards, options.shard_size)
        manifest_mib = (folder / "manifest.json").stat().st_size / 2**20
        found = {}
        for kind in ("global", "block"):
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, context) as process:
                found[kind] = process.submit(measure, folder, kind, options).result()
    figures = {kind: {key: round(value, 3) for key, value in each.items()} for kind, each in found.items()}
    print(f"{options.shards:,} shards, {options.shards * options.shard_size:,} images, batch {BATCH}")
    print(f"{'':32}{'global':>12}{'block':>12}")
    for key in figures["global"]:
        print(f"{key:32}{figures['global'][key]:12,.3f}{figures['block'][key]:12,.3f}")
    summary = {"shards": options.shards, "shard_size": options.shard_size, "manifest_mib": round(manifest_mib, 1)}
    print(json.dumps({**summary, **figures}), flush=True)
    record.append("scale", {**summary, **figures})
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: benchmark(parse(ScaleBenchmark, argv)))


if __name__ == "__main__":
    raise SystemExit(main())
