"""The options of evaluations, by protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal

from fasttrain.system.errors import UserError
from fasttrain.system.options import Bounds, NotNegative, Options, Positive, With

TEMPERATURE = 0.1  # of the votes of kNN's neighbours: Wu et al.'s, for ImageNet


@dataclass(frozen=True)
class KnnOptions(Options):
    """Weighted k-nearest-neighbour classification."""

    knn: bool = False
    """Weighted k-nearest-neighbour classification."""
    k: Annotated[NotNegative[tuple[int, ...]], With("knn")] = (0,)
    """Neighbours that vote; several: all in one pass, the first is the headline. 0: a sixth of the mean number of a
    class's images, 5 to 200, or half of it where that is less than 5."""
    temperature: Annotated[Positive[tuple[float, ...]], With("knn")] = (TEMPERATURE,)
    """Temperature of their votes, exp(similarity / temperature); several as with --k."""


@dataclass(frozen=True)
class LinearOptions(Options):
    """A linear classifier on frozen features of images as they are."""

    linear: bool = False
    """Linear classifier on the frozen features, its strength chosen on a part of train."""
    solver: Annotated[Literal["sgd", "lbfgs"], With("linear")] = "sgd"
    """sgd: softmax regression on standardised features, over a grid of learning rates; lbfgs: logistic regression over
    a grid of 45 regularisations, as the transfer results of SimCLR and DINOv2 have it."""


@dataclass(frozen=True)
class FewShotOptions(Options):
    """A classifier from a few images of each class."""

    shots: Positive[tuple[int, ...]] = ()
    """Classify by so many images of each class: 1 5 10, say."""
    draws: Annotated[Positive[int], With("shots")] = 5
    """Times that these images are drawn anew."""


@dataclass(frozen=True)
class OverImagesOptions(Options):
    """Classifiers that are trained on crops and flips of images."""

    linear_moco: bool = False
    """MoCo's linear classifier: 100 epochs of SGD at a learning rate of 30 on the frozen encoder."""
    linear_dino: bool = False
    """DINO's: 100 epochs along a cosine; of a vision transformer, class tokens of several blocks."""
    finetune: bool = False
    """The whole network: 30 epochs of SGD along a cosine, or of AdamW for a vision transformer."""
    semi: Annotated[tuple[float, ...], Bounds(0, 1, low_open=True)] = ()
    """The same with a fraction of each class's labels, one image at least, drawn by a fixed seed: 0.01 0.1, say. 20
    epochs by SwAV's settings for a hundredth (below 3 %) or a tenth."""
    semi_files: tuple[str, ...] = ()
    """The same with the images that a text file names, one a line, as in SimCLR's lists of ImageNet."""
    supervised_epochs: NotNegative[int] = 0
    """Epochs instead of each protocol's own, which 0 is; milestones move with them. The settings printed say so."""
    supervised_batch_size: NotNegative[int] = 0
    """Images a step, over all processes, instead of the protocol's own, which 0 is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [*map(name_of_part, dict.fromkeys(self.semi)), *(PurePath(file).stem for file in self.semi_files)]
        if len(set(names)) < len(names):
            raise UserError("--semi and --semi-files name two parts alike, and their figures would be, too: rename one")


def name_of_part(fraction: float) -> str:
    """Of figures by so many of the labels."""
    return f"{100 * fraction:g}pct"
