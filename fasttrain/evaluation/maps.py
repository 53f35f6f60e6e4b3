"""Maps: features in two dimensions, for a person to look at. Distances on them are no measurements."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttrain.system.cli import warn

LEAST = 10  # images: of fewer no neighbourhoods can be told
WIDTH = 50  # principal components that t-SNE and UMAP start from (van der Maaten & Hinton 2008, section 4.2)


class Maps(NamedTuple):
    """names and map_MN2, fp32: one after the other. variance: the shares along the two axes of the first, PCA."""

    names: tuple[str, ...]
    map_MN2: np.ndarray
    variance: tuple[float, ...]


def maps(x_NF: Tensor) -> Maps:
    """PCA of fp32 features, whose lengths do not count as in kNN, and what t-SNE and UMAP make of it where scikit-learn
    and umap-learn are installed. Deterministic."""
    component_ND, variance_D = principal(F.normalize(x_NF.cpu().double(), dim=1), WIDTH)
    flat_N2 = F.pad(component_ND, (0, max(0, 2 - component_ND.shape[1])))[:, :2].float().numpy()
    found = {"PCA": flat_N2}
    start_ND = component_ND.float().numpy()
    if len(x_NF) >= LEAST and len(variance_D) > 1 and variance_D[1] > 0:
        for name, (package, module, make) in _LIBRARIES.items():
            try:
                drawn_N2 = make(importlib.import_module(module), start_ND, flat_N2 / flat_N2[:, 0].std())
            except ModuleNotFoundError:
                continue
            except Exception as error:  # a library's own affair: the figures do not depend on it
                warn(f"no map by {name}: {package} failed: {type(error).__name__}: {error}")
                continue
            if np.isfinite(drawn_N2).all():
                found[name] = drawn_N2
    share = tuple(float(part) for part in variance_D[:2])
    return Maps(tuple(found), np.stack(list(found.values())).astype(np.float32), share)


def principal(x_NF: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first principal components of fp64 rows, (N, D) with D ≤ width, and the shares of the variance that they
    hold, (D,). A component's sign is that which makes its largest entry positive."""
    centred_NF = x_NF - x_NF.mean(0)
    wide = centred_NF.shape[1] > len(centred_NF)
    gram = centred_NF @ centred_NF.T if wide else centred_NF.T @ centred_NF  # the smaller of the two
    values, vectors = (part.flip(-1)[..., :width] for part in torch.linalg.eigh(gram))
    values = values.clamp_min(0.0)
    # What rounding leaves of a set without any spread has no direction.
    total = gram.trace() if gram.trace() > 1e-12 * len(x_NF) else torch.tensor(torch.inf)
    component_ND = vectors * values.sqrt() if wide else centred_NF @ vectors
    component_ND = component_ND * (values / total > 1e-12)
    largest_D = component_ND.gather(0, component_ND.abs().argmax(0, keepdim=True))[0]
    return component_ND * torch.where(largest_D < 0, -1.0, 1.0), values / total


def _tsne(library: object, start_ND: np.ndarray, flat_N2: np.ndarray) -> np.ndarray:
    """The same on any number of threads. It starts from PCA (Kobak & Berens 2019), as small as is customary."""
    perplexity = min(30.0, (len(start_ND) - 1) / 3)
    return library.TSNE(init=1e-4 * flat_N2, random_state=0, perplexity=perplexity).fit_transform(start_ND)  # type: ignore[attr-defined]


def _umap(library: object, start_ND: np.ndarray, flat_N2: np.ndarray) -> np.ndarray:
    neighbours = min(15, len(start_ND) - 1)
    options = {"n_neighbors": neighbours, "init": 10 * flat_N2, "random_state": 0, "n_jobs": 1}
    return library.UMAP(**options).fit_transform(start_ND)  # type: ignore[attr-defined]


_Maker = Callable[[object, np.ndarray, np.ndarray], np.ndarray]
_LIBRARIES: dict[str, tuple[str, str, _Maker]] = {
    "t-SNE": ("scikit-learn", "sklearn.manifold", _tsne),
    "UMAP": ("umap-learn", "umap", _umap),
}
