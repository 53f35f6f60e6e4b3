"""What an evaluation would keep of a representation, drawn at random."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from fasttrain.evaluation.representation import confused
from fasttrain.run.representation import Representation


def jpeg(colour: int, side: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), (colour % 256, 80, 120)).save(content, "JPEG")
    return content.getvalue()


def represented(classes: Sequence[str], per_class: int = 12, right: float = 0.6, **changes: Any) -> Representation:
    """per_class images of each class in val, and as many in train; `right` of them are classified right."""
    generator, count = np.random.default_rng(0), len(classes)
    label_N = np.repeat(np.arange(count), per_class)
    predicted_N = np.where(generator.random(len(label_N)) < right, label_N, generator.integers(0, count, len(label_N)))
    confusion_CC, pair_P3 = confused(label_N, predicted_N, count)
    queries = min(9, len(label_N))
    place_Q = np.linspace(0, len(label_N) - 1, queries).astype(int)
    neighbour_QK = generator.integers(0, count, (queries, 6))
    neighbour_QK[:, 0] = label_N[place_Q]
    map_MN2 = np.stack([np.stack([label_N, label_N % 3], 1) + generator.normal(size=(len(label_N), 2))] * 2)
    kept = Representation(
        step=1234, data="/data/flowers", features="encoder", size=32, predicted_by="linear", classes=tuple(classes),
        maps=("PCA", "t-SNE"), variance=(0.31, 0.08), map_MN2=map_MN2.astype(np.float32), label_N=label_N,
        predicted_N=predicted_N, query_label_Q=label_N[place_Q], query_predicted_Q=predicted_N[place_Q],
        neighbour_label_QK=neighbour_QK, similarity_QK=np.sort(generator.random((queries, 6)), 1).astype(np.float32),
        memory_C=np.full(count, per_class), count_C=np.full(count, per_class),
        right_C=np.bincount(label_N[label_N == predicted_N], minlength=count), confusion_CC=confusion_CC,
        pair_P3=pair_P3, thumbnails=tuple(jpeg(i) for i in range(7 * queries)),
        views=tuple(jpeg(i, side) for i in range(4) for side in (40, 32)),
    )  # fmt: skip
    return replace(kept, **changes)
