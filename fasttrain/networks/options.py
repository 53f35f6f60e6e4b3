"""The options of the encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fasttrain.networks.groups import GROUPS
from fasttrain.system.options import Fraction, Free, NotNegative, Options, Positive, With

WIDTHS = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768}  # by --arch
TIMM = "timm:"
RESNETS = "resnet", "resnext", "wide_resnet", "seresnet"
VISION_TRANSFORMERS = "vit_", "deit", "beit", "eva", "flexivit_"  # how torchvision's and timm's names begin


@dataclass(frozen=True)
class VisionTransformerOptions(Options):
    """Vision transformers, of --arch vit_tiny, vit_small and vit_base."""

    vit_heads: NotNegative[int] = 0
    """Attention heads. 0: one for 64 of the width; MoCo v3's vit_small has 12."""
    vit_positions: Annotated[Literal["fixed", "learned"], With("arch", tuple(WIDTHS))] = "fixed"
    """fixed: sines and cosines (MoCo v3); learned: parameters, interpolated for views of other sizes (DINO)."""


@dataclass(frozen=True)
class EncoderOptions(Options):
    """The network that is trained."""

    arch: str = "resnet50"
    """'small' (ours, trains well on two CPU cores), vit_tiny, vit_small or vit_base (MoCo v3's and DINO's vision
    transformers), any torchvision classification model's name, timm:NAME of the package timm, or
    package.module:function of your own, which gives a module of features (N, F)."""
    cifar_stem: bool = False
    """For ResNets: 3x3 stride-1 first convolution and no max-pool, for images of about 32 px."""
    patch_size: NotNegative[int] = 0
    """Side of a patch in pixels, of ours and of timm's encoders that take one. 0: the encoder's own; ours by --size, 4
    up to 32 px, 8 up to 64 px, 16 above."""
    drop_path: Fraction[float | None] = None
    """Stochastic depth: the chance, in training, that an image skips an encoder's last residual branch; that of earlier
    ones is less. Momentum encoders skip none. None: the encoder's own, which is mostly 0."""
    init: str = ""
    """Weights that the encoder, not its heads or queue, starts from: a file (MoCo, DINO, SwAV, …), a run or its
    checkpoint, torchvision's (IMAGENET1K_V2, DEFAULT), or timm:NAME. Empty: random ones."""
    init_partial: Annotated[Free[bool], With("init")] = False
    """Take what fits of --init where not all of the encoder's weights are there; the others are random."""
    batch_norm: Literal["split", "sync", "machine", "plain"] = "split"
    """split: statistics over groups of images; methods with a queue of keys shuffle these between them, so that a query
    can't tell its key by them. sync: over the images of all processes; machine: over those of a machine's processes,
    which on many machines saves a tenth of a step or more; plain: over those of each process."""
    batch_norm_groups: Annotated[Positive[int], With("batch_norm", ("split",))] = GROUPS
    """Groups of --batch-norm split that each micro-batch is cut into, over all processes: as many as the GPUs of MoCo's
    recipes."""
    vit: VisionTransformerOptions = field(default_factory=VisionTransformerOptions)
    """Vision transformers"""


def is_vision_transformer(arch: str) -> bool:
    """Whether an architecture of that name is one, for what a method's paper sets differently there."""
    return not is_outside(arch) and arch.removeprefix(TIMM).startswith(VISION_TRANSFORMERS)


def may_have_cifar_stem(arch: str) -> bool:
    """Whether a preset's --cifar-stem is kept for an architecture of that name: not where it can't be meant."""
    return arch.removeprefix(TIMM).startswith(RESNETS)


def is_outside(arch: str) -> bool:
    """Whether it is code of one's own that makes an architecture of that name."""
    return ":" in arch and not arch.startswith(TIMM)
