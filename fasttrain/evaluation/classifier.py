"""A linear head on an encoder, and the optimizer that trains it by a recipe."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fasttrain.engine.optim import MOMENTUM
from fasttrain.evaluation.recipes import Supervised
from fasttrain.networks.batch_norm import convert_batch_norm, is_split
from fasttrain.networks.class_tokens import dino_features
from fasttrain.networks.encoders import feature_width


class Classifier(nn.Module):
    """(N, 3, S, S) → logits (N, C). A frozen encoder takes no gradient and stays in evaluation mode.

    One that is trained takes batch norm's statistics over the whole batch, so that these do not depend on the number of
    ranks. about: what the head sees, in words.
    """

    def __init__(self, encoder: nn.Module, recipe: Supervised, size: int, classes: int, seed: int) -> None:
        """encoder: (N, 3, size, size) → (N, F) with plain batch norm; a copy is taken. seed: of the head's weights."""
        super().__init__()
        if is_split(encoder) and not recipe.frozen:
            raise ValueError("an encoder that is trained here needs plain batch norm")
        encoder = copy.deepcopy(encoder).cpu().requires_grad_(not recipe.frozen)
        width, self.about = feature_width(encoder, "", size), "encoder output"
        if recipe.features == "dino":
            encoder, self.about = dino_features(encoder, width)
            width = feature_width(encoder, "", size)
        self.encoder = encoder if recipe.frozen else convert_batch_norm(encoder, "sync")
        self.head = nn.utils.skip_init(nn.Linear, width, classes)  # which would draw from torch's own random state
        self._frozen = recipe.frozen
        self._initialise(recipe, seed)
        self.train()

    @torch.no_grad()
    def _initialise(self, recipe: Supervised, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        if recipe.head_init == "normal":
            self.head.weight.normal_(std=0.01, generator=generator)
            self.head.bias.zero_()
            return
        bound = self.head.in_features**-0.5
        for parameter in (self.head.weight, self.head.bias):
            parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            features_NF = self.encoder(x)
        return self.head(features_NF)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self._frozen:
            self.encoder.eval()
        return self


def make_optimizer(classifier: Classifier, recipe: Supervised) -> torch.optim.Optimizer:
    """Each group of parameters has its "peak_lr", for set_rates."""
    peaks = {classifier.encoder: recipe.encoder_lr, classifier.head: recipe.head_lr}
    groups = []
    for network, peak in peaks.items():
        for vectors in (False, True):
            chosen = [p for p in network.parameters() if p.requires_grad and (p.dim() <= 1) == vectors]
            if chosen:
                spared = vectors and recipe.optimizer == "adamw"
                decay = 0.0 if spared else recipe.weight_decay
                groups.append({"params": chosen, "weight_decay": decay, "peak_lr": recipe.peak(peak or 0.0)})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=MOMENTUM, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
