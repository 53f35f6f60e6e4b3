"""What was measured of the encoder: a chart of it while training, and a table of all figures."""

from __future__ import annotations

import pathlib

from fasttrain.page.canvas import WIDTH
from fasttrain.page.charts import Line, curves
from fasttrain.page.headlines import counterpart, newest_of_each, settings_cell, top1_name
from fasttrain.page.history import History
from fasttrain.page.shell import figure, folded, key, section, table
from fasttrain.page.style import SERIES
from fasttrain.run.evaluations import NAMES, Evaluation

WHILE_TRAINING = {"knn_top1": "kNN", "subset_knn_top1": "subset kNN", "probe_top1": "probe"}
ALT, WIDE = "top-1 accuracy in percent over steps", 900
NOTE = (
    "Interval: of the share of right answers, over images, at 95 %. Majority: what naming the most frequent class "
    "always would give. Balanced: the mean over the classes."
)


def accuracy(history: History) -> str:
    """The section, "" where nothing was measured."""
    newest = newest_of_each(history.evaluations)
    earlier = [each for each in reversed(history.evaluations) if not any(each is other for other in newest)]
    chart, rows = _chart(history), [_row(each) for each in (*newest, *earlier)]
    head = ("protocol", "top-1, %", "interval, %", "top-5, %", "balanced, %", "majority, %", "step", "images", "data",
            "settings")  # fmt: skip
    filled = [place for place in range(len(head)) if any(row[place] != "–" for row in rows)]
    kept, names = [[row[place] for place in filled] for row in rows], [head[place] for place in filled]
    shown, rest = table(names, kept[: len(newest)]), table(names, kept[len(newest) :])
    return section("Accuracy", chart, shown, folded("earlier figures", rest), note=NOTE)


def _row(each: Evaluation) -> list[str]:
    interval = "–" if each.low is None or each.high is None else f"{each.low:.1f}–{each.high:.1f}"
    top5, balanced, majority = map(percent, (each.top5, each.balanced, each.majority))
    images = f"{each.num_images:,}" if each.num_images else "–"
    data = pathlib.Path(each.data).name or "–"
    return [top1_name(each).replace(" top-1", ""), percent(each.top1), interval, top5, balanced, majority,
            f"{each.step:,}", images, data, settings_cell(each) or "–"]  # fmt: skip


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _measured_alike(each: Evaluation, other: Evaluation) -> bool:
    """But for the weights' step: only such figures are one line."""
    return each.untrained == other.untrained and (each.name, each.asked(), each.fingerprint or each.data) == (
        other.name, other.asked(), other.fingerprint or other.data
    )  # fmt: skip


def _chart(history: History) -> str:
    """Accuracies over steps, with what untrained weights and the most frequent class give. "" for none."""
    colours, lines, keys = iter(4 * SERIES), [], []
    for name, word in WHILE_TRAINING.items():
        steps, values = history.column(name, events=True)
        if steps:
            colour = next(colours)
            lines.append(Line(word, steps, values, colour, points=len(steps) < 30))
            keys.append(key(f"{word} while training", colour))
    newest = [each for each in newest_of_each(history.evaluations) if not each.variant]
    for head in (each for each in newest if not each.untrained):
        protocol, alike = head.protocol, [each for each in history.evaluations if _measured_alike(each, head)]
        found = {each.step: each.top1 for each in alike}
        if protocol != "knn" or not history.column("knn_top1", events=True)[0]:  # which would be the same, or nearly
            name, colour = top1_name(head).replace(" top-1", ""), next(colours)
            lines.append(Line(name, sorted(found), [found[step] for step in sorted(found)], colour, points=True))
            keys.append(key(name, colour))
    if all(len(line.x_N) < 2 for line in lines):  # dots alone say no more than the table
        return ""
    references = []
    first = next((each for each in newest if not each.untrained), None)
    if first and (untrained := counterpart(first, history.evaluations)):
        references.append((untrained.top1, f"{NAMES.get(first.protocol, first.protocol)}, untrained"))
    majority = [each.majority for each in newest] + history.column("knn_majority", events=True)[1][-1:]
    if known := [value for value in majority if value is not None]:
        references.append((known[0], "majority"))
    scale, marks = history.scale(), history.marks()
    wide, narrow = (curves(lines, ALT, scale, references, marks, 100, width) for width in (WIDE, WIDTH))
    drawn = f"<div class=if-wide>{wide}</div><div class=if-narrow>{narrow}</div>"
    return figure("Top-1 accuracy, %", drawn, "".join(keys), wide=True)
