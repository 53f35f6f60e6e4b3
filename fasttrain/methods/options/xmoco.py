"""XMoCo (arXiv 2206.04676): MoCo with cross-similarity consistency and uniform-similarity regularisation.

L = L_InfoNCE + λ_x · L_cross + λ_u · L_uniform; the equations are in docs/objective.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fasttrain.losses.options import Regularisers
from fasttrain.methods.options.moco import MoCoOptions

# Chosen by what each reading is worth: docs/proof.md
_READING = Regularisers(cross="batch-within", cross_features="encoder", cross_weight=64.0, uniform="batch")


@dataclass(frozen=True)
class XMoCoOptions(MoCoOptions):
    """XMoCo (arXiv 2206.04676), in this project's reading: MoCo v2 whose encoder keeps the similarities between images
    from view to view, and whose similarities to negatives are uniform. See docs/objective.md for the equations, and
    docs/proof.md for what the pieces are worth."""

    # At so large a learning rate the first steps push all images together without a warm-up
    presets: ClassVar = {**MoCoOptions.presets, "demo": {**MoCoOptions.presets["demo"], "warmup_epochs": 2.0}}

    regularisers: Regularisers = field(default_factory=lambda: _READING)
    """XMoCo's regularisers"""
