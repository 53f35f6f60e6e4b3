"""Small methods and their steps, without a run around them."""

from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config import TrainConfig, make_config
from fasttrain.engine.networks import make_method
from fasttrain.engine.optim import Rates
from fasttrain.engine.step import TrainStep
from fasttrain.methods import Method, Sample
from fasttrain.methods.base import Progress
from fasttrain.system.options import flat
from fasttrain.views.spec import sides

SMALL = {
    "arch": "small", "size": 16, "queue_size": 40, "dim": 8, "hidden": 16, "predictor_hidden": 16, "prototypes": 12,
    "background": (0,), "batch_size": 8, "precision": "fp32",
}  # fmt: skip


# Options that change a step as much as another method would: by a name of their own
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # a queue that a step fills: until it is full, positives stay where they are, and all negatives weigh alike
    "moco, feature transform": ("moco", {"feature_transform": True, "queue_size": 16}),
    "moco, meow": ("moco", {"negatives": "meow", "queue_size": 16, "clusters": (2, 5)}),
    "moco, adameow": ("moco", {"negatives": "adameow"}),
    "moco, meow, feature transform": (
        "moco",
        {
            "negatives": "meow",
            "queue_size": 16,
            "clusters": (2, 5),
            "feature_transform": True,
            "cross": "queue",
        },
    ),
    "moco, foreground": ("moco", {"foreground": 1.0}),
    "moco, compactness": ("moco", {"compactness": 0.4}),
    "simclr, anchor": ("simclr", {"anchor": "a run"}),  # which training reads; here it is the encoder as it begins
    "simclr, communities": ("simclr", {"communities": 3}),
    "simclr, learnt augmentation": ("simclr", {"learnt_augmentation": 0.1}),
    "mv-dhel, compactness": ("mv-dhel", {"compactness": 0.4, "num_views": 3}),
}


def small(method: str = "moco", **changes: Any) -> TrainConfig:
    """A configuration whose networks take milliseconds; of SMALL, what the method has. method: or one of VARIANTS."""
    method, options = VARIANTS.get(method, (method, {}))
    changes = options | changes
    known = flat(make_config(method))
    return make_config(method, **{name: value for name, value in SMALL.items() if name in known} | changes)


def sample(count: int = 8, seed: int = 0, config: TrainConfig | None = None) -> Sample:
    """Views of random numbers of every image: two of 16 px, or those of a configuration, with labels of four classes
    where it needs them, in the middle of a run."""
    size_V, labels = (16, 16), None
    if config:
        size_V = sides(config.recipe, config.views.size)
        labels = torch.arange(count) % 4 if config.method.needs_labels else None
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for side in dict.fromkeys(size_V):
        values = torch.randn(count, size_V.count(side), 3, side, side, generator=generator)
        groups.append(values.permute(1, 0, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))
    return Sample(tuple(groups), labels, torch.arange(count), Progress(0.5))


def build(config: TrainConfig) -> Method:
    return make_method(config.method, config.encoder, config.views.size, config.run.seed)


def make(method: str = "moco", **changes: Any) -> tuple[Any, TrainStep]:
    """A method and its step on the CPU."""
    config = small(method, **changes)
    built = build(config)
    trainer = TrainStep(built, config.optimisation, torch.device("cpu"))
    if config.optimisation.precision == "fp16":
        trainer._scaler.load_state_dict({**trainer._scaler.state_dict(), "scale": 8.0})
    return built, trainer


def make_without_norm(**changes: Any) -> tuple[Any, TrainStep]:
    """A method whose images do not meet in a batch norm, so that cutting a batch changes nothing."""
    config: Any = small(**changes)
    torch.manual_seed(0)
    built = config.method.build(nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.ReLU()), 12)
    return built, TrainStep(built, config.optimisation, torch.device("cpu"))


def take(trainer: TrainStep, batch: Sample, number: int, lr: float) -> dict[str, Tensor]:
    """A whole step; returns its terms."""
    terms = trainer.forward_backward(batch)
    trainer.update(number, Rates(lr, lr, trainer.optimizer.param_groups[0].get("weight_decay", 0.0)))
    return terms
