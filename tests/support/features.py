"""Features that were not extracted from images."""

from typing import cast

import numpy as np
import torch

from fasttrain.evaluation.features import Features


def in_memory(values_NF: np.ndarray, label_N: np.ndarray) -> Features:
    """Features of these values and labels."""
    return Features(cast("np.memmap", values_NF.astype(np.float16)), torch.from_numpy(label_N.astype(np.int64)))
