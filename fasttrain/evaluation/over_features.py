"""The protocols over frozen features, one after the other, as they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from fasttrain.engine.ranks import Ranks
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.few_shot import few_shot
from fasttrain.evaluation.knn import knn, knn_settings
from fasttrain.evaluation.linear_probe import linear_probe
from fasttrain.evaluation.options import FewShotOptions, KnnOptions, LinearOptions
from fasttrain.evaluation.ranking import Ranked


def over_features(
    knn_options: KnnOptions, linear: LinearOptions, few: FewShotOptions, features: str, memory: Features,
    queries: Features, classes: int, ranks: Ranks,
) -> Iterator[Ranked]:  # fmt: skip
    """What every protocol that is asked for ranks. features: what they are of, for the settings."""
    device, of, label_N = ranks.device, {"features": features}, queries.label_N
    if knn_options.knn:
        k_all, temperatures = knn_options.k, knn_options.temperature
        pairs: dict[tuple[int, float], dict[str, Any]] = {}  # two k may be cut to the same
        for k, temperature in itertools.product(k_all, temperatures):
            settings = knn_settings(memory.label_N, k, temperature)
            pairs.setdefault((settings["k"], temperature), settings)
        ranked = knn(memory, queries, classes, k_all, temperatures, device, ranks)
        for number, ((k, temperature), settings) in enumerate(pairs.items()):
            variant = f"k{k}_t{temperature:g}" if number else ""
            yield Ranked("knn", variant, of | settings, ranked[k, temperature], label_N)
    if linear.linear:
        ranked_Nr, settings = linear_probe(memory, queries, classes, device, ranks, linear.solver)
        yield Ranked("linear", "", of | settings, ranked_Nr, label_N)
    for shots in dict.fromkeys(few.shots):
        draws = few.draws
        ranked_Nr, settings = few_shot(memory, queries, classes, shots, draws, device, ranks)
        yield Ranked("few_shot", f"{shots}_a_class", of | settings, ranked_Nr, label_N.repeat(draws), draws)
