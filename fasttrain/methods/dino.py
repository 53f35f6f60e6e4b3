"""DINO (arXiv 2104.14294): every view predicts what an average of the network itself says of another view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.distillation import move_centre, teacher_probabilities, warmed_up
from fasttrain.losses.multi_crop import crop_cross_entropy, cross_entropy_terms
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.networks.heads import gelu_mlp
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.networks.multi_crop import encode_crops
from fasttrain.networks.prototypes import WeightNormLinear
from fasttrain.system.collectives import sum_over_ranks, world_size
from fasttrain.system.options import Momentum, NotNegative, Positive, Several
from fasttrain.views.spec import RECIPES, Recipe

TEACHER_START = 0.04  # its temperature, where that warms up


@dataclass(frozen=True)
class DINOOptions(MethodOptions):
    """DINO (arXiv 2104.14294): all views of an image, small crops among them, predict the probabilities that a momentum
    encoder gives to the views of full size. That encoder, the teacher, is what is evaluated."""

    views: ClassVar[Recipe] = RECIPES["dino"]
    # main_dino.py of facebookresearch/dino, and its README's command for ResNet-50
    paper: ClassVar = {
        "batch_size": 1024, "epochs": 100, "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "decay": "matrices",
        "warmup_epochs": 10.0, "batch_norm": "sync",
    }  # fmt: skip
    # The paper's section "Implementation details"; the learning rate ends at 1e-6.
    paper_vit: ClassVar = {
        "recipe": "dino-vit", "optimizer": "adamw", "lr": 5e-4, "final_lr": 5e-4, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "vit_positions": "learned", "drop_path": 0.1,
    }  # fmt: skip
    # scripts/pretrain/imagenet-100/dino.yaml and cifar/dino.yaml of vturrisi/solo-learn; it has none for STL-10
    _solo: ClassVar = {
        "batch_size": 256, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6, "trust": 0.02, "trust_clip": True,
        "prototypes": 4096, "ema": 0.9995, "teacher_temperature": 0.07, "clip_each": 0.0,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": {**_solo, "recipe": "byol", "teacher_warmup_epochs": 50.0},
        "stl10": {**_solo, "recipe": "byol", "teacher_warmup_epochs": 50.0},
        "cifar10": {**_solo, "recipe": "cifar-asymmetric", "epochs": 1000},
        # Without batch norm in the head so short a run ends where all images have the same probabilities
        "demo": {
            "epochs": 20, "lr": 0.2, "weight_decay": 5e-4, "warmup_epochs": 1.0, "dim": 64, "hidden": 512,
            "head_norm": True, "prototypes": 512, "ema": 0.97, "freeze_epochs": 5.0,
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of embeddings and prototypes."""
    hidden: Positive[int] = 2048
    """Width of the projection head's two hidden layers."""
    head_norm: bool = False
    """Batch norm in the projection head: faster at first, for small data and short runs."""
    prototypes: Several[int] = 65536
    """Width of the probabilities."""
    ema: Momentum[float] = 0.996
    """Momentum of the teacher at first; it rises to 1. 0.9995 for batches of 256."""
    temperature: Positive[float] = 0.1
    """Temperature of the predictions."""
    teacher_temperature: Positive[float] = 0.04
    """Temperature of the teacher; 0.07 with a warm-up for longer training."""
    teacher_warmup_epochs: NotNegative[float] = 0.0
    """Epochs in which the teacher's temperature goes there from 0.04; 30 in the paper."""
    freeze_epochs: NotNegative[float] = 1.0
    """Epochs at first in which prototypes do not move."""
    clip_each: NotNegative[float] = 3.0
    """Gradients of a parameter of a larger norm are scaled down to this, each by itself. 0: never."""

    def build(self, encoder: nn.Module, width: int) -> DINO:
        return DINO(encoder, width, self)


class DINO(Method):
    """Self-distillation over views of any number of sizes. Linear layers of prototypes are apart from the projectors,
    whose output is what is evaluated."""

    def __init__(self, encoder: nn.Module, width: int, options: DINOOptions) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = gelu_mlp(width, [options.hidden] * 2, options.dim, options.head_norm)
        self.prototypes = WeightNormLinear(options.dim, options.prototypes)
        self.momentum_encoder = momentum_copy(self.encoder)
        self.momentum_projector = momentum_copy(self.projector)
        self.momentum_prototypes = momentum_copy(self.prototypes)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(options.prototypes))
        self._options = options

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """The teacher's."""
        return self.momentum_encoder, self.momentum_projector

    def forward(self, sample: Sample) -> Output:
        target_ANP, mean_P = self._teacher(sample.views[0], sample.progress)
        out = self.projector(encode_crops(self.encoder, sample.views))
        x_VND = F.normalize(out.float(), dim=1).unflatten(0, (-1, target_ANP.shape[1]))
        # Not out of autocast: of the loss, it is for the products alone, which are wide.
        loss = crop_cross_entropy(x_VND, self.prototypes.rows(), target_ANP, self._options.temperature)
        return Output(loss, cross_entropy_terms(loss, target_ANP), (mean_P[None],))

    @torch.no_grad()
    def _teacher(self, views: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Its probabilities (A, N, P) for views of full size, and the mean of its logits (P,)."""
        options = self._options
        out = self.momentum_projector(encode_crops(self.momentum_encoder, [views]))
        x_AND = F.normalize(out.float(), dim=1).unflatten(0, views.shape[:2])
        temperature = warmed_up(
            TEACHER_START, options.teacher_temperature, progress.epoch, options.teacher_warmup_epochs
        )
        target_ANP = teacher_probabilities(self.momentum_prototypes(x_AND), self.centre, temperature)
        with torch.autocast(out.device.type, enabled=False):
            return target_ANP, self.momentum_prototypes(x_AND.mean((0, 1)))

    @torch.no_grad()
    def after_backward(self, progress: Progress) -> None:
        if self._options.clip_each:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            shares = torch.stack(torch._foreach_norm(gradients)).reciprocal() * self._options.clip_each
            torch._foreach_mul_(gradients, list(shares.clamp(max=1).unbind()))
        if progress.epoch < self._options.freeze_epochs:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the centre and the teacher."""
        move_centre(self.centre, sum_over_ranks(carry[0].mean(0)) / world_size(), good)
        momentum = cosine_momentum(self._options.ema, progress.part)
        ema_update(self.momentum_encoder, self.encoder, momentum, good)
        ema_update(self.momentum_projector, self.projector, momentum, good)
        ema_update(self.momentum_prototypes, self.prototypes, momentum, good)
