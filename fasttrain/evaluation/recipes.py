"""The recipes by which published protocols train a classifier on labelled images: what a figure of one means, exactly.

Each is as in the code that its paper published; what may differ, such as the batch of a small set, is in what
`described` prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from fasttrain.networks.options import is_vision_transformer
from fasttrain.system.errors import UserError

BASE_BATCH = 256  # images, for which learning rates are given
CROP_SCALE = 0.08, 1.0  # area of the random crop, in all of these protocols
Schedule = Literal["milestones", "cosine", "cosine by epoch"]
OverImages = Literal["linear_moco", "linear_dino", "finetune", "semi"]  # the protocols


@dataclass(frozen=True)
class Supervised:
    """How a linear classifier, the head, is trained on an encoder's features of random crops and flips.

    protocol: what messages call it. head_lr, encoder_lr: peak learning rates, for BASE_BATCH images where `scaled`;
    encoder_lr None: the encoder is frozen, in evaluation mode. sgd has a momentum of 0.9; adamw leaves vectors without
    weight decay. schedule: ×gamma at each of the `milestones` (epochs), or half a cosine down to 0. head_init: normal,
    N(0, 0.01) and bias 0, or uniform, ±1/√F, torch's own. features: the encoder's output, or what DINO's linear
    classifier reads (see networks/class_tokens.py).
    """

    protocol: str
    epochs: int
    head_lr: float
    encoder_lr: float | None = None
    scaled: bool = False
    batch_size: int = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    warmup_epochs: int = 0
    schedule: Schedule = "milestones"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    head_init: Literal["normal", "uniform"] = "normal"
    features: Literal["output", "dino"] = "output"

    @property
    def frozen(self) -> bool:
        return self.encoder_lr is None

    def factor(self, progress: float) -> float:
        """What peak learning rates are multiplied by after `progress` epochs."""
        if progress < self.warmup_epochs:
            return progress / self.warmup_epochs
        if self.schedule == "milestones":
            return self.gamma ** sum(progress >= milestone for milestone in self.milestones)
        place = math.floor(progress) if self.schedule == "cosine by epoch" else progress
        return 0.5 * (1 + math.cos(math.pi * (place - self.warmup_epochs) / (self.epochs - self.warmup_epochs)))

    def peak(self, lr: float) -> float:
        """A learning rate for this batch."""
        return lr * self.batch_size / BASE_BATCH if self.scaled else lr


# facebookresearch/moco, main_lincls.py (He et al., arXiv 1911.05722): the rate does not follow the batch
LINEAR_MOCO = Supervised("linear_moco", epochs=100, head_lr=30.0, milestones=(60, 80))
# facebookresearch/dino, eval_linear.py (Caron et al., arXiv 2104.14294)
LINEAR_DINO = Supervised(
    "linear_dino", epochs=100, head_lr=0.001, scaled=True, schedule="cosine by epoch", features="dino"
)
# lightly-ai/lightly, benchmarks/imagenet/resnet50/finetune_eval.py (after SimCLR, arXiv 2002.05709)
FINETUNE = Supervised(
    "finetune", epochs=30, head_lr=0.05, encoder_lr=0.05, scaled=True, schedule="cosine", head_init="uniform"
)
# The optimizer and its rates are DeiT's (Touvron et al., arXiv 2012.12877: AdamW, 5e-4 for 512 images, warm-up of 5
# epochs), with which DINO and MoCo v3 fine-tune; its augmentation, mixing and 300 epochs are not, but those above.
FINETUNE_VIT = replace(
    FINETUNE, optimizer="adamw", head_lr=2.5e-4, encoder_lr=2.5e-4, weight_decay=0.05, warmup_epochs=5
)
# facebookresearch/swav, eval_semisup.py and README (Caron et al., arXiv 2006.09882): 10 % and 1 % of the labels
SEMI_TENTH = Supervised(
    "semi", epochs=20, head_lr=0.2, encoder_lr=0.01, milestones=(12, 16), gamma=0.2, head_init="uniform"
)
SEMI_HUNDREDTH = replace(SEMI_TENTH, head_lr=5.0, encoder_lr=0.02)
BETWEEN = 0.1**1.5  # of these two, by ratio: which recipe another fraction takes


def recipe(
    protocol: OverImages, arch: str, images: int, fraction: float = 1.0, epochs: int = 0, batch_size: int = 0
) -> Supervised:
    """A protocol's recipe for so many training images of an encoder, `--arch`.

    fraction: of the labels, in semi. epochs, batch_size: other ones than the recipe's, 0: its own; milestones and
    warm-up keep their share of the epochs. A set of fewer images than a batch has batches of the largest power of two
    in it. Raises UserError for fewer than two images, of the set or of a batch.
    """
    if images < 2 or batch_size == 1:
        raise UserError(f"{protocol} needs two images at least to train on, and in a batch")
    finetune = FINETUNE_VIT if is_vision_transformer(arch) else FINETUNE
    semi = SEMI_HUNDREDTH if fraction < BETWEEN else SEMI_TENTH
    by_name = {"linear_moco": LINEAR_MOCO, "linear_dino": LINEAR_DINO, "finetune": finetune, "semi": semi}
    found = by_name[protocol]
    if epochs:
        share = epochs / found.epochs
        milestones = tuple(round(share * milestone) for milestone in found.milestones)
        warmup_epochs = math.floor(share * found.warmup_epochs)
        found = replace(found, epochs=epochs, milestones=milestones, warmup_epochs=warmup_epochs)
    batch_size = batch_size or found.batch_size
    return replace(found, batch_size=batch_size if batch_size <= images else 1 << (images.bit_length() - 1))


def described(recipe: Supervised, features: str, device: str) -> dict[str, Any]:
    """A recipe as it is printed with its figures, of values that JSON has. features: what the head sees, in words.
    device: its type."""
    rates = {"lr": recipe.peak(recipe.head_lr)}
    if recipe.encoder_lr is not None:
        rates = {"lr": recipe.peak(recipe.encoder_lr), "head_lr": recipe.peak(recipe.head_lr)}
    if recipe.schedule == "milestones":
        schedule = f"×{recipe.gamma:g} at epochs {', '.join(map(str, recipe.milestones))}"
    else:
        warmup = f", {recipe.warmup_epochs} epochs of warm-up" if recipe.warmup_epochs else ""
        schedule = f"{recipe.schedule}{warmup}"
    return {
        "epochs": recipe.epochs, "batch_size": recipe.batch_size,
        "optimizer": {"sgd": "SGD, momentum 0.9", "adamw": "AdamW"}[recipe.optimizer], **rates, "schedule": schedule,
        "weight_decay": recipe.weight_decay, "views": "random crops of 0.08 to 1 of the area, flips",
        "encoder": "frozen" if recipe.frozen else "trained, batch norm over all processes", "features": features,
        "head_init": {"normal": "normal, 0.01", "uniform": "uniform, 1/sqrt(features)"}[recipe.head_init],
        "precision": precision(recipe, device),
    }  # fmt: skip


def precision(recipe: Supervised, device: str) -> Literal["fp32", "bf16"]:
    """Frozen features are fp32; an encoder that is trained runs in bf16 on a GPU."""
    return "bf16" if device == "cuda" and not recipe.frozen else "fp32"
