"""Which classes are recognised, and which are taken for which: bars, a matrix, and the most frequent mistakes."""

from __future__ import annotations

import re

import numpy as np

from fasttrain.page.map import shortened
from fasttrain.page.representation_style import LEVELS
from fasttrain.page.shell import figure, text
from fasttrain.run.representation import Representation

ALL, BEST_AND_WORST = 40, 15  # classes that are all shown, and of more those at both ends
FEW = 5  # val images of a class: the accuracy of fewer is hardly one
BINS = 10
WORDNET = re.compile(r"^n\d{8}[_ ](?=.)")


def name_of(kept: Representation, label: int) -> str:
    """A class's name, without WordNet's number before it; one that says nothing is a number."""
    return WORDNET.sub("", kept.classes[label].strip()) or f"class {label}"


def accuracies(kept: Representation) -> str:
    """Each class's accuracy, or those at both ends and how many classes lie between."""
    occurring = np.flatnonzero(kept.count_C)
    share_C = kept.right_C / np.maximum(kept.count_C, 1)
    order = occurring[np.argsort(-share_C[occurring], kind="stable")]
    if len(order) <= ALL:
        return _bars(kept, order, share_C)
    parts = (
        (f"The best {BEST_AND_WORST}", order[:BEST_AND_WORST]),
        (f"The worst {BEST_AND_WORST}", order[-BEST_AND_WORST:]),
    )
    ends = "".join(f"<h3>{title}</h3>{_bars(kept, part, share_C)}" for title, part in parts)
    return _distribution(share_C[occurring]) + ends


def _bars(kept: Representation, order: np.ndarray, share_C: np.ndarray) -> str:
    rows = (
        f'<li><span title="{text(name_of(kept, c))}">{text(name_of(kept, c))}</span>'
        f'<i style="--share: {100 * share_C[c]:.1f}%"></i><b title="{kept.right_C[c]:,} of {kept.count_C[c]:,} images">'
        f"{100 * share_C[c]:.0f} %</b></li>"
        for c in order
    )
    return f"<ul class=bars>{''.join(rows)}</ul>"


def _distribution(share_C: np.ndarray) -> str:
    """How many classes have which accuracy."""
    count_N, _ = np.histogram(share_C, BINS, (0, 1))
    wide, tall = 368 / BINS, 110  # pixels
    bars = "".join(
        f'<rect x="{place * wide + 1:.1f}" y="{16 + tall * (1 - count / count_N.max()):.1f}" width="{wide - 2:.1f}" '
        f'height="{max(tall * count / count_N.max(), 1):.1f}" fill="var(--c1)"/>'
        f'<text x="{(place + 0.5) * wide:.1f}" y="{12 + tall * (1 - count / count_N.max()):.1f}" text-anchor="middle" '
        f'font-size="12" fill="var(--ink)">{count:,}</text>'
        for place, count in enumerate(count_N)
    )
    ticks = "".join(
        f'<text x="{share * 368:.0f}" y="144" text-anchor="{anchor}" font-size="12" fill="var(--soft)">'
        f"{100 * share:.0f} %</text>"
        for share, anchor in (
            (0, "start"),
            (0.2, "middle"),
            (0.4, "middle"),
            (0.6, "middle"),
            (0.8, "middle"),
            (1, "end"),
        )
    )
    said = ", ".join(f"{count} from {10 * place} to {10 * place + 10} %" for place, count in enumerate(count_N))
    drawn = f'<svg role="img" aria-label="classes by accuracy: {said}" viewBox="0 0 368 150">{bars}{ticks}</svg>'
    return figure("How many classes have which accuracy", drawn)


def confusions(kept: Representation) -> str:
    """The whole matrix where it is kept, else the mistakes that were made more than once."""
    if len(kept.confusion_CC) > 1:
        return _matrix(kept)
    rows = [
        f"<li>{text(name_of(kept, label))} → {text(name_of(kept, found))}: {images:,} of {kept.count_C[label]:,}</li>"
        for label, found, images in kept.pair_P3.tolist()
        if images > 1
    ]
    return f"<ul class=pairs>{''.join(rows)}</ul>" if rows else ""


def _matrix(kept: Representation) -> str:
    shown = [c for c in range(len(kept.classes)) if kept.confusion_CC[c].any() or kept.confusion_CC[:, c].any()]
    head = "".join(f"<th scope=col><span>{text(shortened(name_of(kept, c)))}</span></th>" for c in shown)
    rows = []
    for label in shown:
        total = max(int(kept.confusion_CC[label].sum()), 1)
        cells = []
        for found in shown:
            images = int(kept.confusion_CC[label, found])
            share = images / total
            kinds = f"h{round((LEVELS - 1) * share)}" + " right" * (label == found)
            shown_share = f"{100 * share:.0f}" if images else ""
            cells.append(f'<td class="{kinds}" title="{images:,} images">{shown_share}</td>')
        rows.append(f"<tr><th scope=row>{text(shortened(name_of(kept, label)))}</th>{''.join(cells)}</tr>")
    return (
        '<div class=scroll role="region" aria-label="confusion matrix" tabindex=0><table class="grid confusion">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
