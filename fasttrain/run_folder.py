"""The run folder: config.json, metrics.jsonl, checkpoints/, samples.png, evaluation.json, report.html."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import time

import torch

from fasttrain import __version__
from fasttrain.checkpoint import load_newest
from fasttrain.cli import UserError
from fasttrain.config import TrainConfig, as_dict, differences, load_config


def run_path(config: TrainConfig) -> pathlib.Path:
    return pathlib.Path(config.run or f"runs/{config.method}-{time.strftime('%Y%m%d-%H%M%S')}")


def prepare(run: pathlib.Path, config: TrainConfig) -> None:
    """Make the folder and its config.json, or see that an existing one was made with the same settings.

    --fresh moves an existing folder aside first. Raises UserError for other settings or a folder that is no run.
    """
    if config.fresh and run.exists():
        run.rename(_free_name(run))
    path = run / "config.json"
    if path.exists():
        changed = differences(as_dict(load_config(run)), config)
        if changed:
            raise UserError(f"{run} has other settings: {'; '.join(changed)}; use another --run, or --fresh")
        return
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run} exists and is not a run folder; choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    content = {"config": as_dict(config), "environment": environment()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _free_name(run: pathlib.Path) -> pathlib.Path:
    number = 1
    while (name := run.with_name(f"{run.name}.previous-{number}")).exists():
        number += 1
    return name


def environment() -> dict[str, str]:
    """Versions and machine, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "fasttrain": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
    }  # fmt: skip


def newest_state(run: pathlib.Path) -> dict | None:
    """The newest good checkpoint of a run, on the CPU; None where there is none."""
    return load_newest(run / "checkpoints")
