"""Settings of runs by earlier versions, as this one has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"vit_patch": "patch_size"}
DROPPED_PATHS = "vit_", "convnext", "efficientnet", "swin", "maxvit"  # by DINO, before it was asked to


def named_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options under their present names, and what a run did by itself before it was an option."""
    now = {RENAMED.get(name, name): value for name, value in saved.items()}
    if now.get("method") == "dino" and str(now.get("arch")).startswith(DROPPED_PATHS):
        now.setdefault("drop_path", 0.1)
    if "cross" in now:
        now.setdefault("cross_features", "projection")  # which xmoco kept when there was no choice
    if "cross_weight" in now and now["cross_weight"] is None:  # the reading's own, when that was not written down
        now["cross_weight"] = 64.0 if str(now.get("cross")).startswith("batch") else 1.0
    return now
