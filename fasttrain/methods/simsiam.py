"""SimSiam (arXiv 2011.10566): a prediction from one view of the same network's projection of the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttrain.losses.cosine import negative_cosine, spread
from fasttrain.losses.regularisers import BatchRegularisers, averaged, regularised
from fasttrain.methods.base import Method, MethodOptions, Output, Sample
from fasttrain.networks.encoders import zero_init_residual
from fasttrain.networks.heads import batch_norm_mlp
from fasttrain.system.options import Positive
from fasttrain.views.spec import RECIPES, Recipe

# vturrisi/solo-learn: scripts/pretrain/imagenet-100/simsiam.yaml; there is none for STL-10, which takes the same
IMAGENET100 = {"lr": 0.5, "weight_decay": 1e-5, "warmup_epochs": 10, "recipe": "byol"}


@dataclass(frozen=True)
class SimSiamOptions(MethodOptions):
    """SimSiam (arXiv 2011.10566): from each view, predict the projection that the same network makes of the other,
    through which no gradient flows. There are no negatives, and no momentum network."""

    views: ClassVar[Recipe] = RECIPES["mocov2"]
    # facebookresearch/simsiam: main_simsiam.py and README.md
    paper: ClassVar = {
        "batch_norm": "sync", "batch_size": 512, "epochs": 100, "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4,
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": IMAGENET100,
        "stl10": IMAGENET100,
        # the paper's appendix D
        "cifar10": {
            "batch_size": 512, "epochs": 800, "lr": 0.03, "weight_decay": 5e-4, "projector_layers": 2, "blur": (0.0,),
        },
        "demo": {
            "lr": 0.25, "weight_decay": 5e-4, "epochs": 12, "hidden": 512, "dim": 512, "predictor_hidden": 128,
        },
    }  # fmt: skip

    dim: Positive[int] = 2048
    """Width of projections and predictions."""
    hidden: Positive[int] = 2048
    """Width of the projector's hidden layers."""
    projector_layers: Positive[int] = 3
    """Linear layers of the projector, each with batch norm."""
    predictor_hidden: Positive[int] = 512
    """Width of the predictor's hidden layer."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""

    def build(self, encoder: nn.Module, width: int) -> SimSiam:
        return SimSiam(encoder, width, self)


class SimSiam(Method):
    """The negative cosine of each view's prediction and the other view's projection, and the regularisers that are on.

    "std" among its terms tells a collapse: see `spread`.
    """

    steady = ("predictor",)

    def __init__(self, encoder: nn.Module, width: int, options: SimSiamOptions) -> None:
        super().__init__()
        zero_init_residual(encoder)
        self.encoder = encoder
        hidden = (options.hidden,) * (options.projector_layers - 1)
        self.projector = batch_norm_mlp(width, hidden, options.dim, "norm")
        self.predictor = batch_norm_mlp(options.dim, (options.predictor_hidden,), options.dim, "bias")
        self._options = options

    def forward(self, sample: Sample) -> Output:
        z_2ND = [self.projector(self.encoder(view)) for view in sample.views[0]]
        p_2ND = [self.predictor(z_ND) for z_ND in z_2ND]
        with torch.autocast(z_2ND[0].device.type, enabled=False):
            q_2ND, k_2ND = ([F.normalize(x.float(), dim=1) for x in both] for both in (p_2ND, z_2ND))
            return Output(*self.loss(q_2ND, [k_ND.detach() for k_ND in reversed(k_2ND)]))

    def loss(self, q_2ND: list[Tensor], k_2ND: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, from this rank's predictions of each view and what they are predictions of."""
        directions = [
            regularised(negative_cosine(q_ND, k_ND), self._options.regularisers, q_ND, k_ND, None, None)
            for q_ND, k_ND in zip(q_2ND, k_2ND, strict=True)
        ]
        loss, terms = averaged(directions)
        return loss, terms | {"std": spread(torch.cat(k_2ND))}
