"""Run folders as training and evaluation leave them, without the work."""

import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from fasttrain.config import make_config
from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.system.options import Settings

BATCH, PER_EPOCH = 128, 20


def make_run(run: pathlib.Path, steps: int = 400, every: int = 10, seed: int = 0, **values: Any) -> pathlib.Path:
    """A run of so many steps with an entry every so many. values: options that differ from the preset's."""
    run.mkdir(parents=True)
    config = make_config("xmoco", "demo", **{"data": "/images", "batch_size": BATCH, "run": str(run), **values})
    record = {
        "format": 2, "config": Settings.of(config).values,
        "environment": {"fasttrain": "1", "machine": "x, 2 cores, CPU"},
        "data": {"path": "/images", "fingerprint": "f" * 64, "mean": [0.5] * 3, "std": [0.2] * 3},
        "starts": [start(0), start(steps // 2)],
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(record), "utf-8")
    drawn = np.random.default_rng(seed)
    entries = [entry(step, steps, drawn) for step in range(every, steps + 1, every)]
    measured = range(steps // 8, steps + 1, steps // 8)
    events = [made(step, steps) for step in measured for made in (event, scores)]
    write_metrics(run, sorted([*entries, *events], key=lambda each: each["step"]))
    Image.new("RGB", (60, 40), (90, 120, 150)).save(run / "samples.png")
    return run


def start(step: int) -> dict[str, Any]:
    """As config.json tells of one."""
    return {
        "step": step, "time": "2030-01-02 03:04:05+0000", "processes": 2, "cores": 4, "commit": "0123456789ab-dirty",
        "command": "fasttrain/train.py --preset demo --data /images", "shuffle": "block, 64 shards at once",
    }  # fmt: skip


def entry(step: int, steps: int, drawn: np.random.Generator) -> dict[str, Any]:
    """Of training: the loss is the contrast alone, and skips steps once."""
    part = step / steps
    contrast = 6 - 2 * part + float(drawn.normal(0, 0.05))
    return {
        "step": step, "epoch": (step - 1) // PER_EPOCH, "loss": contrast, "contrast": contrast,
        "cross": 0.1 * math.exp(-part),
        "contrastive_accuracy": part, "positive_similarity": 0.3 + 0.5 * part, "negative_similarity": 0.1 - 0.1 * part,
        "queue_filled": min(1.0, 4 * part),
        "lr": 0.06 * (1 + math.cos(math.pi * part)), "images_per_sec": 800.0 + step % 7,
        "rss_gib": 1.5, "replaced": 0, "data_wait": 0.3, "transfer_wait": 0.0, "views_time": 0.1,
        "skipped": 3 if part > 0.6 else 0,
    }  # fmt: skip


def event(step: int, steps: int) -> dict[str, Any]:
    """Of what is measured while training."""
    part = step / steps
    return {
        "step": step, "epoch": (step - 1) // PER_EPOCH, "knn_top1": 30 + 40 * part, "knn_majority": 10.0,
        "probe_top1": 20 + 40 * part, "rankme": 10 + 30 * part, "effective_rank": 8 + 20 * part,
        "std": 0.05 + 0.03 * part,
        "alignment": 1 - part / 2, "uniformity": -1 - part, "alpha_req": 2 - part, "lidar": 5 + 20 * part,
        "compactness": 0.2 + part / 2, "compactness_low": part / 2 - 0.1,
    }  # fmt: skip


def scores(step: int, steps: int) -> dict[str, Any]:
    """Distributions of the similarities, as they are measured while training."""
    part = step / steps
    return {
        "step": step, "epoch": (step - 1) // PER_EPOCH, "histogram_positive": counts(0.2 + 0.5 * part),
        "histogram_negative": counts(0.1),
    }  # fmt: skip


def counts(mean: float) -> list[int]:
    """Of similarities around a mean, in 64 bins over [-1, 1]."""
    centre_N = (np.arange(64) + 0.5) / 32 - 1
    return [int(value) for value in 1000 * np.exp(-(((centre_N - mean) / 0.15) ** 2))]


def write_metrics(run: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in entries), "utf-8")


def evaluated(run: pathlib.Path, top1: float = 70.0, step: int = 400, protocol: str = "knn", **values: Any) -> None:
    """Keep an accuracy with its interval, and that of untrained weights. values: other fields of Evaluation."""
    fields = {"step": step, "settings": {"k": 20}, "data": "/images", "fingerprint": "e", "num_images": 500,
              "majority": 10.0, **values}  # fmt: skip
    trained = Evaluation(
        protocol, untrained=False, top1=top1, top5=95.0, balanced=top1 - 1, low=top1 - 4, high=top1 + 4, **fields
    )
    keep_evaluations(run, [trained, Evaluation(protocol, untrained=True, top1=25.0, **fields)])


def ended(run: pathlib.Path, state: str, line: str) -> None:
    """Write how it ended."""
    record = {"state": state, "line": line, "step": 400, "time": "2030-01-02 04:04:05+0000"}
    (run / "ending.json").write_text(json.dumps(record), "utf-8")
