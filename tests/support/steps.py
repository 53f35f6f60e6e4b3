"""Small methods and their steps, without a run around them."""

from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config import TrainConfig, make_config
from fasttrain.engine.networks import make_method
from fasttrain.engine.step import TrainStep
from fasttrain.methods import Method, Sample
from fasttrain.methods.moco import MoCo

SMALL = {"arch": "small", "size": 16, "queue_size": 40, "dim": 8, "batch_size": 8, "precision": "fp32"}


def small(method: str = "moco", **changes: Any) -> TrainConfig:
    """A configuration whose networks take milliseconds."""
    return make_config(method, **{**SMALL, **changes})


def sample(count: int = 8, seed: int = 0) -> Sample:
    """Two views of 16 px of every image, of random numbers."""
    values = torch.randn(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Sample((values.permute(1, 0, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),), None, torch.arange(count))


def build(config: TrainConfig) -> Method:
    return make_method(config.method, config.encoder, config.views.size, config.run.seed)


def make(method: str = "moco", **changes: Any) -> tuple[Any, TrainStep]:
    """A method and its step on the CPU."""
    config = small(method, **changes)
    built = build(config)
    trainer = TrainStep(built, config.optimisation, torch.device("cpu"))
    if config.optimisation.precision == "fp16":
        trainer._scaler.load_state_dict({**trainer._scaler.state_dict(), "scale": 64.0})
    return built, trainer


def make_without_norm(**changes: Any) -> tuple[Any, TrainStep]:
    """A method whose images do not meet in a batch norm, so that cutting a batch changes nothing."""
    config: Any = small(**changes)
    torch.manual_seed(0)
    built = MoCo(nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.ReLU()), 12, config.method)
    return built, TrainStep(built, config.optimisation, torch.device("cpu"))


def take(trainer: TrainStep, batch: Sample, number: int, lr: float) -> dict[str, Tensor]:
    """A whole step; returns its terms."""
    terms = trainer.forward_backward(batch)
    trainer.update(number, lr, 0.0)
    return terms
