"""The options of methods that compare any number of views over the batch: MV-InfoNCE, MV-DHEL (arXiv 2507.06979) and
CACR (arXiv 2105.03746)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fasttrain.losses.options import BatchRegularisers
from fasttrain.methods.options.base import MethodOptions
from fasttrain.system.options import NotNegative, Positive, Several
from fasttrain.views.spec import RECIPES, Recipe, repeated

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fasttrain.methods.multi_view import MultiView


@dataclass(frozen=True)
class MultiViewOptions(MethodOptions):
    """What every method is asked for that compares any number of views over the batch."""

    over_batch: ClassVar[bool] = True

    num_views: Several[int] = 4
    """Views of each image, all drawn alike. Each costs a pass through the encoder."""
    dim: Positive[int] = 128
    """Width of what the loss compares."""
    hidden: Positive[int] = 2048
    """Hidden width of the projection head."""
    regularisers: BatchRegularisers = field(default_factory=BatchRegularisers)
    """XMoCo's regularisers, of each view with the next as its key"""

    @property
    def all_views(self) -> Recipe:
        return repeated(self.views, self.num_views)


# pakoromilas/Multi-View-CL: configs/imagenet-100_train_epochs200_bs256_05.yaml, whose network is a ResNet-50
_IMAGENET100 = {"epochs": 200, "warmup_epochs": 20.0, "lr": 1.4, "temperature": 0.5}


@dataclass(frozen=True)
class MVInfoNCEOptions(MultiViewOptions):
    """MV-InfoNCE (arXiv 2507.06979): InfoNCE of any number of views in one term. The pairs of an image's views are
    together to outweigh the pairs of its views with other images'."""

    views: ClassVar[Recipe] = RECIPES["simclr"][:1]
    # …: configs/imagenet1k_train_epochs100_bs256_01.yaml, with SGD; the networks are SimCLR's
    paper: ClassVar = {
        "batch_size": 256, "epochs": 100, "warmup_epochs": 10.0, "optimizer": "sgd", "lr": 0.3, "weight_decay": 1e-6,
        "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": _IMAGENET100,
        "stl10": _IMAGENET100,  # no public ones are known
        # …: configs/cifar_train_epochs200_bs256_05.yaml; the head is as wide as the features, as in SimCLR's for it
        "cifar10": {
            "batch_size": 256, "epochs": 200, "warmup_epochs": 2.0, "lr": 1.0, "jitter": (0.4, 0.4, 0.4, 0.1),
            "blur": (0.0,), "hidden": 512, "temperature": 0.5,
        },
        "demo": {
            "epochs": 6, "warmup_epochs": 1.0, "lr": 0.12, "weight_decay": 5e-4, "hidden": 512, "temperature": 0.2,
        },
    }  # fmt: skip

    temperature: Positive[float] = 0.1
    """Temperature of the contrast."""

    def build(self, encoder: nn.Module, width: int) -> MultiView:
        from fasttrain.losses.multi_view import mv_info_nce
        from fasttrain.methods.multi_view import MultiView

        return MultiView(encoder, width, lambda z_VND: {"contrast": mv_info_nce(z_VND, self.temperature)}, self)


@dataclass(frozen=True)
class MVDHELOptions(MVInfoNCEOptions):
    """MV-DHEL (arXiv 2507.06979): the views of an image lie close together, and in each view images lie apart. The two
    are decoupled: negatives are of the same view, with no positive among them."""

    # the nearest pair of views takes most of the attraction at a temperature as low as MV-InfoNCE's
    presets: ClassVar = {
        **MVInfoNCEOptions.presets,
        "demo": {**MVInfoNCEOptions.presets["demo"], "lr": 0.5, "temperature": 0.5},
    }

    def build(self, encoder: nn.Module, width: int) -> MultiView:
        from fasttrain.losses.multi_view import mv_dhel
        from fasttrain.methods.multi_view import MultiView

        return MultiView(encoder, width, lambda z_VND: {"contrast": mv_dhel(z_VND, self.temperature)}, self)


@dataclass(frozen=True)
class CACROptions(MultiViewOptions):
    """CACR (arXiv 2105.03746): views of an image attract each other, the more the further apart they are, and other
    images repel them, the more the nearer they are. --method cacr-queue takes negatives from a queue."""

    # JegZheng/CACR-SSL: small_scale_experiments/README.md and cifar10/main_ours.py, for a small AlexNet; there is none
    # of this form for ImageNet, so its views are those of the form with a queue. Steps of the rate are a cosine here.
    views: ClassVar[Recipe] = RECIPES["mocov2"][:1]
    paper: ClassVar = {
        "batch_size": 128, "epochs": 200, "optimizer": "sgd", "lr": 0.12, "weight_decay": 1e-4, "batch_norm": "sync",
    }  # fmt: skip
    presets: ClassVar = {
        "imagenet100": {"batch_size": 128, "epochs": 200},
        "stl10": {"batch_size": 128, "epochs": 200, "jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": (1.0,), "blur": (0.0,)},
        "cifar10": {
            "batch_size": 128, "epochs": 200, "jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": (1.0,), "blur": (0.0,),
            "hidden": 512, "negative_sharpness": 0.9,
        },
        "demo": {"epochs": 5, "warmup_epochs": 1.0, "weight_decay": 5e-4, "hidden": 512},
    }  # fmt: skip

    num_views: Several[int] = 5
    """Views of each image, all drawn alike. Each costs a pass through the encoder."""
    sharpness: NotNegative[float] = 1.0
    """How much more a positive weighs that is further away: their weights are softmax(t · squared distance)."""
    negative_sharpness: NotNegative[float] = 2.0
    """How much more a negative weighs that is nearer: softmax(−t · squared distance)."""

    def build(self, encoder: nn.Module, width: int) -> MultiView:
        from fasttrain.losses.cacr import cacr
        from fasttrain.methods.multi_view import MultiView

        def contrast(z_VND: Tensor) -> dict[str, Tensor]:
            near, apart = cacr(z_VND, self.sharpness, self.negative_sharpness)
            return {"attraction": near, "repulsion": apart}

        return MultiView(encoder, width, contrast, self)
