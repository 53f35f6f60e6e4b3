"""Linear probe: a linear classifier on frozen features, whose settings are chosen on a part of train, never on val."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fasttrain.evaluation.features import Features
from fasttrain.evaluation.lbfgs_probe import lbfgs_probe
from fasttrain.evaluation.ranking import Sharing
from fasttrain.evaluation.sgd_probe import sgd_probe


def linear_probe(
    memory: Features, queries: Features, num_classes: int, device: torch.device, ranks: Sharing,
    solver: Literal["sgd", "lbfgs"] = "sgd",
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Rank the queries' classes, see evaluation/accuracy.py, by a classifier fitted to `memory`; with the settings.

    A class that `memory` lacks is never among them. All ranks return the same.
    """
    probe = sgd_probe if solver == "sgd" else lbfgs_probe
    return probe(memory, queries, num_classes, device, ranks)
