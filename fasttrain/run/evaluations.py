"""evaluation.json: every accuracy measured of a run's checkpoints, one for each step, data set and protocol."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import sys
from dataclasses import asdict, dataclass
from typing import Any

from fasttrain.system.durable import write_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock
from fasttrain.system.regular import read_at_most

FILE = "evaluation.json"
LOCK = f".{FILE}.lock"  # two evaluations that end at once would each leave out the other's figures
PATIENCE_SECONDS = 10.0
MAX_BYTES = 1 << 26  # of it: more than a hundred thousand of them
NAMES = {"knn": "kNN", "linear": "linear"}  # of the protocols, for people


@dataclass(frozen=True)
class Evaluation:
    """One accuracy. top1, balanced and majority: see evaluation/accuracy.py; None: not measured.

    untrained: of the weights the run started from. settings: what else the protocol was given. fingerprint: of the
    images, "" for one not kept; num_images: how many of them were classified, 0 for a number not kept.
    """

    protocol: str
    step: int
    untrained: bool
    settings: dict[str, Any]
    data: str
    fingerprint: str
    num_images: int
    top1: float
    balanced: float | None = None
    majority: float | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what a damaged file may hold."""
        for name, kind in (("protocol", str), ("step", int), ("untrained", bool), ("settings", dict), ("data", str),
                           ("fingerprint", str), ("num_images", int)):  # fmt: skip
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} is no {kind.__name__}")
        for name in ("top1", "balanced", "majority"):
            value = getattr(self, name)
            missing = value is None and name != "top1"
            if not missing and (type(value) not in (int, float) or not 0 <= value <= 100 or math.isnan(value)):
                raise ValueError(f"{name} is no percentage")

    def replaces(self, other: Evaluation) -> bool:
        """Is it a newer measurement of the same?"""
        keys = ({**asdict(each), **dict.fromkeys(("data", "num_images", "top1", "balanced", "majority"))}
                for each in (self, other))  # fmt: skip
        return next(keys) == next(keys) and (self.fingerprint != "" or self.data == other.data)

    def figures(self) -> dict[str, float]:
        """Its figures by the names that evaluate.py and report.py print."""
        suffix = "_untrained" if self.untrained else ""
        values = {"top1": self.top1, "balanced": self.balanced, "majority": self.majority}
        return {f"{self.protocol}_{name}{suffix}": value for name, value in values.items() if value is not None}


def read_evaluations(run: pathlib.Path) -> list[Evaluation]:
    """Those of a run, oldest first; what is damaged is left out, with a warning."""
    path = run / FILE
    evaluations, damaged = _read(path)
    if damaged:
        print(f"warning: {path} is damaged, {damaged} in it left out: run evaluate.py again", file=sys.stderr)
    return evaluations


def keep_evaluations(run: pathlib.Path, new: list[Evaluation]) -> None:
    """Add some to those of a run, in place of earlier ones of the same. A damaged file is kept beside the new one.

    Raises UserError when another process holds the file's lock, or for a file that can't be read just now.
    """
    path = run / FILE
    with lock(run / LOCK, f"another process is writing {path}", PATIENCE_SECONDS):
        old, damaged = _read(path)
        if damaged:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        kept = [each for each in old if not any(other.replaces(each) for other in new)]
        write_json(path, {"evaluations": [asdict(each) for each in (*kept, *new)]})


def _read(path: pathlib.Path) -> tuple[list[Evaluation], str]:
    """The sound evaluations, and what can't be read: "" for nothing."""
    try:
        content = json.loads(read_at_most(path, MAX_BYTES))
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        if error.errno == errno.EINVAL:  # no regular file
            return [], "all"
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        return [], "all"
    if isinstance(content, dict) and "evaluations" not in content:
        content = {"evaluations": _of_flat(content)}
    entries = content.get("evaluations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return [], "all"
    sound = []
    for entry in entries:
        try:
            sound.append(Evaluation(**entry))
        except (TypeError, ValueError):
            continue
    lost = len(entries) - len(sound)
    return sound, f"{lost} of {len(entries)}" if lost else ""


def _of_flat(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a file that held the last evaluation alone: {"step": …, "knn_top1": …, "settings": {…}}."""
    saved = content.get("settings")
    settings = dict(saved) if isinstance(saved, dict) else {}
    common = {"step": content.get("step"), "data": settings.pop("data", ""), "fingerprint": "", "num_images": 0}
    found = []
    for protocol in NAMES:
        of_it = settings if protocol == "knn" else {"features": settings.get("features", "encoder")}
        for name, untrained in ((f"{protocol}_top1", False), (f"{protocol}_top1_untrained", True)):
            if name in content:
                found.append({**common, "protocol": protocol, "untrained": untrained, "settings": of_it,
                              "top1": content[name]})  # fmt: skip
    return found
