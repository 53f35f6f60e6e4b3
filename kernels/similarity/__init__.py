"""One pass over a queue of keys without a matrix of all similarities: what every loss over a queue rests on.

`readout` takes `impl`: "reference" is plain torch as the formula reads; "auto" is the best version for the tensors
given. The losses themselves are in fasttrain/losses.
"""

from fasttrain.kernels.similarity.readout import IMPLEMENTATIONS, readout

__all__ = ["IMPLEMENTATIONS", "readout"]
