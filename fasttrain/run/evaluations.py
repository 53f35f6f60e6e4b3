"""evaluation.json: every accuracy measured of a run's checkpoints, one for each step, data set and protocol."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from fasttrain.system.durable import write_json
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock
from fasttrain.system.regular import read_at_most

FILE = "evaluation.json"
LOCK = f".{FILE}.lock"  # two evaluations that end at once would each leave out the other's figures
PATIENCE_SECONDS = 10.0
MAX_BYTES = 1 << 26  # of it: two thousand of them with a thousand classes each, many more without
NAMES = {
    "knn": "kNN", "linear": "linear", "linear_moco": "linear (MoCo)", "linear_dino": "linear (DINO)",
    "finetune": "fine-tuned", "semi": "semi-supervised", "few_shot": "few-shot",
}  # of the protocols, for people  # fmt: skip
# among the settings, what a protocol has chosen or found itself, which may be other digits on another device
OUTCOMES = frozenset({"lr", "C", "tried", "converged", "top1_std"})
CHECKPOINT = "checkpoint"  # the setting that says how the weights were chosen, where they are not the last
FIGURES = "top1", "top5", "balanced", "majority", "low", "high"


@dataclass(frozen=True)
class Evaluation:
    """One accuracy. top1, top5, balanced, majority, low and high: see evaluation/accuracy.py; None: not measured.

    untrained: of the weights the run started from. settings: what else the protocol was given. fingerprint: of the
    images, "" for one not kept; num_images: how many of them were classified, 0 for a number not kept. variant: what
    tells it from the protocol's headline, such as other images or another k; "" for that itself. per_class: top1 by the
    names of the classes.
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
    top5: float | None = None
    low: float | None = None
    high: float | None = None
    per_class: dict[str, float] | None = None
    variant: str = ""

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what a damaged file may hold."""
        for name, kind in (("protocol", str), ("step", int), ("untrained", bool), ("settings", dict), ("data", str),
                           ("fingerprint", str), ("num_images", int), ("variant", str)):  # fmt: skip
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} is no {kind.__name__}")
        for name in FIGURES:
            value = getattr(self, name)
            if not (value is None and name != "top1") and not _is_percentage(value):
                raise ValueError(f"{name} is no percentage")
        if self.per_class is not None and (
            type(self.per_class) is not dict or not all(map(_is_percentage, self.per_class.values()))
        ):
            raise ValueError("per_class is no table of percentages")

    def replaces(self, other: Evaluation) -> bool:
        """Is it a newer measurement of the same?"""
        measured = ("data", "num_images", "per_class", *FIGURES)
        keys = ({**asdict(each), **dict.fromkeys(measured), "settings": each.asked()} for each in (self, other))
        return next(keys) == next(keys) and (self.fingerprint != "" or self.data == other.data)

    def asked(self) -> dict[str, Any]:
        """The settings that were not found on the way."""
        return {name: value for name, value in self.settings.items() if name not in OUTCOMES}

    def figures(self) -> dict[str, float]:
        """Its figures by the names that evaluate.py and report.py print."""
        prefix = f"{self.name}_"
        suffix = "_untrained" if self.untrained else ""
        values = {name: getattr(self, name) for name in FIGURES}
        return {f"{prefix}{name}{suffix}": value for name, value in values.items() if value is not None}

    @property
    def of_projection(self) -> bool:
        """Is it a figure of the projection head's output, not of the encoder's?"""
        return self.settings.get("features") == "projection"

    @property
    def name(self) -> str:
        """Of the protocol and its variant."""
        return f"{self.protocol}_{self.variant}" if self.variant else self.protocol


def _size(evaluation: Evaluation) -> int:
    """Bytes in the file, more or less."""
    return 2 * len(json.dumps(asdict(evaluation)))


def _is_percentage(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 100  # type: ignore[operator]


def read_evaluations(run: pathlib.Path) -> list[Evaluation]:
    """Those of a run, oldest first; what is damaged is left out, with a warning."""
    path = run / FILE
    evaluations, damaged = _read(path)
    if damaged:
        print(f"warning: {path} is damaged, {damaged} in it left out: run evaluate.py again", file=sys.stderr)
    return evaluations


def keep_evaluations(run: pathlib.Path, new: list[Evaluation]) -> None:
    """Add some to those of a run, in place of earlier ones of the same. A damaged file is kept beside the new one.
    What earlier ones say of each class is left out where all of it would be too much to be read again.

    Raises UserError when another process holds the file's lock, or for a file that can't be read just now.
    """
    path = run / FILE
    with lock(run / LOCK, f"another process is writing {path}", PATIENCE_SECONDS):
        old, damaged = _read(path)
        if damaged:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        kept = [each for each in old if not any(other.replaces(each) for other in new)]
        if sum(map(_size, (*kept, *new))) > MAX_BYTES:
            kept = [replace(each, per_class=None) for each in kept]
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
    for protocol in ("knn", "linear"):
        of_it = settings if protocol == "knn" else {"features": settings.get("features", "encoder")}
        for name, untrained in ((f"{protocol}_top1", False), (f"{protocol}_top1_untrained", True)):
            if name in content:
                found.append({**common, "protocol": protocol, "untrained": untrained, "settings": of_it,
                              "top1": content[name]})  # fmt: skip
    return found
