"""A run's figures in tests, written and shown as train.py has it."""

import pathlib

import torch
from rich.console import Console

from fasttrain.run.display import Display
from fasttrain.run.health import Health
from fasttrain.run.metrics import Metrics, MetricsFile

CPU = torch.device("cpu")


def make_metrics(
    run: pathlib.Path, every: int = 1, batch_size: int = 10, device: torch.device = CPU, last_step: int = 100
) -> Metrics:
    """A run's metrics from its first step on: to RUN/metrics.jsonl and to stderr."""
    health = Health(device, 1)
    display = Display(Console(stderr=True), 0, last_step, batch_size, health.hint)
    return Metrics((MetricsFile(run / "metrics.jsonl", 0), display), health, device, every, batch_size)
