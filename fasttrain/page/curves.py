"""Curves of training: losses, the contrast of positives with negatives, learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fasttrain.page.charts import Line
from fasttrain.page.distributions import ridges
from fasttrain.page.history import History, drawable
from fasttrain.page.numbers import short
from fasttrain.page.over_steps import over_steps
from fasttrain.page.shell import charts, figure, key, section, switch, text
from fasttrain.page.style import SERIES
from fasttrain.run.metrics import FIGURES

SAME = 1e-6  # of its values: a curve that is no further from another shows nothing of its own
MOST_TERMS, ROWS = 24, 7
CAPTIONS = {
    "loss": "What is minimised: the sum of the terms, each by its weight.",
    "std": "Standard deviation of a dimension of the projections, times √width: 1 when spread evenly, 0 is a collapse.",
    "cross": "XMoCo's first regulariser: similarities between images shall stay under other views of them.",
    "uniform": "XMoCo's second: similarities to negatives shall be alike.",
    "compactness": "Of an image's worst pair of views: 0.31 when views are alike and images apart, 0.69 collapsed.",
    "balanced": "The contrast whose positives are the images that probably are of one class, too.",
    "positives": "How many positives a view has, by their weights: 1 is the image's other view alone.",
    "gate": "Mean of the gates' numbers: at 0 nothing is compared any more.",
    "gate_entropy": "Of the gates' numbers: 0.69 undecided, 0 open or shut.",
    "score_positive": "Similarity of a query and its key once they are moved apart: lower is harder.",
    "score_negative": "Mean similarity of a query to the mixed negatives.",
    "score_negative_variance": "Of a query's similarities to the mixed negatives: higher tells images apart.",
    "score_negative_log_exp": "log of the mean of exp(s/τ) over the mixed negatives: what the loss has of them.",
    "negative_weight": "Mean weight of a negative: of MEOW's, how many clusterings tell it from the query's image.",
    "negatives_counted": "Share of the negatives that count, by how unequal their weights are: 1 where all are alike.",
}  # of terms whose names do not tell
CONTRAST = ("contrastive_accuracy", "positive_similarity", "negative_similarity", "queue_filled")


def training(history: History) -> str:
    """The section on training; "" without entries."""
    if not history.entries:
        return ""
    figures, left_out = _terms(history)
    notes = [_entries(history)]
    if len(history.entries) >= 40:
        notes.append("Thick: the mean over a 25th of the run; thin: each entry. ")
    notes += [f"Left out: {text('; '.join(left_out))}. "] if left_out else []
    if skipped := history.skipped_steps():
        notes.append(f"Steps were skipped, as they were not finite, before step {text(_some(skipped))}. ")
    return section(
        "Training", switch(), charts([*figures, *_contrast(history), *_learning_rate(history)]), note="".join(notes)
    )


def _entries(history: History) -> str:
    """How many, and how far apart."""
    steps = [entry["step"] for entry in history.entries]
    apart = round(float(np.median(np.diff([0, *steps]))))
    if len(steps) == 1:
        return f"One entry, of step {steps[0]:,}. "
    return f"{len(steps):,} entries, {'one for each step' if apart == 1 else f'{apart:,} steps apart'}. "


def _some(steps: Sequence[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps[:8]) + (
        f" and {len(steps) - 8:,} more entries" if len(steps) > 8 else ""
    )


def _terms(history: History) -> tuple[list[str], list[str]]:
    """A chart of each loss term, and what is said of those that would show nothing."""
    names = [name for name in history.entries[-1] if name not in FIGURES and name not in CONTRAST]
    figures, left_out = [], []
    seen: dict[str, np.ndarray] = {}
    for name in names[:MOST_TERMS]:
        steps, values = history.column(name)
        value_N = np.asarray(values)
        words = name.replace("_", " ")
        twin = next((other for other, other_N in seen.items() if same(value_N, other_N)), None)
        if not np.isfinite(value_N).any() and name != "loss":
            left_out.append(f"{words}, never a number that can be drawn")
        elif twin is not None:
            left_out.append(f"{words}, the same as {twin}")
        elif len(finite := value_N[np.isfinite(value_N)]) > 2 and np.ptp(finite) == 0:
            left_out.append(f"{words}, {short(values[-1])} throughout")
        else:
            seen[words] = value_N
            figures.append(
                over_steps(
                    history,
                    words[:1].upper() + words[1:],
                    [Line("", steps, values, smooth=True)],
                    CAPTIONS.get(name, ""),
                )
            )
    left_out += [f"{len(names) - MOST_TERMS} more terms"] if len(names) > MOST_TERMS else []
    return figures, left_out


def same(a_N: np.ndarray, b_N: np.ndarray) -> bool:
    """Do two curves show the same?"""
    return len(a_N) == len(b_N) and bool(np.allclose(a_N, b_N, rtol=SAME, atol=0, equal_nan=True))


def _contrast(history: History) -> list[str]:
    """How well a query tells its own key from the others; the loss alone rises while the queue fills."""
    figures = []
    steps, values = history.column("contrastive_accuracy", 100.0)
    if steps:
        caption = "Queries whose own key is nearer than every key of the queue."
        lines = [Line("", steps, values, smooth=True)]
        figures.append(over_steps(history, "Contrastive accuracy, %", lines, caption, 100.0))
    named = (("positive", "positive_similarity", SERIES[0]), ("negative", "negative_similarity", SERIES[1]))
    lines = [Line(word, *history.column(name), colour, smooth=True) for word, name, colour in named]
    if lines := [line for line in lines if line.x_N]:
        figures.append(over_steps(history, "Similarity of query and key", lines, "Cosine; the mean of each kind."))
    figures += _distributions(history)
    steps, values = history.column("queue_filled", 100.0)
    full = next((place for place, value in enumerate(values) if value >= 100), len(values) - 1)
    if full > 0:
        caption = "Until it is full, more negatives make the loss rise."
        lines = [Line("", steps[: full + 1], values[: full + 1])]
        figures.append(over_steps(history, "Queue filled, %", lines, caption, 100.0))
    return figures


def _learning_rate(history: History) -> list[str]:
    steps, values = history.column("lr")
    moves = len(set(values)) > 1
    return [over_steps(history, "Learning rate", [Line("", steps, values)])] if moves else []


def _distributions(history: History) -> list[str]:
    """Scores of positives and negatives, at steps evenly over the training."""
    names = ("histogram_positive", "histogram_negative")
    found = [event for event in history.events if any(_counts(event.get(name)) for name in names)]
    bins = {len(_counts(event.get(name))) for event in found for name in names} - {0}
    if len(bins) != 1:
        return []
    chosen = sorted({round(place) for place in np.linspace(0, len(found) - 1, ROWS)})
    nothing = [0.0] * bins.pop()
    rows = [
        (f"{found[place]['step']:,}", [_counts(found[place].get(name)) or nothing for name in names])
        for place in chosen
    ]
    alt = f"distributions of the similarity of positives and negatives at {len(rows)} steps of training"
    keys = key("positives", SERIES[0]) + key("negatives", SERIES[1]) + "<br>"
    caption = keys + "Cosine of query and key, after so many steps: training is to part the two."
    return [figure("Scores over training", ridges(rows, SERIES[:2], alt), caption)]


def _counts(value: object) -> list[float]:
    """The counts of a histogram; [] for none, and for a damaged one."""
    counts = [drawable(each) for each in value] if isinstance(value, list) else []
    return counts if sum(counts) > 0 and min(counts) >= 0 else []
