"""Names of the same tensors in different libraries. All are of torchvision's first; shapes are the same in each."""

from __future__ import annotations

import re

# Of a vision transformer, in timm. Queries, keys and values are one matrix, in this order, in both.
_TIMM = {
    r"class_token": "cls_token",
    r"conv_proj\.": "patch_embed.proj.",
    r"encoder\.pos_embedding": "pos_embed",
    r"encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"encoder\.ln\.": "norm.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.3\.": ".mlp.fc2.",
}

# Of a ResNet, in detectron2, as MoCo's detection/convert-pretrain-to-detectron2.py has them.
_DETECTRON2 = {
    r"^(?!layer)": "stem.",
    r"^layer(\d)\.": lambda found: f"res{int(found[1]) + 1}.",
    r"\bbn(\d)\.": r"conv\1.norm.",
    r"\bdownsample\.0\.": "shortcut.",
    r"\bdownsample\.1\.": "shortcut.norm.",
}

# Written on its own and the other way round, so that a file can be read again without the library it is for.
_FROM_DETECTRON2 = {
    r"^stem\.": "",
    r"^res(\d)\.": lambda found: f"layer{int(found[1]) - 1}.",
    r"\bshortcut\.norm\.": "downsample.1.",
    r"\bshortcut\.": "downsample.0.",
    r"\bconv(\d)\.norm\.": r"bn\1.",
}


def timm_name(name: str) -> str:
    """timm's name of a tensor of torchvision's vision transformer."""
    return _renamed(name, _TIMM)


def detectron2_name(name: str) -> str:
    """detectron2's name of a tensor of torchvision's ResNet."""
    return _renamed(name, _DETECTRON2)


def from_detectron2(name: str) -> str:
    """torchvision's name of a tensor of detectron2's ResNet."""
    return _renamed(name, _FROM_DETECTRON2)


def _renamed(name: str, rules: dict) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name
