#!/usr/bin/env python3
"""What a step's collectives cost at 8 to 512 GPUs: bytes by formula, time by a model, or as measured here.

    python benchmarks/ranks.py
    torchrun --nproc-per-node 8 benchmarks/ranks.py --images 256

Started as several processes, on GPUs or a CPU, it times every collective at its real size between them instead, beside
the model. What the model assumes is told in docs/scale.md. ResNet-50, each method as its paper has it. Prints a table,
appends a line to benchmarks/results/ranks.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import record
from benchmarks.messages import Messages, messages, view_sides
from fasttrain.config import TrainConfig, make_config
from fasttrain.engine.networks import make_method
from fasttrain.engine.ranks import Ranks
from fasttrain.system.cli import finish, parse
from fasttrain.system.collectives import all_gather_single, reduce_scatter_single
from fasttrain.system.cores import machine_size
from fasttrain.system.options import Options, Positive

GPUS = 8  # of a machine
NVLINK, LINK = 370e9, 47e9  # bytes/s that a GPU gets inside a machine, and from a link of 400 Gb/s
IMAGES_PER_SEC = 2800  # views of 224 px, forward and backward: ResNet-50 in mixed precision on an H100
RUNS = {
    "moco": {}, "simclr": {}, "simclr machine": {"batch_norm": "machine"}, "swav": {},
    "swav machine": {"batch_norm": "machine"},
}  # fmt: skip


@dataclass(frozen=True)
class RanksBenchmark(Options):
    """What the ranks' collectives cost in a step."""

    images: Positive[int] = 64
    """Images of each GPU in a step."""
    rounds: Positive[int] = 20
    """Of a measurement; medians over them count."""


class Cluster(NamedTuple):
    """links: of 400 Gb/s, that a machine has."""

    gpus: int
    links: int

    @property
    def outward(self) -> float:
        """Bytes/s that a machine sends."""
        return self.links * LINK


def latency(kind: str, ranks: int) -> float:
    """Seconds of a small message: NCCL's own model of its low-latency protocol (src/graph/tuning.cc)."""
    machines = max(1, ranks // GPUS)
    farther = 1.8 if machines > 1 else 1.0
    ring = (ranks - machines) * farther * 0.47 + (machines - 1) * 2.7
    if kind != "all-reduce":
        return 1e-6 * (3.6 + ring)
    tree = 2 * ((ranks / machines - 1) * farther * 0.52 + math.ceil(math.log2(machines)) * 5.0)
    return 1e-6 * min(3.6 + 2 * ring, 4.4 + tree)


def seconds(each: Messages, cluster: Cluster) -> float:
    """Rings pass through the links of a machine side by side; of an all-to-all, every GPU sends its own images out."""
    start = len(each.sizes) * latency(each.kind, each.ranks)
    machines = each.ranks // GPUS
    if machines <= 1:
        return start + each.sent / NVLINK
    if each.kind == "all-to-all":
        out = sum(each.sizes) * (1 - 1 / machines)
        return start + max(GPUS * out / cluster.outward, (each.sent - out) / NVLINK)
    return start + each.sent / min(NVLINK, cluster.outward)


def work_seconds(config: TrainConfig, images: int) -> float:
    """Of a step without its collectives."""
    view_V = [(side / 224) ** 2 for side in view_sides(config)]
    if config.run.method == "moco":
        view_V[1] /= 3  # keys have a forward alone
    return images * sum(view_V) / IMAGES_PER_SEC


def waiting(each: Messages, cluster: Cluster, work: float) -> float:
    """Seconds of a step in which nothing else is computed."""
    whole = seconds(each, cluster)
    if each.during == "forward":  # of the queries
        return max(0.0, whole - work / 4)
    if each.during == "backward":  # of all but the bucket that is full last; a backward is half of MoCo's step, or more
        return max(whole - work / 2, seconds(each._replace(sizes=each.sizes[-1:]), cluster))
    return whole


def planned(run: str, images: int, gpus: int, machine: int = GPUS) -> tuple[TrainConfig, list[Messages]]:
    config = make_config(run.split()[0], batch_size=images * gpus, **RUNS[run])
    with torch.device("meta"):
        method = make_method(config.method, config.encoder, config.views.size, config.run.seed)
    return config, messages(config, method, gpus, machine)


def model(options: RanksBenchmark) -> dict[str, object]:
    """The table of the model."""
    figures: dict[str, object] = {"images": options.images}
    for run in RUNS:
        for gpus in (8, 16, 32, 64, 512):
            config, found = planned(run, options.images, gpus)
            work = work_seconds(config, options.images)
            print(f"\n{run}, {options.images} images on each of {gpus} GPUs: {1e3 * work:.1f} ms without collectives")
            print(f"{'':26}{'count':>6}{'MB sent':>9}{'ms, 8 links':>13}{'waits':>7}{'ms, 1 link':>13}{'waits':>7}")
            waits = dict.fromkeys((8, 1), 0.0)
            for each in found:
                line = f"{each.part:26}{len(each.sizes):6}{each.sent / 1e6:9.2f}"
                for links in waits:
                    cluster = Cluster(gpus, links)
                    alone = waiting(each, cluster, work)
                    waits[links] += alone
                    line += f"{1e3 * seconds(each, cluster):13.2f}{1e3 * alone:7.2f}"
                print(line)
            shares = {f"waits_{links}_links": wait / (work + wait) for links, wait in waits.items()}
            print("of a step: " + ", ".join(f"{share:.1%} with {name}" for name, share in shares.items()))
            figures[f"{run} {gpus}"] = {"mb": {e.part: e.sent / 1e6 for e in found}, "ms": 1e3 * work, **shares}
    return figures


def measured(options: RanksBenchmark, ranks: Ranks) -> dict[str, object]:
    """Every collective of a step between the ranks there are, in milliseconds."""
    cluster = Cluster(ranks.world_size, GPUS)
    figures: dict[str, object] = {"images": options.images, "ranks": ranks.world_size, "device": str(ranks.device)}
    for run in RUNS:
        _, found = planned(run, options.images, ranks.world_size, machine_size())
        for each in found:
            if each.ranks < ranks.world_size:
                continue  # what it takes inside a machine is measured on one machine
            one = Messages(each.part, each.kind, each.ranks, (sum(each.sizes) / len(each.sizes),))
            ms = 1e3 * len(each.sizes) * _timed(_collective(one, ranks), ranks, options.rounds)
            figures[f"{run}: {each.part}"] = ms
            if ranks.is_main:
                reckoned = 1e3 * seconds(each, cluster)
                print(f"{run + ', ' + each.part:40}{ms:10.2f} ms, by the model {reckoned:.2f}", flush=True)
    return figures


def _collective(each: Messages, ranks: Ranks) -> Callable[[], object]:
    count = max(1, int(each.sizes[0]) // 4 // ranks.world_size)  # of a rank's part
    part, whole = (torch.zeros(rows * count, device=ranks.device) for rows in (1, ranks.world_size))
    other = torch.empty_like(whole)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole), "all-gather": lambda: all_gather_single(whole, part),
        "reduce-scatter": lambda: reduce_scatter_single(part, whole),
        "all-to-all": lambda: dist.all_to_all_single(other, whole),
    }  # fmt: skip
    return calls[each.kind]


def _timed(call: Callable[[], object], ranks: Ranks, rounds: int) -> float:
    """Seconds: the median over the rounds of the slowest rank's."""

    def wait() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    found = []
    for _ in range(rounds + 1):
        wait()
        dist.barrier()
        began = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - began)
    slowest: Tensor = torch.tensor(found[1:], device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def main(options: RanksBenchmark) -> int:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        figures = model(options)
    else:
        ranks = Ranks("auto")
        figures = measured(options, ranks)
        ranks.close()
        if not ranks.is_main:
            return 0
    print(json.dumps(figures), flush=True)
    record.append("ranks", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: main(parse(RanksBenchmark, sys.argv[1:]))))
