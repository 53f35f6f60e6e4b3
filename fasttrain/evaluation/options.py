"""The options of evaluations."""

from __future__ import annotations

TEMPERATURE = 0.1  # of the votes of kNN's neighbours: Wu et al.'s, for ImageNet
