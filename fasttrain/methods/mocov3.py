"""MoCo v3 (arXiv 2104.02057): predictions against the momentum network's keys of the other view, those of the batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.batch import batch_info_nce
from fasttrain.losses.regularisers import BatchRegularisers, averaged, regularised
from fasttrain.methods.base import Method, MethodOptions, Output, Progress, Sample
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.networks.momentum import cosine_momentum, ema_update, momentum_copy
from fasttrain.networks.vision_transformer import freeze_patches, patch_projection
from fasttrain.system.collectives import first_row, gather_rows
from fasttrain.system.options import Momentum, Positive
from fasttrain.views.spec import RECIPES, Recipe

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/mocov3.yaml; there is none for STL-10, which takes the same
IMAGENET100 = {"trust": 0.02, "trust_clip": True, "temperature": 0.2, "recipe": "byol"}


@dataclass(frozen=True)
class MoCoV3Options(MethodOptions):
    """MoCo v3 (arXiv 2104.02057): InfoNCE of each view's prediction against a momentum network's keys of the other, the
    batch's other images as negatives. The defaults are those of the paper's 300 epochs."""

    views: ClassVar[Recipe] = RECIPES["mocov3"]
    over_batch: ClassVar[bool] = True
    # facebookresearch/moco-v3: CONFIG.md and main_moco.py, which for 100 epochs have --lr 0.6, and for 1000
    # --weight-decay 1.5e-6 and --ema 0.996
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 4096, "epochs": 300, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6,
        "warmup_epochs": 10,
    }  # fmt: skip
    paper_vit: ClassVar = {
        "optimizer": "adamw", "lr": 1.5e-4, "weight_decay": 0.1, "decay": "all", "warmup_epochs": 40,
        "temperature": 0.2, "crop_scale": (0.08, 1.0), "vit_heads": 12,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # vturrisi/solo-learn: scripts/pretrain/cifar/mocov3.yaml
        "cifar10": {**IMAGENET100, "batch_size": 256, "epochs": 1000, "recipe": "cifar-asymmetric"},
        "demo": {
            "optimizer": "sgd", "lr": 0.25, "weight_decay": 5e-4, "epochs": 12, "warmup_epochs": 1, "temperature": 0.2,
            "ema": 0.9, "hidden": 512, "predictor_hidden": 512,
        },
    }  # fmt: skip

    dim: Positive[int] = 256
    """Width of queries and keys."""
    hidden: Positive[int] = 4096
    """Width of the projector's hidden layers: one, and two for a vision transformer."""
    predictor_hidden: Positive[int] = 4096
    """Width of the predictor's hidden layer."""
    ema: Momentum[float] = 0.99
    """Momentum of the momentum network at the start; it rises to 1."""
    temperature: Positive[float] = 1.0
    """Temperature of InfoNCE."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> MoCoV3:
        return MoCoV3(encoder, width, self)


class MoCoV3(Method):
    """InfoNCE of both directions, times 2τ, and the regularisers that are on.

    A vision transformer has deeper heads, and its patch projection stays as it was drawn (section 4.2).
    """

    def __init__(self, encoder: nn.Module, width: int, options: MoCoV3Options) -> None:
        super().__init__()
        zero_init_residual(encoder)
        freeze_patches(encoder)
        deeper = patch_projection(encoder) is not None
        self.encoder = encoder
        self.projector = batch_norm_mlp(width, (options.hidden,) * (2 if deeper else 1), options.dim, "norm")
        self.predictor = batch_norm_mlp(
            options.dim, (options.predictor_hidden,), options.dim, "norm" if deeper else "linear"
        )
        self.momentum_encoder = momentum_copy(self.encoder)
        self.momentum_projector = momentum_copy(self.projector)
        self._options = options

    def forward(self, sample: Sample) -> Output:
        first, second = sample.views[0]
        k_2MD = [self._keys(view) for view in (second, first)]
        q_2ND = [self._queries(view) for view in (first, second)]
        with torch.autocast(first.device.type, enabled=False):
            return Output(*self.loss(q_2ND, k_2MD))

    def loss(self, q_2ND: list[Tensor], k_2MD: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, from this rank's queries of each view and all ranks' keys of the other.

        Both directions are summed up, as in the paper's algorithm 1: twice their mean.
        """
        temperature, directions = self._options.temperature, []
        for q_ND, k_MD in zip(q_2ND, k_2MD, strict=True):
            k_ND = k_MD[first_row(len(q_ND)) :][: len(q_ND)]
            contrast = 2 * (2 * temperature) * batch_info_nce(q_ND, k_MD, temperature)
            directions.append(regularised(contrast, self._options.regularisers, q_ND, k_ND, k_MD, None))
        return averaged(directions)

    def _queries(self, view: Tensor) -> Tensor:
        """Queries (N, D) of this rank's view (N, 3, S, S)."""
        return F.normalize(self.predictor(self.projector(self.encoder(view))).float(), dim=1)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Keys (M, D) of all ranks' images from this rank's view (N, 3, S, S)."""
        return gather_rows(F.normalize(self.momentum_projector(self.momentum_encoder(view)).float(), dim=1))

    @torch.no_grad()
    def update(self, good: Tensor, progress: Progress, carry: tuple[Tensor, ...]) -> None:
        """Move the momentum network."""
        momentum = cosine_momentum(self._options.ema, progress.part)
        ema_update(self.momentum_encoder, self.encoder, momentum, good)
        ema_update(self.momentum_projector, self.projector, momentum, good)
