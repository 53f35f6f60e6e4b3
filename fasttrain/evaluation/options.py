"""The options of evaluations, by protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fasttrain.system.options import NotNegative, Options, Positive

TEMPERATURE = 0.1  # of the votes of kNN's neighbours: Wu et al.'s, for ImageNet


@dataclass(frozen=True)
class KnnOptions(Options):
    """Weighted k-nearest-neighbour classification."""

    knn: bool = False
    """Weighted k-nearest-neighbour classification."""
    k: NotNegative[tuple[int, ...]] = (0,)
    """Neighbours that vote; several: all in one pass, the first is the headline. 0: a sixth of the mean number of a
    class's images, as 200 is of ImageNet's."""
    temperature: Positive[tuple[float, ...]] = (TEMPERATURE,)
    """Temperature of their votes, exp(similarity / temperature); several as with --k."""


@dataclass(frozen=True)
class LinearOptions(Options):
    """A linear classifier on frozen features of images as they are."""

    linear: bool = False
    """Linear classifier on the frozen features, its strength chosen on a part of train."""
    solver: Literal["sgd", "lbfgs"] = "sgd"
    """sgd: softmax regression on standardised features, over a grid of learning rates; lbfgs: logistic regression over
    a grid of 45 regularisations, as the transfer results of SimCLR and DINOv2 have it."""


@dataclass(frozen=True)
class FewShotOptions(Options):
    """A classifier from a few images of each class."""

    shots: Positive[tuple[int, ...]] = ()
    """Classify by so many images of each class: 1 5 10, say."""
    draws: Positive[int] = 5
    """Times that these images are drawn anew."""
