"""The options of terms that go with many losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fasttrain.system.options import Finite, Fraction, NotNegative, Options, Positive, With

_OVER_BATCH, _OVER_QUEUE = ("batch", "batch-within"), ("queue", "queue-both")
# What --cross brings with it. Over the batch it is CyCLIP's (arXiv 2205.14459) 0.25 times the batch, for one of 256.
CROSS_WEIGHTS = {"batch": 64.0, "batch-within": 64.0, "queue": 1.0, "queue-both": 1.0, "none": 1.0}


@dataclass(frozen=True)
class BatchRegularisers(Options):
    """XMoCo's regularisers, on top of the own loss of a method that has no queue."""

    cross: Literal["batch", "batch-within", "none"] = "none"
    """Cross-similarity consistency: batch: a pair of the batch's images keeps its similarity when their views are
    exchanged; batch-within: it has the same in both views."""
    cross_features: Annotated[Literal["projection", "encoder"], With("cross", _OVER_BATCH)] = "projection"
    """Whose similarities --cross batch and batch-within keep: those of what the heads give, as the loss has it, or of
    the encoder's output, which is what is used later."""
    cross_weight: Annotated[NotNegative[float], With("cross")] = 1.0
    """Weight of that consistency; --cross batch and batch-within bring 64 with them."""
    uniform: Literal["batch", "none"] = "none"
    """Uniform similarity: whether the similarities to the batch's other images should be uniform."""
    uniform_weight: Annotated[Finite[float], With("uniform")] = 0.1
    """Weight of that uniformity; below 0, similarities to negatives are to differ."""
    uniform_temperature: Annotated[Positive[float], With("uniform")] = 0.2
    """Temperature of the distribution that should be uniform."""
    compactness: Fraction[float] = 0.0
    """Part of the loss that goes from the contrast to compactness, as POT does (arXiv 2309.13944): of an image's worst
    pair of views, how much nearer it is than the mean of other images. The paper has 0.2 to 0.5."""

    @property
    def over_batch(self) -> bool:
        """Is consistency one over the batch?"""
        return self.cross in _OVER_BATCH

    @property
    def within(self) -> bool:
        """Of similarities in each view?"""
        return self.cross == "batch-within"

    @property
    def of_encoder(self) -> bool:
        """Of the encoder's outputs?"""
        return self.over_batch and self.cross_features == "encoder"


@dataclass(frozen=True)
class Regularisers(BatchRegularisers):
    """XMoCo's regularisers, on top of the own loss of a method with a queue."""

    cross: Literal["batch", "batch-within", "queue", "queue-both", "none"] = "none"  # type: ignore[assignment]
    """Cross-similarity consistency: batch: a pair of the batch's images keeps its similarity when their views are
    exchanged; batch-within: it has the same in both views; queue: both views have the same similarities to the queue;
    queue-both: with the query's as the key's target, too, as CO2 does (arXiv 2010.02217)."""
    uniform: Literal["batch", "queue", "none"] = "none"  # type: ignore[assignment]
    """Uniform similarity: which negatives' similarities should be uniform."""
    cross_temperature: Annotated[Positive[float], With("cross", _OVER_QUEUE)] = 0.2
    """Temperature of the query's distribution, which --cross queue and queue-both compare with the key's."""
    cross_key_temperature: Annotated[Positive[float | None], With("cross", _OVER_QUEUE)] = None
    """Temperature of the key's. Lower, it is a sharpened target, as in ReSSL and SCE. None: the query's."""
