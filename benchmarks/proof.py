#!/usr/bin/env python3
"""One case of a comparison: trained once for each seed, evaluated, and its figures kept.

    python benchmarks/proof.py --table terms --case uniform --control moco --data data/cifar10 --seeds 0 1 2 \\
        --options="--method moco --uniform batch"

A seed whose figures are kept already is left out, and one that was interrupted goes on, so the same command may be
given again, or by several processes at once: each takes the seeds that no other is at. Figures of other settings or of
other images are not taken for a case's: it is refused. Appends a line for each seed to benchmarks/results/proof.jsonl,
of which benchmarks/proof_tables.py makes tables and curves; to measure all anew, set BENCHMARK_RESULTS to another
folder. recipes/proof.sh has all cases; the last line of the output is JSON.
"""

from __future__ import annotations

import json
import pathlib
import shlex
import statistics
import sys
from dataclasses import dataclass
from typing import Any

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from benchmarks import record
from benchmarks.methods import command
from fasttrain import open_dataset
from fasttrain.config import parse_config
from fasttrain.run.earlier import named_now
from fasttrain.run.metrics import read_metrics
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import UserError
from fasttrain.system.lock import lock
from fasttrain.system.options import NotNegative, Options, Positive, Settings

LEARNT = "knn_top1", "linear_top1"


@dataclass(frozen=True)
class ProofCase(Options):
    """Train a case with several seeds and evaluate each. The last line of the output is JSON."""

    table: str
    """Table that the case stands in."""
    case: str
    """Its name, which no other case has."""
    control: str
    """Case, of any table, that it is compared with: the same but for what is tried. Its own name, if it is one."""
    data: str
    """Converted data set with labels and a val split."""
    options: str
    """Those of train.py, in one text: --options="--method moco --epochs 8"."""
    labelled: str = ""
    """Another data set to evaluate on, with labels of its own. Nothing: the same."""
    k: Positive[int] = 200
    """Neighbours of kNN, at temperature 0.1: 200, as MoCo's CIFAR-10 notebook has it."""
    seeds: NotNegative[tuple[int, ...]] = (0, 1, 2)
    """A run for each."""
    runs: str = "runs/proof"
    """Folder of their runs."""


def kept() -> list[dict[str, Any]]:
    """Every figure there is, the oldest first; where a seed of a case was measured twice, the newest alone."""
    file = record.RESULTS / "proof.jsonl"
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return list({(each["case"], each["seed"]): each for each in map(json.loads, lines)}.values())


def measured(case: ProofCase, seed: int) -> dict[str, Any] | None:
    """The figures of a seed, trained or gone on with; None where another process is at it."""
    if found := _of(case, seed):
        return found
    run = pathlib.Path(case.runs) / f"{case.case}-{seed}"
    run.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{run} is another process's"
    try:
        held = lock(run.with_name(f"{run.name}.lock"), busy)
    except UserError as error:
        if str(error) != busy:
            raise
        print(error, file=sys.stderr, flush=True)
        return None
    with held:
        if found := _of(case, seed):  # while the lock was waited for
            return found
        command("train.py", *_words(case, seed), "--run", str(run))
        protocol = "--knn", "--k", str(case.k), "--temperature", "0.1", "--linear"
        told = command("evaluate.py", str(run), "--data", case.labelled or case.data, *protocol)
        evaluated = json.loads(told.splitlines()[-1])
        record.append("proof", _told(case, seed, run) | {name: evaluated[name] for name in LEARNT})
    return _of(case, seed)


def _words(case: ProofCase, seed: int) -> list[str]:
    """What is typed behind train.py."""
    return ["--data", case.data, *shlex.split(case.options), "--seed", str(seed)]


def _of(case: ProofCase, seed: int) -> dict[str, Any] | None:
    """What is kept of a seed. Raises UserError where that was trained with other settings or images."""
    for each in kept():
        if (each["case"], each["seed"]) == (case.case, seed):
            if changed := differences(case, each):
                raise UserError(
                    f"{case.case}: figures of other settings are kept ({'; '.join(changed)}): take another name"
                )
            if each["fingerprint"] != open_dataset(case.data, "train").fingerprint:
                raise UserError(
                    f"{case.case}: figures of other images than {case.data} are kept: "
                    f"set {record.ELSEWHERE} to a folder for yours"
                )
            return each
    return None


def differences(case: ProofCase, entry: dict[str, Any]) -> list[str]:
    """'--name was X, now Y' for each setting with which a case would now be trained or evaluated otherwise than it was.
    Options say less: defaults change. What --precision auto was counts as auto."""
    now, then = Settings.of(parse_config(_words(case, entry["seed"]))), named_now(entry["settings"])
    if now.values["precision"] == "auto":
        then["precision"] = "auto"
    evaluated = {"k": (entry["k"], case.k), "labelled": (entry.get("labelled", ""), case.labelled)}
    changed = [f"--{name} was {was}, now {given}" for name, (was, given) in evaluated.items() if was != given]
    return now.differences(then) + changed


def _told(case: ProofCase, seed: int, run: pathlib.Path) -> dict[str, Any]:
    """What a run says of itself."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    free = Settings.of(parse_config(_words(case, seed))).free
    entries = read_metrics(run / "metrics.jsonl")
    rates = [entry["images_per_sec"] for entry in entries if "images_per_sec" in entry]
    return {
        "table": case.table, "case": case.case, "control": case.control, "seed": seed, "options": case.options,
        "settings": {name: value for name, value in config["config"].items() if name not in free},
        "fingerprint": config["data"]["fingerprint"], "steps": entries[-1]["step"], "k": case.k,
        "labelled": case.labelled,
        "images_per_sec": round(statistics.median(rates), 1),
        "knn": {entry["step"]: entry["knn_top1"] for entry in entries if "knn_top1" in entry},
    }  # fmt: skip


def benchmark(case: ProofCase) -> int:
    found = [figures for seed in case.seeds if (figures := measured(case, seed))]
    line: dict[str, Any] = {"case": case.case, "seeds": [figures["seed"] for figures in found]}
    for name in LEARNT if found else ():
        values = [figures[name] for figures in found]
        line |= {name: round(statistics.fmean(values), 2)}
        line |= {f"{name}_std": round(statistics.stdev(values), 2)} if len(values) > 1 else {}
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: benchmark(parse(ProofCase, sys.argv[1:]))))
