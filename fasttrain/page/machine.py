"""How the machine was used: images per second, waiting, memory."""

from __future__ import annotations

import statistics

from fasttrain.page.charts import Line, curves
from fasttrain.page.history import History, number
from fasttrain.page.shell import charts, figure, key, section, text
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
    scale, marks = history.scale(), history.marks()
    steps, values = history.column("images_per_sec")
    drawn = curves([Line("", steps, values, smooth=True)], "images per second over steps", scale, (), marks)
    figures = [figure("Images per second", drawn, text(f"Median {history.throughput:,.0f}."))]
    waits = [(word, *history.column(name, 100.0)) for name, word in SIDES.items()]
    lines = [Line(word, steps, shares, colour, smooth=True)
             for (word, steps, shares), colour in zip(waits, SERIES, strict=False) if any(shares)]  # fmt: skip
    if lines:
        keys = "".join(key(line.name, line.colour) for line in lines)
        drawn = curves(lines, "waiting, in percent of the time, over steps", scale, (), marks, 100)
        figures.append(figure("Waiting, % of the time", drawn, f"{keys}<br>{text(CAPTION)}"))
    for name, words in MEMORY.items():
        steps, values = history.column(name)
        if steps:
            drawn = curves([Line("", steps, values)], f"{words} over steps", scale, (), marks)
            figures.append(figure(f"{words[:1].upper()}{words[1:]}", drawn))
    said = _advice(history)
    return section("Speed and memory", f"<p class=advice>{text(said)}</p>" if said else "", charts(figures))


def _advice(history: History) -> str:
    """What to change where the newer half of the run waited for more than WAIT of the time."""
    newer = history.entries[len(history.entries) // 2 :]
    shares = {name: statistics.median(number(entry.get(name)) for entry in newer) for name in SIDES}
    cores = history.starts[-1]["cores"] if history.starts else 1
    said = advice(shares, "gpu_gib" not in newer[-1], history.config.get("workers"), cores)
    return f"In the newer half of the run, {said}." if said and max(shares.values()) > WAIT else ""
