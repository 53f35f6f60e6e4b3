"""What a report shows of a representation: maps, nearest neighbours, mistakes, and views as the encoder sees them.

Axes in names: N val images, Q queries, K neighbours of each, C classes, F features.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fasttrain.evaluation.features import Features, Preparation, central_views
from fasttrain.evaluation.knn import MEMORY_ROWS
from fasttrain.evaluation.maps import maps
from fasttrain.input import Selection, Store
from fasttrain.input.blanks import Blanks
from fasttrain.run.representation import FILE, Representation, write_representation
from fasttrain.run.samples import source_image, unnormalised
from fasttrain.system.cli import said, warn
from fasttrain.system.errors import DataError, RunError
from fasttrain.system.memory import is_full_memory

MAPPED, QUERIES, NEIGHBOURS, VIEWED = 2000, 9, 6, 6  # images on the map, …, images shown with their central view
WRONG_EVERY = 3  # of this many queries one is of those that were classified wrongly
WHOLE_MATRIX, PAIRS = 30, 20  # classes of which all confusions are kept, and how many of more
THUMBNAIL, WHOLE, VIEW, QUALITY = 96, 160, 224, 85  # pixels of the longer side at most; JPEG
READ_AT_ONCE = 8  # images, which may be of many megapixels


def keep_representation(
    run: pathlib.Path, memory: Features, queries: Features, train: Store, val: Store, ranked: Mapping[str, Tensor],
    preparation: Preparation, device: torch.device, *, step: int, data: str, features: str = "encoder",
) -> None:  # fmt: skip
    """Write representation.npz into the run folder, or say why not: an evaluation whose figures are measured goes on.

    memory, queries: features of train and val, of the layer that `features` names. ranked: by protocol, the likeliest
    classes of every val image, (N, …) int64 on the CPU, best first; the linear probe's are shown, or else kNN's. step,
    data: of the weights, and the images' path. For one process.
    """
    try:
        represented = represent(
            memory, queries, train, val, ranked, preparation, device, step=step, data=data, features=features
        )
        write_representation(run, represented)
    except (OSError, DataError, RunError) as error:
        reason = said(error) if isinstance(error, OSError) else str(error)
        warn(f"{run / FILE}, which the report shows, is not written: {reason}")
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        warn(f"{run / FILE}, which the report shows, is not written: memory is full")


def represent(
    memory: Features, queries: Features, train: Store, val: Store, ranked: Mapping[str, Tensor],
    preparation: Preparation, device: torch.device, *, step: int, data: str, features: str,
) -> Representation:  # fmt: skip
    """The same as arrays. Memory does not grow with the number of images but for a few numbers of each."""
    label_N, label_M = queries.label_N.numpy(), memory.label_N.numpy()
    protocol = next((name for name in ("linear", "knn") if name in ranked), "")
    predicted_N = ranked[protocol][:, 0].numpy() if protocol else np.full(len(label_N), -1)
    total, classes, mapped_N = len(label_N), len(train.classes), _evenly(len(label_N), MAPPED)
    drawn = maps(queries.rows(mapped_N, device))
    query_Q = sampled(label_N, predicted_N, QUERIES)
    similarity_QK, neighbour_QK = nearest(queries.rows(query_Q, device), memory, NEIGHBOURS)
    confusion_CC, pair_P3 = confused(label_N, predicted_N, classes)

    asked = _pictures(val, queries.index_M[query_Q], preparation, device)
    found = _pictures(train, memory.index_M[neighbour_QK.ravel()], preparation, device)
    viewed = _pictures(val, queries.index_M[_evenly(total, VIEWED)], preparation, device)
    per_query = len(found) // len(asked)
    rows = ([query, *found[q * per_query : (q + 1) * per_query]] for q, query in enumerate(asked))
    return Representation(
        step=step, data=data, features=features, size=preparation.size, predicted_by=protocol,
        classes=tuple(train.classes), maps=drawn.names, variance=drawn.variance, map_MN2=drawn.map_MN2,
        label_N=label_N[mapped_N], predicted_N=predicted_N[mapped_N], query_label_Q=label_N[query_Q],
        query_predicted_Q=predicted_N[query_Q], neighbour_label_QK=label_M[neighbour_QK], similarity_QK=similarity_QK,
        memory_C=_counts(label_M, classes), count_C=_counts(label_N, classes),
        right_C=_counts(label_N[label_N == predicted_N], classes), confusion_CC=confusion_CC, pair_P3=pair_P3,
        thumbnails=tuple(_jpeg(view, THUMBNAIL) for row in rows for _, view in row),
        views=tuple(part for whole, view in viewed for part in (_jpeg(whole, WHOLE), _jpeg(view, VIEW))),
    )  # fmt: skip


def sampled(label_N: np.ndarray, predicted_N: np.ndarray, count: int) -> np.ndarray:
    """Places of at most `count` images, each another one: evenly over the classes that occur, at random of each, and
    every WRONG_EVERY-th of those that were classified wrongly, where there are any."""
    generator = np.random.default_rng(0)
    occurring = np.unique(label_N)
    rounds = -(-count // len(occurring))
    wanted = np.tile(occurring[_evenly(len(occurring), count)], rounds)[:count]
    wrong_N = (predicted_N != label_N) & (predicted_N >= 0)
    chosen: list[int] = []
    for place, kind in enumerate(wanted):
        of_class_N = (label_N == kind) & ~np.isin(np.arange(len(label_N)), chosen)
        wrong = np.flatnonzero(of_class_N & wrong_N) if place % WRONG_EVERY == WRONG_EVERY - 1 else ()
        candidates = wrong if len(wrong) else np.flatnonzero(of_class_N)
        if len(candidates):
            chosen.append(int(generator.choice(candidates)))
    return np.array(chosen)


def nearest(query_QF: Tensor, memory: Features, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities (fp32) and places of each query's k nearest rows of the memory, nearest first, (Q, k) each;
    of all rows where there are fewer. The memory is read a chunk at a time."""
    device = query_QF.device
    query_QF = F.normalize(query_QF, dim=1)
    best_QK = torch.empty(len(query_QF), 0, device=device)
    place_QK = torch.empty(len(query_QF), 0, dtype=torch.int64, device=device)
    for first in range(0, len(memory.label_N), MEMORY_ROWS):
        rows = slice(first, min(first + MEMORY_ROWS, len(memory.label_N)))
        here_QM = query_QF @ F.normalize(memory.rows(rows, device), dim=1).T
        place_M = torch.arange(rows.start, rows.stop, device=device)
        both_QM = torch.cat([best_QK, here_QM], 1)
        best_QK, chosen_QK = both_QM.topk(min(k, both_QM.shape[1]), dim=1)
        place_QK = torch.cat([place_QK, place_M.expand(len(query_QF), -1)], 1).gather(1, chosen_QK)
    return best_QK.cpu().numpy(), place_QK.cpu().numpy()


def confused(label_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of label (row) and prediction (column), (C, C) for at most WHOLE_MATRIX classes, else (0, 0); and the
    PAIRS most frequent mistakes, (P, 3): label, prediction, images."""
    known_N = (label_N >= 0) & (predicted_N >= 0)
    key_N = label_N[known_N] * classes + predicted_N[known_N]
    whole = classes <= WHOLE_MATRIX and len(key_N) > 0
    confusion_CC = np.bincount(key_N, minlength=classes**2).reshape(classes, classes) if whole else np.zeros((0, 0))
    key_P, count_P = np.unique(key_N[label_N[known_N] != predicted_N[known_N]], return_counts=True)
    most = np.argsort(-count_P, kind="stable")[:PAIRS]
    pair_P3 = np.stack([key_P[most] // classes, key_P[most] % classes, count_P[most]], axis=1)
    return confusion_CC.astype(np.int64), pair_P3.astype(np.int64)


def _pictures(
    store: Store, index_N: np.ndarray, preparation: Preparation, device: torch.device
) -> list[tuple[Image.Image, Image.Image]]:
    """Images of a store, small, and their central views; black for one that can't be read."""
    size, mean, std = preparation.size, preparation.mean, preparation.std
    batches = central_views(
        Blanks(Selection(store, index_N)), device, size=size, mean=mean, std=std, batch_size=READ_AT_ONCE,
        workers=preparation.workers, max_failed_fraction=0.0,
    )  # fmt: skip
    read = []
    for batch, views_B3SS in batches:
        for b, view_SS3 in enumerate(unnormalised(views_B3SS[None], mean, std)[0]):
            whole = source_image(batch, b)
            whole.thumbnail((WHOLE, WHOLE), Image.Resampling.LANCZOS)
            read.append((whole, Image.fromarray(view_SS3)))
    return read


def _jpeg(picture: Image.Image, side: int) -> bytes:
    """At most `side` pixels wide and high."""
    content, picture = io.BytesIO(), picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _evenly(total: int, most: int) -> np.ndarray:
    """At most `most` places of `total`, evenly spaced."""
    return np.linspace(0, total - 1, min(most, total)).astype(np.int64)


def _counts(label_N: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(label_N[label_N >= 0], minlength=classes).astype(np.int64)
