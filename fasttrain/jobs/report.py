"""Write a run's report: one self-contained page with its figures, curves, samples and settings."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import pathlib

from PIL import Image

from fasttrain.jobs.options import ReportConfig
from fasttrain.run.evaluations import NAMES, Evaluation, read_evaluations
from fasttrain.run.folder import config_of, read_record
from fasttrain.run.metrics import FIGURES, LARGEST, read_lines
from fasttrain.system.cli import warn
from fasttrain.system.durable import replace_file
from fasttrain.system.regular import read_at_most

PICTURE_BYTES = 1 << 26
SUBTITLE = ("method", "arch", "data")
STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5d6b7a; --line: #e3e8ee; --accent: #1f6feb; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  max-width: 1080px; margin: 0 auto; padding: 2rem 1.2rem 4rem; background: #fff; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p.sub { color: var(--soft); margin: .2rem 0 1.6rem; } p.note { color: var(--soft); font-size: .82rem; margin: .4rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.6rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.3; }
.card span + span { font-size: .78rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
.curves svg, img { width: 100%; height: auto; } figure { margin: 0; }
img { border: 1px solid var(--line); border-radius: 10px; padding: .4rem; box-sizing: border-box; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); }
.settings { columns: 3 260px; column-gap: 2rem; } .settings div { display: flex; justify-content: space-between;
  gap: 1rem; border-bottom: 1px solid var(--line); padding: .25rem 0; font-size: .88rem; break-inside: avoid; }
.settings span:first-child { color: var(--soft); }
.settings span:last-child { overflow-wrap: anywhere; text-align: right; }
"""


def write_report(run: pathlib.Path) -> dict:
    """Write run/report.html from what the run folder holds; returns the run's figures in one flat object.

    Raises UserError when it is no run.
    """
    record = read_record(config_of(run))
    metrics, measured, damaged = _entries(run)
    evaluations = read_evaluations(run)
    newest = newest_of_each(evaluations)
    config, environment = record["config"], record.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    subtitle = [str(config.get(name, "?")) for name in SUBTITLE] + [str(environment.get("machine", "?"))]
    parts = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        f"<p class=sub>{html.escape(' · '.join(subtitle))}</p>",
        f"<div class=cards>{''.join(_card(*card) for card in _headlines(metrics, newest))}</div>",
    ]
    behind = sorted({each.step for each in newest if metrics and each.step != metrics[-1]["step"]})
    if behind:
        done, now = " and ".join(f"{step:,}" for step in behind), metrics[-1]["step"]
        parts.append(f"<p class=sub>The accuracy is that of step {done}; training has gone on to step {now:,}.</p>")
    if evaluations:
        parts.append(f"<h2>Accuracy</h2>{_table(evaluations)}")
    if metrics:
        curves = _curves(metrics) + _knn_curve(measured)
        parts.append(f"<h2>Curves</h2><div class=curves>{''.join(curves)}</div>")
    if damaged:
        parts.append(f"<p class=sub>{damaged:,} damaged line(s) of metrics.jsonl are left out.</p>")
    if picture := _picture(run / "samples.png"):
        parts.append(
            "<h2>Views</h2><p class=sub>Source images, and the views made of each before the first step."
            f'</p><img alt="source images and their augmented views" src="data:image/png;base64,{picture}">'
        )
    init = record.get("init")
    started = {"init digest": init.get("digest")} if isinstance(init, dict) else {}
    settings = {**config, **started, **environment}
    rows = "".join(
        f"<div><span>{html.escape(name.replace('_', ' '))}</span><span>{html.escape(str(value))}</span></div>"
        for name, value in settings.items()
    )
    parts.append(f"<h2>Settings</h2><div class=settings>{rows}</div>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(run.resolve().name)} – fasttrain</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    replace_file(run / "report.html", lambda file: file.write(page.encode("utf-8", "backslashreplace")))  # odd names
    return {**_figures(newest), "images_per_sec": round(throughput(metrics), 1), "report": str(run / "report.html")}


def newest_of_each(evaluations: list[Evaluation]) -> list[Evaluation]:
    """The newest of each protocol, of the run's own weights and of untrained ones; in a fixed order."""
    newest = {(each.protocol, not each.untrained): each for each in evaluations}
    return [newest[key] for key in sorted(newest, reverse=True, key=lambda key: (key[1], key[0] == "knn"))]


def _table(evaluations: list[Evaluation]) -> str:
    """Every accuracy that was measured, the newest first."""
    names = ("protocol", "step", "top-1, %", "balanced, %", "majority, %", "images", "data", "settings")
    rows = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
    for each in reversed(evaluations):
        protocol = NAMES.get(each.protocol, each.protocol) + (", untrained" if each.untrained else "")
        settings = ", ".join(f"{name} {value}" for name, value in each.settings.items())
        figures = (_percent(value) for value in (each.top1, each.balanced, each.majority))
        images = f"{each.num_images:,}" if each.num_images else "–"
        cells = (protocol, f"{each.step:,}", *figures, images, pathlib.Path(each.data).name, settings)
        rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    note = "majority: what naming the most frequent class always would give; balanced: the mean over the classes"
    return f"<table>{''.join(rows)}</table><p class=note>{note}</p>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _entries(run: pathlib.Path) -> tuple[list[dict], list[dict], int]:
    """The entries of training, those of kNN accuracy measured during it, and how many lines are damaged."""
    entries, damaged = read_lines(run / "metrics.jsonl")
    if damaged:
        warn(f"{run / 'metrics.jsonl'}: {damaged} damaged line(s) left out of the report")
    return [e for e in entries if "images_per_sec" in e], [e for e in entries if "knn_top1" in e], damaged


def _picture(path: pathlib.Path) -> str:
    """A PNG in base64; "" where there is none, or, with a warning, a damaged one."""
    try:
        content = read_at_most(path, PICTURE_BYTES)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.verify()
        return base64.b64encode(content).decode()
    except FileNotFoundError:
        return ""
    except Exception as error:  # Pillow raises many kinds for damage
        warn(f"{path} is left out of the report: {getattr(error, 'strerror', None) or 'it is damaged'}")
        return ""


def throughput(metrics: list[dict]) -> float:
    """Median images/s of a run's entries, the first left out (it includes start-up) when there are others."""
    rates = sorted(entry["images_per_sec"] for entry in metrics[1:] or metrics)
    return rates[len(rates) // 2] if rates else 0.0


def _headlines(metrics: list[dict], evaluations: list[Evaluation]) -> list[tuple[str, ...]]:
    """(figure, what it is, and perhaps what it is to be compared with) for the cards on top."""
    cards: list[tuple[str, ...]] = []
    for each in evaluations:
        features = each.settings.get("features", "encoder")
        of = "" if features == "encoder" else f" of the {features}"
        name = f"{NAMES.get(each.protocol, each.protocol)} top-1{of}{', untrained' if each.untrained else ''}"
        beside = {"majority": each.majority, "balanced": each.balanced}
        named = ", ".join(f"{what} {_percent(value)}" for what, value in beside.items() if value is not None)
        cards.append((f"{each.top1:.1f} %", name, named))
    if metrics:
        last = metrics[-1]
        cards += [(f"{throughput(metrics):,.0f}", "images per second"), (f"{last['step']:,}", "steps")]
        cards += [(f"{last['loss']:.3f}", "last loss")] if last.get("loss") is not None else []
        cards += [(f"{last['skipped']:,}", "steps skipped, not finite")] if last.get("skipped") else []
    return cards


def _card(figure: str, *lines: str) -> str:
    spans = "".join(f"<span>{html.escape(line)}</span>" for line in lines)
    return f"<div class=card><b>{html.escape(figure)}</b>{spans}</div>"


def _curves(metrics: list[dict]) -> list[str]:
    """One drawing for each loss term, the learning rate, the rate and the data wait."""
    terms = [name for name in metrics[-1] if name not in FIGURES]
    titles = {"lr": "learning rate", "images_per_sec": "images per second", "data_wait": "waiting for data, % of time"}
    scale = {"data_wait": 100.0}
    steps = [entry["step"] for entry in metrics]
    curves = []
    for name in [*terms, *titles]:
        values = [_drawn(entry.get(name)) * scale.get(name, 1.0) for entry in metrics]
        curves.append(_curve(titles.get(name, name.replace("_", " ")), steps, values))
    return curves


def _drawn(value: float | None) -> float:
    """As it is drawn; not at all where every step of the entry was skipped, or the value is not finite."""
    return float(value) if value is not None and abs(value) <= LARGEST else math.nan


def _knn_curve(entries: list[dict]) -> list[str]:
    if not entries:
        return []
    steps, values = [entry["step"] for entry in entries], [entry["knn_top1"] for entry in entries]
    return [_curve("kNN top-1 while training, %", steps, values, entries[-1].get("knn_majority"))]


def _curve(title: str, steps: list[int], values: list[float], majority: float | None = None) -> str:
    """majority: what guessing would give, drawn as a line."""
    from matplotlib.figure import Figure  # here: it takes a second that other commands need not wait

    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    alone = len(steps) == 1  # a line would be none
    axes.plot(steps, values, color="#1f6feb", linewidth=1.4, marker="o" if alone else None, markersize=4)
    axes.set_title(title.encode("utf-8", "backslashreplace").decode(), fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if majority is not None:
        axes.axhline(majority, color="#5d6b7a", linewidth=0.9, linestyle="--")
        axes.annotate(
            "majority", (1, majority), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
        )
    numbers = [value for value in (*values, majority or 0.0) if not math.isnan(value)]
    if numbers and min(numbers) >= 0:
        axes.set_ylim(bottom=0, top=max(max(numbers) * 1.08, 1e-9))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _figures(newest: list[Evaluation]) -> dict[str, float]:
    """The accuracies, and the last step that was evaluated."""
    figures: dict[str, float] = {"step": max(each.step for each in newest)} if newest else {}
    for each in newest:
        figures |= each.figures()
    return figures


def report(options: ReportConfig) -> int:
    print(json.dumps(write_report(pathlib.Path(options.run))))
    return 0
