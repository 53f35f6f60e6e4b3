"""The options of MoCo v1/v2 (arXiv 1911.05722, 2003.04297)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fasttrain.losses.options import Regularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.errors import UserError
from fasttrain.system.options import Fraction, Momentum, NotNegative, Positive, With
from fasttrain.views.spec import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

    from fasttrain.methods.moco import MoCo


@dataclass(frozen=True)
class KeyOptions(MethodOptions):
    """What every method with a momentum encoder and a queue of its keys may be asked for."""

    dim: Positive[int] = 128
    """Width of queries and keys."""
    queue_size: Positive[int] = 65536
    """Keys kept as negatives."""
    ema: Momentum[float] = 0.999
    """Momentum of the key encoder."""
    ema_end: Fraction[float | None] = None
    """What that momentum rises to, along half a cosine. None: the same throughout."""
    regularisers: Regularisers = field(default_factory=Regularisers)
    """XMoCo's regularisers, which go with any method of queries and keys"""


# solo-learn's scripts/pretrain/imagenet-100/mocov2plus.yaml, but for its hidden layer of 2048, its queue for each
# direction, where this one takes the keys of both, and its SyncBN
_SYMMETRIC = {
    "symmetric": True, "crop_scale": (0.08, 1.0), "lr": 0.3, "weight_decay": 1e-4, "warmup_epochs": 10, "dim": 256,
    "ema": 0.99, "ema_end": 0.999,
}  # fmt: skip


@dataclass(frozen=True)
class MoCoOptions(KeyOptions):
    """MoCo v2 (arXiv 2003.04297): an image's query has to find the momentum encoder's key of its other view among a
    queue of other images' keys. MoCo v1 (arXiv 1911.05722) is --head linear, --temperature 0.07 and --recipe mocov1."""

    views: ClassVar[Recipe] = RECIPES["mocov2"]
    paper: ClassVar = {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_norm": "split"}
    presets: ClassVar = {
        "imagenet100": _SYMMETRIC,
        "stl10": _SYMMETRIC,  # those of imagenet100: no public ones are known
        # MoCo's own CIFAR-10 notebook
        "cifar10": {
            "recipe": "cifar", "lr": 0.03, "weight_decay": 5e-4, "head": "linear", "queue_size": 4096, "ema": 0.99,
            "temperature": 0.1,
        },
        "demo": {"lr": 0.12, "weight_decay": 5e-4, "queue_size": 2048, "ema": 0.99, "temperature": 0.1},
    }  # fmt: skip

    head: Literal["mlp", "linear"] = "mlp"
    """Projection head: one hidden layer as wide as the features (MoCo v2), or linear (MoCo v1)."""
    temperature: Positive[float] = 0.2
    """Temperature of InfoNCE."""
    decoupled: bool = False
    """Leave a query's own key out of InfoNCE's denominator: the decoupled contrastive loss (arXiv 2110.06848)."""
    decoupled_weighted: bool = False
    """The same paper's DCLW: decoupled, and pairs that are far apart, among those of a micro-batch, weigh more."""
    symmetric: bool = False
    """Each view is query and key in turn (MoCo v2+), at twice the cost of a step: the mean of both directions, against
    one queue, which then takes the keys of both. Where published code sums them (MoCo's CIFAR-10 notebook), the same
    step is twice --lr and half --weight-decay."""

    feature_transform: bool = False
    """Contrast a query and its key after moving them apart, with negatives that are mixtures of keys (arXiv
    2108.02982); one more pass over the queue."""
    negatives: Literal["all", "meow", "adameow"] = "all"
    """What negatives weigh in a contrast that is then decoupled (arXiv 2212.13847). all: they weigh alike; meow: as
    many clusterings of the queue as part them from the query's key; adameow: what a small network learns."""
    clusters: Annotated[Positive[tuple[int, ...]], With("negatives", ("meow",))] = (50, 100, 200)
    """Clusters of the queue for --negatives meow, a number for each clustering."""
    foreground: NotNegative[float] = 0.0
    """Weight of a contrast of the foregrounds of views with those of other images and with backgrounds (a reading of
    FAC, arXiv 2303.06388), for convolutional encoders; a queue more. 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = {"--decoupled": self.decoupled, "--decoupled-weighted": self.decoupled_weighted}
        if self.negatives != "all" and any(others.values()):
            with_it = ", ".join(name for name, on in others.items() if on)
            raise UserError(f"--negatives {self.negatives} has a contrast of its own: leave out {with_it}")
        if self.negatives == "meow" and min(self.clusters, default=1) < 2:
            raise UserError("--negatives meow needs a clustering that parts keys: give --clusters 2 or more for each")

    def build(self, encoder: nn.Module, width: int) -> MoCo:
        from fasttrain.losses.queue import Decoupled, DecoupledWeighted, InfoNCE
        from fasttrain.methods.moco import MoCo
        from fasttrain.networks.clusters import Clusters
        from fasttrain.networks.heads import linear_head, mlp_head
        from fasttrain.networks.pair_gate import PairGate

        projector = {"mlp": mlp_head, "linear": linear_head}[self.head](width, self.dim)
        contrast = DecoupledWeighted if self.decoupled_weighted else Decoupled if self.decoupled else InfoNCE
        made = contrast(self.temperature)
        weights = Clusters(self.dim, self.clusters) if self.negatives == "meow" else None
        gate = PairGate(self.dim) if self.negatives == "adameow" else None
        return MoCo(
            encoder, projector, made, self, self.symmetric, feature_transform=self.feature_transform,
            negatives=weights or gate, foreground=self.foreground,
        )  # fmt: skip
