"""When a run was started, and each time that it was started again: by how many processes, of what code, in which
order, how."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import fasttrain
from fasttrain.run.folder import CONFIG, read_record
from fasttrain.storage.attempts import without_secrets
from fasttrain.system.durable import write_json

MOST = 100  # that are kept: the first, and the newest
COMMIT_SECONDS = 5.0


def keep_start(run: pathlib.Path, step: int, processes: int, lanes: int) -> None:
    """Record in config.json that training begins, or goes on from a step. lanes: of its order, 0 for a global one."""
    content = read_record(run / CONFIG)
    start = {
        "step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S%z"), "processes": processes,
        "cores": len(os.sched_getaffinity(0)), "commit": commit(), "command": command(),
        "shuffle": f"block, {lanes} shards at once" if lanes else "global",
    }  # fmt: skip
    starts = [*starts_of(content), start]
    write_json(run / CONFIG, {**content, "starts": [*starts[:1], *starts[1:][-MOST + 1 :]]})


def starts_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What keep_start has recorded in a config.json, oldest first; what is damaged is left out."""
    found = record.get("starts")
    return [
        start
        for start in (found if isinstance(found, list) else [])
        if isinstance(start, dict)
        and all(type(start.get(name)) is int and start[name] >= 0 for name in ("step", "processes", "cores"))
        and all(type(start.get(name)) is str for name in ("time", "commit", "command"))
    ]


def commit() -> str:
    """The commit of the checkout that this code is of, with -dirty where tracked files were changed; "" for none."""
    root = pathlib.Path(fasttrain.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMIT_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout.strip()[:100] if done.returncode == 0 else ""


def command() -> str:
    """This process's command line where it is train.py's; of another program, which may hold anything, ""."""
    path = pathlib.Path(sys.argv[0])
    own = pathlib.Path(fasttrain.__file__).with_name("train.py")
    is_own = path.name == "fasttrain-train" or (path.exists() and path.resolve() == own.resolve())
    return without_secrets(shlex.join([str(path), *sys.argv[1:]]))[:2000] if is_own else ""
