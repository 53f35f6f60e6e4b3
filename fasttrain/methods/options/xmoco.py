"""XMoCo (arXiv 2206.04676): MoCo with cross-similarity consistency and uniform-similarity regularisation.

L = L_InfoNCE + λ_x · L_cross + λ_u · L_uniform; the equations are in docs/objective.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fasttrain.losses.options import Regularisers
from fasttrain.methods.options.moco import MoCoOptions


@dataclass(frozen=True)
class XMoCoOptions(MoCoOptions):
    """XMoCo (arXiv 2206.04676), in this project's reading: MoCo v2 whose similarities between images shall stay the
    same when their views are exchanged, and be uniform over negatives. See docs/objective.md for the equations."""

    regularisers: Regularisers = field(default_factory=lambda: Regularisers(cross="batch", uniform="batch"))
    """XMoCo's regularisers"""
