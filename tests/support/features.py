"""Features that were not extracted from images."""

import numpy as np
import torch

from fasttrain.evaluation.features import Features


def in_memory(values_NF: np.ndarray, label_N: np.ndarray) -> Features:
    """Features of these values and labels."""
    return Features(values_NF.astype(np.float32), torch.from_numpy(label_N.astype(np.int64)), np.arange(len(label_N)))


def drawn(count: int, classes: int, seed: int, noise: float = 1.5, width: int = 12) -> Features:
    """Clusters that overlap, one for each class."""
    generator = np.random.default_rng(seed)
    label_N = generator.integers(0, classes, count)
    return in_memory(np.eye(classes, width)[label_N] + noise * generator.standard_normal((count, width)), label_N)
