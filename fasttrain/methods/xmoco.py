"""XMoCo (arXiv 2206.04676): MoCo with cross-similarity consistency and uniform-similarity regularisation.

L = L_InfoNCE + λ_x · L_cross + λ_u · L_uniform; the equations are in docs/objective.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fasttrain.losses.regularisers import Regularisers
from fasttrain.methods.moco import MoCoOptions


@dataclass(frozen=True)
class XMoCoOptions(MoCoOptions):
    """XMoCo: MoCo v2 with cross-similarity consistency and uniform-similarity regularisation."""

    regularisers: Regularisers = field(default_factory=lambda: Regularisers(cross="batch", uniform="batch"))
    """XMoCo's regularisers"""
