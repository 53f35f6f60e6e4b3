"""Presets: values of options that all methods have. A method's own stand beside its options (MethodOptions.presets).

imagenet: a method's paper's own. imagenet100: solo-learn's scripts for it (ResNet-18, 400 epochs, batch 256).
cifar10: ResNet-18 with the stem that MoCo's notebook and SimCLR's appendix give it. stl10: imagenet100's at 96 px.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "imagenet100": {"arch": "resnet18", "batch_size": 256, "epochs": 400},
    "stl10": {"arch": "resnet18", "batch_size": 256, "epochs": 400, "size": 96},
    "cifar10": {"arch": "resnet18", "cifar_stem": True, "batch_size": 512, "size": 32},
    "demo": {
        "arch": "small", "batch_size": 128, "epochs": 24, "size": 32, "checkpoint_every": 200, "log_every": 10,
    },
}  # fmt: skip
