"""What every benchmark keeps of a run: the figures, with the machine, the versions and the commit they belong to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time

# variables of the environment: another folder for results, and the commit, where a copy has no history
ELSEWHERE, COMMIT = "BENCHMARK_RESULTS", "BENCHMARK_COMMIT"
RESULTS = pathlib.Path(os.environ.get(ELSEWHERE) or pathlib.Path(__file__).with_name("results"))
_PACKAGES = ("torch", "torchvision", "numpy", "numba", "pillow", "ffcv", "nvidia-dali-cuda130")


def append(name: str, figures: dict) -> None:
    """Append one JSON line to results/NAME.jsonl."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **origin(), **figures}
    with open(RESULTS / f"{name}.jsonl", "a", encoding="ascii") as file:
        file.write(json.dumps(entry) + "\n")


def origin() -> dict:
    """Commit, machine and versions."""
    return {
        "commit": os.environ.get(COMMIT) or _commit(),
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _commit() -> str:
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, check=False
        )
    except OSError:  # a machine without git
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
