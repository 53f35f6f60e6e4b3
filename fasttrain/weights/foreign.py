"""What other projects call the tensors of an encoder: timm's vision transformers, and networks inside checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from fasttrain.weights.names import timm_name

# timm's names of a vision transformer, which MoCo v3, DINO and solo-learn use, too; the inverse of names.timm_name
_TORCHVISION = {
    r"^cls_token": "class_token",
    r"^patch_embed\.proj\.": "conv_proj.",
    r"^pos_embed$": "encoder.pos_embedding",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
}

# Of two networks in a checkpoint that fit alike, the one that its project evaluates: DINO's teacher, an average of the
# weights; else the one that was trained, not the average that gave it its targets (moco, moco-v3 and dino of
# facebookresearch, vturrisi/solo-learn, lightly-ai/lightly, huggingface/pytorch-image-models).
_EVALUATED = re.compile(r"teacher|(^|[._])ema([._]|$)")
_AVERAGE = re.compile(r"momentum|target|student|(^|[._])k(ey)?([._]|$)")

# pytorch/vision renames these of DenseNets, too, when it loads the files that it publishes
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")

# Tensors of these are of no encoder: they may be left over.
HEADS = frozenset(("fc", "head", "heads", "head_dist", "classifier", "last_linear"))

# facebookresearch/moco-v3: the heads of its vision transformers by their width; no other project has 12 at 384
MOCO_V3_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}


def present_name(name: str) -> str:
    """What a tensor is called today: without what torch.compile puts into names, and without DenseNets' old dots."""
    return _OLD_DENSENET.sub(r"\1\2.", name.replace("_orig_mod.", ""))


def torchvision_name(name: str) -> str:
    """torchvision's name of a tensor of timm's vision transformer."""
    for pattern, replacement in _TORCHVISION.items():
        name = re.sub(pattern, replacement, name)
    return name


def namings(encoder: nn.Module, names: Iterable[str]) -> list[dict[str, str]]:
    """What an encoder's tensors may be called elsewhere, by their names here: the same; timm's or torchvision's names
    of a vision transformer; numbers in place of its children's names, where these were put into an nn.Sequential."""
    names = list(names)
    numbers = {name: str(number) for number, (name, _child) in enumerate(encoder.named_children())}

    def numbered(name: str) -> str:
        child, dot, rest = name.partition(".")
        return f"{numbers.get(child, child)}{dot}{rest}"

    return [{name: rename(name) for name in names} for rename in (str, timm_name, torchvision_name, numbered)]


def preference(prefix: str) -> tuple[bool, bool]:
    """A larger one is that of the network to take, of several that fit alike."""
    return bool(_EVALUATED.search(prefix)), not _AVERAGE.search(prefix)


def heads_of(encoder: nn.Module) -> frozenset[int]:
    """The numbers of attention heads in a network, which its tensors do not tell."""
    found = (getattr(module, "num_heads", None) for module in encoder.modules())
    return frozenset(number for number in found if isinstance(number, int))


def heads_there(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[int]:
    """The attention heads of a vision transformer in a file, where the layout of the file tells."""
    width = next((shape[-1] for name, shape in shapes.items() if name.endswith(("class_token", "cls_token"))), 0)
    if "base_encoder." in prefix and width in MOCO_V3_HEADS:
        return frozenset((MOCO_V3_HEADS[width],))
    return frozenset()
