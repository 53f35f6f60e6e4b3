"""Similarities of rows to a queue or to each other, without a matrix of them all: what the contrastive losses rest on.

`readout` is for a queue of keys without gradient, `log_sum_exp` for keys that take one, `nearest` a look-up. The first
two also come `_with_maximum`: each row's largest similarity, of the same pass. Each takes `impl`: "reference" is plain
torch as the formula reads; "auto" is the best version for the tensors given. The losses themselves are in
fasttrain/losses.
"""

from fasttrain.kernels.similarity.nearest import nearest
from fasttrain.kernels.similarity.readout import (
    log_sum_exp,
    log_sum_exp_with_maximum,
    readout,
    readout_with_maximum,
)
from fasttrain.kernels.similarity.versions import IMPLEMENTATIONS

__all__ = [
    "IMPLEMENTATIONS", "log_sum_exp", "log_sum_exp_with_maximum", "nearest", "readout", "readout_with_maximum",
]  # fmt: skip
