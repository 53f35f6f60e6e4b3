#!/usr/bin/env python3
"""How long a person waits for --help of each command, and what `import fasttrain` adds to `import torch`.

    python benchmarks/startup.py

Every round starts each of them once, in an interpreter of its own, one after the other; medians over the rounds count.
Prints a table, appends a line to benchmarks/results/startup.jsonl; the last line of the output is JSON. Exit status 1
where a command takes more than HELP_SECONDS, or the package adds more than PACKAGE_SECONDS.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from benchmarks import record
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import RunError
from fasttrain.system.options import Options, Positive

ROOT = pathlib.Path(__file__).resolve().parents[1]
HELP_SECONDS, PACKAGE_SECONDS = 1.0, 0.1
TORCH, BOTH = "import torch", "import torch, fasttrain"


@dataclass(frozen=True)
class StartupBenchmark(Options):
    """Time what a person waits for before a command does anything."""

    rounds: Positive[int] = 5
    """Rounds; each starts everything once. Medians over them count."""


def command_lines() -> dict[str, list[str]]:
    """What is started, by the name that the table has for it: words for Python, and whether it is to succeed."""
    files = sorted(file for room in ("fasttrain", "dataprep") for file in (ROOT / room).glob("*.py"))
    commands = [file for file in files if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")]
    helps = {f"{file.parent.name}/{file.name} --help": [str(file), "--help"] for file in commands}
    mistyped = {"fasttrain/train.py --no-such": [str(ROOT / "fasttrain/train.py"), "--data", "x", "--no-such"]}
    return {**helps, **mistyped, **{statement: ["-c", statement] for statement in ("pass", TORCH, BOTH)}}


def seconds(words: list[str]) -> float:
    """From the start of an interpreter to its end. Raises RunError for a status that no person's line has."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode not in (0, 2):
        raise RunError(f"{' '.join(words)}: {done.stderr}")
    return time.perf_counter() - began


def measure(options: StartupBenchmark) -> int:
    lines = command_lines()
    for words in lines.values():  # so that all is compiled and in the disk's cache
        seconds(words)
    times: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(options.rounds):
        for name, words in lines.items():
            times[name].append(seconds(words))
    medians = {name: round(statistics.median(found), 4) for name, found in times.items()}
    beyond = statistics.median(both - alone for both, alone in zip(times[BOTH], times[TORCH], strict=True))
    for name, found in times.items():
        print(f"{name:32}{medians[name]:8.3f} s   {min(found):.3f} … {max(found):.3f}")
    print(f"{'fasttrain beyond torch':32}{beyond:8.3f} s")
    figures = {"seconds": medians, "beyond_torch": round(beyond, 4)}
    print(json.dumps(figures), flush=True)
    record.append("startup", figures)
    slow = [name for name in lines if name.startswith(("fasttrain/", "dataprep/")) and medians[name] > HELP_SECONDS]
    if slow or beyond > PACKAGE_SECONDS:
        raise RunError(f"too slow: {', '.join(slow) or 'import fasttrain'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(StartupBenchmark, sys.argv[1:]))))
