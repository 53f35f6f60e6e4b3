"""DINO (arXiv 2104.14294): every view predicts what an average of the network itself says of another view."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.distillation import move_centre, teacher_probabilities, warmed_up
from fasttrain.losses.multi_crop import crop_cross_entropy, cross_entropy_terms
from fasttrain.methods.base import Method, Output, Progress, Sample
from fasttrain.methods.options.dino import DINOOptions
from fasttrain.networks.heads import gelu_mlp
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.networks.multi_crop import encode_crops
from fasttrain.networks.prototypes import WeightNormLinear
from fasttrain.system.collectives import sum_over_ranks, world_size

TEACHER_START = 0.04  # its temperature, where that warms up


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
        full = sample.views[0]
        with torch.no_grad():
            teacher_ANF = encode_crops(self.momentum_encoder, [full]).unflatten(0, full.shape[:2])
        target_ANP, mean_P = self._teacher(teacher_ANF, sample.progress)
        out = self.projector(encode_crops(self.encoder, sample.views))
        x_VND = F.normalize(out.float(), dim=1).unflatten(0, (-1, target_ANP.shape[1]))
        # Not out of autocast: of the loss, it is for the products alone, which are wide.
        loss = crop_cross_entropy(x_VND, self.prototypes.rows(), target_ANP, self._options.temperature)
        terms = cross_entropy_terms(loss, target_ANP)
        return Output(loss, terms, (mean_P[None],), teacher_ANF[0])

    @torch.no_grad()
    def _teacher(self, feature_ANF: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Its probabilities (A, N, P) from its encoder's output for views of full size, and its logits' mean (P,)."""
        options = self._options
        out = self.momentum_projector(feature_ANF.flatten(0, 1))
        x_AND = F.normalize(out.float(), dim=1).unflatten(0, feature_ANF.shape[:2])
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
