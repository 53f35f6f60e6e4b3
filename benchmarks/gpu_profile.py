#!/usr/bin/env python3
"""Where the time of a training step goes: kernels by time, gaps between them, copies, and waits of the host.

    python benchmarks/gpu_profile.py --case resnet50

The step is that of step.py, on ready-made views, compiled as train.py has it. On a GPU from the profiler's trace of
some steps; on a CPU it is PyTorch's operations. Prints a table of LINES lines, appends it to
benchmarks/results/gpu_profile.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from benchmarks.loader_gpu import trace_of
from benchmarks.step import CASES
from benchmarks.step_sides import Parts, fasttrain_steps
from fasttrain.system.cli import finish, parse
from fasttrain.system.options import Options, Positive

LINES, WARM_UP = 25, 5
LONGEST_NAME = 70
ON_GPU = "kernel", "gpu_memcpy", "gpu_memset"
WAITS, LAUNCH = "Synchronize", "Launch"  # in names of CUDA's calls: the host waits for the device, and starts a kernel


@dataclass(frozen=True)
class GpuProfile(Options):
    """Profile the training step. The last line of the output is JSON."""

    case: Literal["tiny", "small", "resnet18-gpu", "resnet50"] = "resnet50"
    """As in step.py."""
    steps: Positive[int] = 5
    """Steps that are profiled, after some to warm up."""
    method: Literal["moco", "xmoco", "co2"] = "xmoco"
    """Whose step."""


class Line(NamedTuple):
    """What ran under one name, of a step: milliseconds and calls."""

    name: str
    ms: float
    calls: float


class Profile(NamedTuple):
    """ms: from the first kernel's start to the last one's end, of a step. busy: part of it in which something ran.
    gaps: idle stretches of a step longer than a microsecond. waits_ms: of the host, for the device."""

    ms: float
    busy: float
    gaps: float
    waits_ms: float
    lines: list[Line]


def of_trace(events: Iterable[dict[str, Any]], steps: int) -> Profile:
    """From a profiler's trace in Chrome's format, whose times are µs. On a CPU operations stand for kernels."""
    found = [event for event in events if event.get("ph") == "X"]
    ran = [event for event in found if event.get("cat") in ON_GPU]
    ran = ran or [event for event in found if event.get("cat") == "cpu_op"]
    took, calls = collections.Counter[str](), collections.Counter[str]()
    busy, gaps, until = 0.0, 0, None
    for event in sorted(ran, key=lambda event: event["ts"]):
        took[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        end = event["ts"] + event["dur"]
        if until is None:
            busy, until, first = event["dur"], end, event["ts"]
            continue
        gaps += event["ts"] > until + 1
        busy += max(0.0, end - max(until, event["ts"]))
        until = max(until, end)
    if until is None:
        return Profile(0.0, 0.0, 0.0, 0.0, [])
    host = [event for event in found if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    # after the last launch it is the profiler that waits
    last = max((event["ts"] for event in host if LAUNCH in event["name"]), default=0.0)
    waits = sum(event["dur"] for event in host if WAITS in event["name"] and event["ts"] < last)
    lines = [Line(name, ms / 1e3 / steps, calls[name] / steps) for name, ms in took.most_common()]
    return Profile((until - first) / 1e3 / steps, busy / (until - first), gaps / steps, waits / 1e3 / steps, lines)


def show(found: Profile) -> None:
    print(
        f"a step: {found.ms:.2f} ms, busy {found.busy:.1%} of it, {found.gaps:.0f} gaps, the host waits "
        f"{found.waits_ms:.2f} ms"
    )
    print(f"{'ms':>9} {'share':>6} {'calls':>7}  name")
    total = sum(line.ms for line in found.lines) or 1.0
    for line in found.lines[:LINES]:
        print(f"{line.ms:9.3f} {line.ms / total:6.1%} {line.calls:7.1f}  {line.name[:LONGEST_NAME]}")
    if rest := found.lines[LINES:]:
        ms = sum(line.ms for line in rest)
        print(f"{ms:9.3f} {ms / total:6.1%} {sum(line.calls for line in rest):7.1f}  {len(rest)} others")


def measure(options: GpuProfile) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = dataclasses.replace(CASES[options.case], method=options.method)
    run = fasttrain_steps(case, None, device, Parts(device))
    run(WARM_UP if device.type == "cuda" else 1)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        run(options.steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = of_trace(trace_of(profiler)["traceEvents"], options.steps)
    show(found)
    figures = {
        "case": options.case, "method": options.method,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **found._asdict(), "lines": [(name[:LONGEST_NAME], ms, calls) for name, ms, calls in found.lines[:LINES]],
    }  # fmt: skip
    record.append("gpu_profile", figures)
    print(json.dumps({name: value for name, value in figures.items() if name != "lines"}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(GpuProfile, sys.argv[1:]))))
