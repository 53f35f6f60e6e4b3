"""CO2 (arXiv 2010.02217): MoCo with consistency of similarities to the queue, both ways.

L = L_InfoNCE + α · ½ [KL(P‖R) + KL(R‖P)], P and R the softmax over the queue of the key and of the query.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fasttrain.losses.options import Regularisers
from fasttrain.methods.options.moco import MoCoOptions

# Weight and temperature are the defaults of lightly's CO2Regularizer. The paper's own were not at hand, and are not
# confirmed to be these.
_BOTH = Regularisers(cross="queue-both", cross_weight=1.0, cross_temperature=0.05)


@dataclass(frozen=True)
class CO2Options(MoCoOptions):
    """CO2 (arXiv 2010.02217): MoCo v2 whose queries and keys are to agree on how similar they are to the queue. It is
    moco with --cross queue-both; that weight and temperature are lightly's, the paper's own are not confirmed."""

    regularisers: Regularisers = field(default_factory=lambda: _BOTH)
    """CO2's consistency, as one of XMoCo's regularisers"""
