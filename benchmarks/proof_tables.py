#!/usr/bin/env python3
"""The tables of docs/proof.md, docs/family.md and README.md, made from what stands in benchmarks/results.

    python benchmarks/proof_tables.py

Fills what stands there between `<!-- proof NAME -->` and `<!-- end -->` with the table NAME, and draws docs/proof.svg
of the cases of docs/proof.md. Takes proof.jsonl and equivalence.jsonl. A row is a case: means and standard deviations
over its seeds, and the mean difference from its control over the seeds that both have, ± that mean's standard error.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from benchmarks import record
from benchmarks.proof import LEARNT, kept

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROOF = ROOT / "docs/proof.md"
PAGES = PROOF, ROOT / "docs/family.md", ROOT / "README.md"
PICTURE = ROOT / "docs/proof.svg"
FIGURE = LEARNT[0]  # that is drawn
NAMES = {"knn_top1": "kNN", "linear_top1": "linear"}
NOTHING = "Not measured yet.\n"
METHODS, EQUIVALENCE = "methods", "equivalence"  # tables of their own form
ALIKE = "options", "epochs", "knn_every", "fingerprint", "device"  # in figures of equivalence.py that belong together
# ResNet-18 at 32 px, 200 epochs, batch 512, the best epoch: lightly's CIFAR-10 benchmark
PUBLISHED = {
    "moco": "84.7", "simclr": "84.8", "byol": "86.8", "simsiam": "76.4", "swav": "84.2", "barlow": "81.9",
    "nnclr": "81.5", "dino": "81.3",
}  # fmt: skip
_PLACE = re.compile(r"(<!-- proof (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """What was measured of a case: figures by seed."""

    name: str
    table: str
    control: str
    by_seed: dict[int, dict[str, Any]]

    def values(self, figure: str) -> list[float]:
        return [each[figure] for each in self.by_seed.values()]

    def differences(self, control: Case, figure: str) -> list[float]:
        """From a control's, of the seeds that both have."""
        shared = sorted(self.by_seed.keys() & control.by_seed.keys())
        return [self.by_seed[seed][figure] - control.by_seed[seed][figure] for seed in shared]


def cases() -> dict[str, Case]:
    """All there are, in the order in which they were first measured."""
    found: dict[str, Case] = {}
    for each in kept():
        case = found.setdefault(each["case"], Case(each["case"], each["table"], each["control"], {}))
        case.by_seed[each["seed"]] = each
    return found


def table(name: str, found: dict[str, Case]) -> str:
    """A table in Markdown: each control, and below it the cases that are compared with it."""
    chosen = [case for case in found.values() if case.table == name]
    if not chosen:
        return NOTHING
    titles = ["case", "seeds", *(title for each in LEARNT for title in (NAMES[each], f"Δ {NAMES[each]}"))]
    rows = [titles, ["---"] * len(titles)]
    for control in dict.fromkeys(case.control for case in chosen):
        below = [case for case in chosen if case.control == control and case.name != control]
        rows += [_row(case, found[control]) for case in (found[control], *below)]
    return _markdown(rows)


def methods_table(found: dict[str, Case]) -> str:
    """A table in Markdown: every method at one budget, beside what others reached in 200 epochs."""
    rows = [["method", "seeds", "budget", *NAMES.values(), "published kNN, 200 epochs"], ["---"] * 6]
    for case in found.values():
        if case.table == METHODS:
            method = case.name.removeprefix("short-")
            figures = [spread(case.values(figure)) for figure in NAMES]
            of = next(iter(case.by_seed.values()))["settings"]
            budget = f"{of['epochs']} epochs, `{of['arch']}`, {of['size']} px, batch {of['batch_size']}"
            rows.append([f"`{method}`", str(len(case.by_seed)), budget, *figures, PUBLISHED.get(method, "–")])
    return _markdown(rows) if len(rows) > 2 else NOTHING


def equivalence_table() -> str:
    """A table in Markdown: the curves of fasttrain's runs and of the plain loop's, of the newest comparison's seeds."""
    file = record.RESULTS / "equivalence.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()] if file.exists() else []
    if not lines:
        return NOTHING
    alike = {each["seed"]: each["knn"] for each in lines if all(each[name] == lines[-1][name] for name in ALIKE)}
    every, sides = lines[-1]["knn_every"], list(lines[-1]["knn"])
    rows = [["epoch", "seeds", *sides, "Δ"], ["---"] * 5]
    curves = [zip(*(knn[side].values() for knn in alike.values()), strict=True) for side in sides]
    for number, of_sides in enumerate(zip(*curves, strict=True), 1):
        apart = [ours - theirs for ours, theirs in zip(*of_sides, strict=True)]
        rows.append([str(number * every), str(len(alike)), *map(spread, of_sides), difference(apart)])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(case: Case, control: Case) -> list[str]:
    cells = [f"`{case.name}`", str(len(case.by_seed))]
    for figure in LEARNT:
        cells.append(spread(case.values(figure)))
        cells.append("" if case is control else difference(case.differences(control, figure)))
    return cells


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def difference(values: Sequence[float]) -> str:
    """Mean ± its standard error, with its sign."""
    if not values:
        return "–"
    mean = f"{round(statistics.fmean(values), 1) + 0.0:+.1f}".replace("-", "−")  # no −0.0
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else mean


def filled(page: str, found: dict[str, Case]) -> str:
    """A page with its tables as the figures are now."""

    def made(place: re.Match[str]) -> str:
        if place[2] == METHODS:
            inside = methods_table(found)
        elif place[2] == EQUIVALENCE:
            inside = equivalence_table()
        else:
            inside = table(place[2], found)
        return f"{place[1]}{inside}{place[3]}"

    return _PLACE.sub(made, page)


def compared(page: str, found: dict[str, Case]) -> list[Case]:
    """The cases of a page's tables that have a control beside themselves."""
    names = {place[2] for place in _PLACE.finditer(page)}
    chosen = [case for case in found.values() if case.table in names and case.name != case.control]
    return [case for case in chosen if case.differences(found[case.control], FIGURE)]


def draw(shown: Sequence[Case], found: dict[str, Case], file: pathlib.Path) -> None:
    """How far each case is from its control by kNN: a dot for each seed, and their mean."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "proof", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.5, 0.6 + 0.24 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        for y, case in enumerate(shown):
            values = case.differences(found[case.control], FIGURE)
            axes.plot(values, [y] * len(values), "o", color="#7a8ba6", markersize=4, alpha=0.7)
            axes.plot([statistics.fmean(values)], [y], "|", color="#1d4ed8", markersize=14, markeredgewidth=2.5)
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_yticks(range(len(shown)), [f"{case.name} − {case.control}" for case in shown])
        axes.invert_yaxis()
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("kNN: points above the control (dot: a seed, bar: mean)")
        figure.savefig(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), facecolor="white")


def main() -> int:
    found = cases()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw(compared(PROOF.read_text(encoding="utf-8"), found), found, PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
