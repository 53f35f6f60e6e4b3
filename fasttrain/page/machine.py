"""How the machine was used: images per second, waiting, memory."""

from __future__ import annotations

import statistics

from fasttrain.page.charts import Line
from fasttrain.page.history import History, number
from fasttrain.page.over_steps import over_steps
from fasttrain.page.shell import charts, section, text
from fasttrain.page.style import SERIES
from fasttrain.run.health import MEMORY, WAIT, advice

SIDES = {"data_wait": "images", "transfer_wait": "copy", "views_time": "views"}
CAPTION = (
    "Images: until a batch is there; copy: the part of it on the way to the GPU; views: making them, which on a CPU is "
    "work like any other."
)


def machine(history: History) -> str:
    """The section; "" without entries."""
    if not history.entries:
        return ""
    line = Line("", *history.column("images_per_sec"), smooth=True)
    figures = [over_steps(history, "Images per second", [line], f"Median {history.throughput:,.0f}.")]
    waits = [(word, *history.column(name, 100.0)) for name, word in SIDES.items()]
    lines = [Line(word, steps, shares, colour, smooth=True)
             for (word, steps, shares), colour in zip(waits, SERIES, strict=False) if any(shares)]  # fmt: skip
    if lines:
        figures.append(over_steps(history, "Waiting, % of the time", lines, CAPTION, 100))
    for name, words in MEMORY.items():
        line = Line("", *history.column(name))
        figures += [over_steps(history, words[:1].upper() + words[1:], [line])] if line.x_N else []
    said = _advice(history)
    return section("Speed and memory", f"<p class=advice>{text(said)}</p>" if said else "", charts(figures))


def _advice(history: History) -> str:
    """What to change where the newer half of the run waited for more than WAIT of the time."""
    newer = history.entries[len(history.entries) // 2 :]
    shares = {name: statistics.median(number(entry.get(name)) for entry in newer) for name in SIDES}
    cores = history.starts[-1]["cores"] if history.starts else 1
    said = advice(shares, "gpu_gib" not in newer[-1], history.config.get("workers"), cores)
    return f"In the newer half of the run, {said}." if said and max(shares.values()) > WAIT else ""
