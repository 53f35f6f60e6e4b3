"""Presets: values of options that all methods have. A method's own stand beside its options (MethodOptions.presets)."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "cifar10": {"arch": "resnet18", "cifar_stem": True, "batch_size": 512, "size": 32},
    "demo": {
        "arch": "small", "batch_size": 128, "epochs": 24, "size": 32, "checkpoint_every": 200, "log_every": 10,
    },
}  # fmt: skip
