#!/usr/bin/env python3
"""The training step beside the loops that people run today, on views that are there and on loaded ones.

    python benchmarks/step.py --data OUT
    python benchmarks/step.py --methods all

OUT: a converted data set (.beton), of photographs for ResNet-50 at 224 px, of small images for the cases at 32 px;
without it only steps on ready-made views are timed. Every side has a process of its own, set up as its users have it;
every round runs some steps of each, one side after the other; medians over the rounds count. On loaded views a side
has the machine to itself for all its rounds, as a DataLoader would go on decoding in another side's time. All sides
train the same network with MoCo: same batch, queue and view size. Prints a table and appends a line to
benchmarks/results/step.jsonl for each case and kind of views; the last line of the output is JSON, its ratios the
smallest over the cases. Ours and AMP compute in what the machine multiplies in: on a CPU without bf16 that is fp32.

--methods times a step of each method instead, with its own heads, queue and number of views (of its CIFAR-10 preset,
where the encoder has that stem), beside the passes through the encoder that its paper asks for (step_methods.py).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record, step_methods
from benchmarks.loader_peers import extract
from benchmarks.similarity import speeds
from benchmarks.step_methods import PASSES
from benchmarks.step_sides import Case, Round, Side
from fasttrain.engine.precision import DTYPES, fastest_precision
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import Options, Positive

PEERS = {  # and the names of their ratios to ours
    "moco fp32": "vs_moco_fp32", "moco amp": "vs_moco_amp", "channels-last amp": "vs_channels_last_amp",
}  # fmt: skip
CASES = {
    case.name: case
    for case in (
        Case("tiny", "small", False, 16, 32, 256, "linear", steps=1),  # to try a benchmark
        # 256 images are MoCo's default and ours; the demo takes 128
        Case("small", "small", False, 32, 256, 4096, "linear", steps=3),
        Case("small-128", "small", False, 32, 128, 4096, "linear", steps=6),
        Case("resnet18", "resnet18", True, 32, 256, 4096, "linear", steps=1),  # MoCo's CIFAR-10 network
        Case("resnet18-imagenet-stem", "resnet18", False, 32, 256, 4096, "linear", steps=3),
        Case("resnet18-gpu", "resnet18", True, 32, 512, 4096, "linear", steps=30),
        Case("resnet50", "resnet50", False, 224, 256, 65536, "mlp", steps=10),
    )
}


@dataclass(frozen=True)
class StepBenchmark(Options):
    """Time the training step beside a MoCo loop in fp32, with AMP, and with AMP in channels-last."""

    data: str = ""
    """Converted data set for the steps on loaded images. Empty: only steps on ready-made views."""
    case: Literal[
        "auto", "tiny", "small", "small-128", "resnet18", "resnet18-imagenet-stem", "resnet18-gpu", "resnet50"
    ] = "auto"
    """auto: small and resnet18 on a CPU, resnet50 on a GPU."""
    method: Literal["moco", "xmoco", "co2"] = "moco"
    """Ours; the other sides are MoCo."""
    methods: tuple[str, ...] = ()
    """Time these methods' steps beside their passes through the encoder instead; all: every method."""
    peers: bool = True
    """Also run the loops that people run today."""
    rounds: Positive[int] = 5
    """Rounds; each runs every side once. Medians over them count."""


def flops(case: Case) -> float:
    """Operations of one step: the query network's forward and backward (twice as much), the key network's forward."""
    encoder, _ = make_encoder(EncoderOptions(arch=case.arch, cifar_stem=case.cifar_stem), case.size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        encoder(torch.zeros(1, 3, case.size, case.size).expand(2, -1, -1, -1))
    return 4 * counter.get_total_flops() / 2 * case.batch_size


def on_ready_made_views(case: Case, sides: Sequence[str], rounds: int) -> dict[str, list[Round]]:
    return _in_turn(sides, case, None, None, rounds)


def on_loaded_views(
    case: Case, sides: Sequence[str], data: pathlib.Path, folder: pathlib.Path, rounds: int
) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = {}
    for name in sides:
        found |= _in_turn([name], case, data, folder, rounds)
    return found


def _in_turn(
    names: Sequence[str], case: Case, data: pathlib.Path | None, folder: pathlib.Path | None, rounds: int
) -> dict[str, list[Round]]:
    sides = {name: Side(name, case, data, folder) for name in names}
    try:
        for side in sides.values():
            side.warm_up(case.steps)
        found: dict[str, list[Round]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(side.run(case.steps))
        return found
    finally:
        for side in sides.values():
            side.close()


def show(case: Case, kind: str, found: dict[str, list[Round]], peak: float) -> dict[str, object]:
    """Prints the table of one case and kind of views; returns its figures."""
    medians = {name: statistics.median(r.seconds for r in rounds) for name, rounds in found.items()}
    print(f"\n{case.name}, {case.size} px, batch {case.batch_size}, queue {case.queue_size}, {kind} views")
    for name, median in medians.items():
        spread = (max(r.seconds for r in found[name]) - min(r.seconds for r in found[name])) / median
        rate = flops(case) / median
        print(
            f"  {name:18} {case.batch_size / median:9.1f} images/s ±{spread:.0%}, {median / medians['ours']:5.2f} of "
            f"ours' time, {rate / 1e12:.3f} TFLOP/s ({rate / peak:.0%} of a large product's), "
            f"{found[name][-1].memory / 2**30:.2f} GiB"
        )
    parts = {part: statistics.median(r.parts.get(part, 0.0) for r in found["ours"]) for part in found["ours"][0].parts}
    inside = sum(parts.get(part, 0.0) for part in ("query forward", "key forward", "loss"))
    parts["backward"] = parts.pop("forward and backward") - inside
    parts["rest"] = medians["ours"] - sum(parts.values())
    print("  ours: " + ", ".join(f"{part} {1e3 * seconds:.2f} ms" for part, seconds in parts.items()))
    return {
        "images_per_sec": case.batch_size / medians["ours"], "share_of_peak": flops(case) / medians["ours"] / peak,
        "ms_by_part": {part: 1e3 * seconds for part, seconds in parts.items()},
        "gib": {name: rounds[-1].memory / 2**30 for name, rounds in found.items()},
        **{key: medians[name] / medians["ours"] for name, key in PEERS.items() if name in medians},
    }  # fmt: skip


def machine_of(on_gpu: bool) -> dict[str, str]:
    """What is told of it with the figures."""
    kind = "cuda" if on_gpu else "cpu"
    device = torch.cuda.get_device_name() if on_gpu else kind
    return {"device": device, "precision": fastest_precision(torch.device(kind))}


def of_methods(options: StepBenchmark) -> int:
    """Times steps of methods beside their passes."""
    names = list(PASSES) if options.methods == ("all",) else list(options.methods)
    if unknown := sorted(set(names) - set(PASSES)):
        raise UserError(f"--methods {unknown[0]}: choose from: all, {', '.join(PASSES)}")
    automatic = "resnet50" if torch.cuda.is_available() else "resnet18"
    case = CASES[automatic if options.case == "auto" else options.case]
    found = {}
    for name, cost in step_methods.measure(names, case, options.rounds):
        found[name] = cost
        print(f"{name}: {cost.step:.3f} s a step, {cost.passes:.3f} s of passes", file=sys.stderr, flush=True)
    machine = machine_of(torch.cuda.is_available())
    print(f"{case.name}, {case.size} px, batch {case.batch_size}, {machine['precision']}")
    figures = step_methods.show(found, case.batch_size)
    record.append("step_methods", {"case": case.name, **machine, "methods": figures})
    print(json.dumps(figures))
    return 0


def measure(options: StepBenchmark) -> int:
    if options.methods:
        return of_methods(options)
    on_gpu = torch.cuda.is_available()
    automatic = ("resnet50",) if on_gpu else ("small", "resnet18")
    names = automatic if options.case == "auto" else (options.case,)
    machine = machine_of(on_gpu)
    peak, _ = speeds(on_gpu, DTYPES[machine["precision"]])
    print(f"in {machine['precision']}")
    if on_gpu:
        torch.cuda.empty_cache()
    sides = ("ours", *(PEERS if options.peers else ()))
    kinds: dict[str, dict[str, dict]] = {"synthetic": {}, "loaded": {}}

    def keep(case: Case, kind: str, found: dict[str, list[Round]]) -> None:
        shown = kinds[kind][case.name] = show(case, kind, found, peak)
        record.append("step", {"case": case.name, "method": case.method, "views": kind, **machine, **shown})

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if options.data and options.peers:
            extract(pathlib.Path(options.data), folder)
        for name in names:
            case = dataclasses.replace(CASES[name], method=options.method)
            keep(case, "synthetic", on_ready_made_views(case, sides, options.rounds))
            if options.data:
                keep(case, "loaded", on_loaded_views(case, sides, pathlib.Path(options.data), folder, options.rounds))
    figures: dict[str, object] = {
        key: min(case[key] for case in kinds["synthetic"].values())
        for key in (*(PEERS.values() if options.peers else ()), "images_per_sec")
    }
    if options.data:
        figures["loaded_vs_synthetic"] = min(
            kinds["loaded"][name]["images_per_sec"] / kinds["synthetic"][name]["images_per_sec"] for name in names
        )
    figures |= {**machine, **kinds}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(StepBenchmark, sys.argv[1:]))))
