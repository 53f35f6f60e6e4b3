#!/usr/bin/env python3
"""All that a GPU is asked, in one run of less than ten minutes: is it right, how fast, and whatever tests then fit.

    python benchmarks/gpu_day.py --kit gpu-kit --out OUT     # make gpu-day
    python benchmarks/gpu_day.py --dry                       # each part small, on a CPU, too

Parts come in turn, the most telling first, each a process with a time limit of its own: one that fails or takes too
long does not keep the others from being measured. After each its status and figures are printed and kept. OUT has few
files, as they may have to travel: gpu-day.jsonl, a line for each part; gpu-day.log, all that they said; and what
belongs into benchmarks/results. Ends with status 1 when a part failed. The last line of the output is JSON.

Needs PyTorch, torchvision, Triton, numba and psutil; recipes/gpu-kit.sh makes a kit of the rest, whose photographs and
CIFAR-10 are taken where it has them. Else images are drawn. BENCHMARK_COMMIT in the environment names the commit of a
copy that has no history.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch

from benchmarks import record
from fasttrain.run.metrics import read_metrics
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.options import Options, Positive

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAST_LINES = 12  # of a part's output that are shown
LEAST = 5.0  # seconds in which a part can do anything at all
KERNELS = "tests/kernels", "tests/losses"
OF_TESTS = "kernels", "tests"  # parts
WITHOUT_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of whatever else is installed there
PYTEST_ENDS = 15.0  # seconds that a test in progress and pytest's summary may take
_ENDED = re.compile(r"::.* (PASSED|FAILED|ERROR) +\[|^ERROR (?!.*::)")  # a test's line, or a file that can't be read
DONE, FAILED, TOO_LONG, NO_TIME = "done", "failed", "took too long", "no time was left"


@dataclass(frozen=True)
class GpuDay(Options):
    """Check, measure and test on this machine's GPU. The last line of the output is JSON."""

    kit: str = "gpu-kit"
    """Folder that recipes/gpu-kit.sh made, with CIFAR-10 in KIT-cifar. Neither need be there."""
    out: str = "runs/gpu-day"
    """Folder for figures and the log."""
    work: str = "runs/gpu-day.work"
    """Folder for drawn images and runs."""
    seconds: Positive[float] = 550.0
    """For all parts together; the last, tests, takes what is left."""
    parts: tuple[str, ...] = ()
    """Only these; none: all."""
    dry: bool = False
    """Each part small, to try this on any machine."""


class Part(NamedTuple):
    """Something to run: commands, one after the other, that may take so many seconds together."""

    name: str
    seconds: float
    commands: Sequence[Sequence[str]]


class Ended(NamedTuple):
    """What became of a part, and the JSON that its last command ended with."""

    name: str
    status: str
    seconds: float
    figures: dict[str, object]


def plan(options: GpuDay) -> list[Part]:
    """The parts, the most telling first."""
    work, kit = pathlib.Path(options.work).resolve(), pathlib.Path(options.kit).resolve()
    drawn = str(work / "drawn")
    images = "40" if options.dry else "6000"
    making = []

    def brought_or_drawn(brought: pathlib.Path, name: str, *words: str) -> str:
        if brought.exists():
            return str(brought)
        making.append(["dataprep/convert.py", drawn, str(work / name), "--format", "ffcv", *words])
        return str(work / name)

    photos = brought_or_drawn(kit / "photos", "photos", "--max-side", "400")
    small = brought_or_drawn(kit.with_name(f"{kit.name}-cifar"), "small", "--max-side", "32", "--write", "raw")
    if making:
        making.insert(0, ["dataprep/demo.py", drawn, "--images", images])

    def train(name: str, *words: str) -> list[str]:
        return ["fasttrain/train.py", "--method", "xmoco", "--run", str(work / name), "--fresh", *words]

    def either(dry: str, wet: str) -> list[str]:
        return (dry if options.dry else wet).split()

    tiny = "--batch-size 16 --queue-size 64 --max-steps 2 --log-every 1 --device cpu"
    return [
        Part("images", 40, making),
        Part("right", 60, [["benchmarks/gpu_check.py", "--data", photos,
            *either("--rows 32 --keys 512 --images 4 --size 32", "")]]),
        Part("kernels", 70, [tests(options, "gpu and not slow", *KERNELS)]),
        Part("compiled", 50, [train("compiled", "--data", small, "--preset", "demo",
            *either(tiny, "--compile on --max-steps 40"))]),
        Part("step", 190, [["benchmarks/step.py", "--method", "xmoco",
            *either("--case tiny --rounds 1", "--case resnet50 --rounds 2")]]),
        Part("losses", 120, [["benchmarks/similarity.py",
            *either("--rows 16 --keys 256 --rounds 1 --seconds 0", "--rows 256 4096 --rounds 3")]]),
        Part("views", 50, [["benchmarks/augment.py", "--data", photos,
            *either("--images 4 --batch 4 --batches 1 --size 32 --rounds 1", "--images 16")]]),
        Part("loaded", 70, [["benchmarks/step.py", "--method", "xmoco", "--data", photos, "--no-peers",
            *either("--case tiny --rounds 1", "--case resnet50 --rounds 2")]]),
        Part("cifar", 50, [train("cifar", "--data", small, "--preset", "cifar10", "--loader", "resident",
            *either(f"--arch small {tiny}", "--max-steps 300 --log-every 50"))]),
        Part("profile", 60, [["benchmarks/gpu_profile.py", *either("--case tiny --steps 1", "")]]),
        Part("loader", 60, [["benchmarks/loader.py", "--data", photos, "--no-peers",
            *either("--rounds 1 --size 32", "--rounds 3")]]),
        Part("tests", options.seconds, [tests(options, "gpu", "tests", *(f"--ignore={folder}" for folder in KERNELS))]),
    ]  # fmt: skip


def tests(options: GpuDay, marks: str, *paths: str) -> list[str]:
    words = ["-m", "pytest", "-vv", "-p", "pytest_timeout", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if options.dry:
        return [*words, "--collect-only", "-m", marks, *KERNELS]
    return [*words, "--tb=short", "-m", marks, *paths]


def surroundings(seconds: float, out: pathlib.Path) -> dict[str, str]:
    """The environment of a command. Tests end by themselves shortly before their time is over, and say what failed."""
    found = {**os.environ, record.ELSEWHERE: str(out), **WITHOUT_PLUGINS}
    if math.isfinite(seconds):
        found["PYTEST_ADDOPTS"] = f"--session-timeout={max(1.0, seconds - PYTEST_ENDS):g}"
    return found


def ran(part: Part, seconds: float, out: pathlib.Path) -> tuple[Ended, list[str]]:
    """Runs a part within so many seconds; also what it said, which goes to the log."""
    began, status = time.monotonic(), DONE
    log = out / "gpu-day.log"
    with open(log, "ab") as file:
        file.write(f"\n== {part.name}\n".encode())
        file.flush()
        start = file.tell()
        for command in part.commands:
            left = seconds - (time.monotonic() - began)
            # in a session of its own, so that its processes end with it
            process = subprocess.Popen(
                [sys.executable, "-u", *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                start_new_session=True, env=surroundings(left, out),
            )  # fmt: skip
            try:
                status = FAILED if process.wait(None if math.isinf(left) else max(left, 0)) else DONE
            except subprocess.TimeoutExpired:
                status = TOO_LONG
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status != DONE:
                break
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    seconds = round(time.monotonic() - began, 1)
    return Ended(part.name, status, seconds, _json(lines[-1] if lines else "")), lines


def _json(line: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def figures_of(ended: Ended, lines: Sequence[str], work: pathlib.Path) -> dict[str, object]:
    """A part's figures: its own, those of the run it trained, or how many tests ended how."""
    if ended.name in OF_TESTS:
        words = [found[1] or "ERROR" for line in lines if (found := _ENDED.search(line))]
        return {word.lower(): words.count(word) for word in ("PASSED", "FAILED", "ERROR")}
    metrics = work / ended.name / "metrics.jsonl"
    rates = [entry["images_per_sec"] for entry in read_metrics(metrics) if "images_per_sec" in entry]
    return ended.figures | ({"images_per_sec": sorted(rates)[len(rates) // 2]} if rates else {})


def day(options: GpuDay) -> int:
    if not (options.dry or torch.cuda.is_available()):
        raise UserError("PyTorch finds no GPU here; --dry runs each part small on a CPU")
    began, out = time.monotonic(), pathlib.Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    ended: list[Ended] = []
    for part in plan(options):
        if not part.commands or (options.parts and part.name not in options.parts):
            continue
        left = math.inf if options.dry else options.seconds - (time.monotonic() - began)
        if left < LEAST:
            ended.append(Ended(part.name, NO_TIME, 0.0, {}))
        else:
            one, lines = ran(part, math.inf if options.dry else min(part.seconds, left), out)
            ended.append(one._replace(figures=figures_of(one, lines, pathlib.Path(options.work))))
            print("\n".join(lines[-LAST_LINES:]))
        print(f"== {part.name}: {ended[-1].status}, {ended[-1].seconds} s", flush=True)
        with open(out / "gpu-day.jsonl", "a", encoding="ascii") as file:
            file.write(json.dumps({**record.origin(), **ended[-1]._asdict()}) + "\n")
    print(json.dumps({each.name: {"status": each.status, "seconds": each.seconds} for each in ended}), flush=True)
    return int(any(map(wrong, ended)))


def wrong(ended: Ended) -> bool:
    """Did a part go wrong? Tests are cut short when the time is over; what matters is that none failed."""
    if ended.name in OF_TESTS and ended.status != NO_TIME and ended.figures["passed"]:
        return bool(ended.figures["failed"] or ended.figures["error"])
    return ended.status != DONE


if __name__ == "__main__":
    raise SystemExit(finish(lambda: day(parse(GpuDay, sys.argv[1:]))))
