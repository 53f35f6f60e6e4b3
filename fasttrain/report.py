#!/usr/bin/env python3
"""Write a run's report: one self-contained page with its figures, curves, samples and settings.

python fasttrain/report.py RUN
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import pathlib
import sys
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

from fasttrain.run.metrics import FIGURES, read_metrics
from fasttrain.system.cli import finish, parse
from fasttrain.system.durable import replace_file
from fasttrain.system.errors import UserError

EVALUATION = "evaluation.json"
SUBTITLE = ("method", "arch", "data")
STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5d6b7a; --line: #e3e8ee; --accent: #1f6feb; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  max-width: 1080px; margin: 0 auto; padding: 2rem 1.2rem 4rem; background: #fff; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p.sub { color: var(--soft); margin: .2rem 0 1.6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.6rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
.curves svg, img { width: 100%; height: auto; } figure { margin: 0; }
img { border: 1px solid var(--line); border-radius: 10px; padding: .4rem; box-sizing: border-box; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.settings { columns: 3 260px; column-gap: 2rem; } .settings div { display: flex; justify-content: space-between;
  gap: 1rem; border-bottom: 1px solid var(--line); padding: .25rem 0; font-size: .88rem; break-inside: avoid; }
.settings span:first-child { color: var(--soft); }
.settings span:last-child { overflow-wrap: anywhere; text-align: right; }
"""


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN/report.html: figures, curves, samples and settings on one self-contained page.

    The last line of the output is JSON: the run's figures and the page's path.
    """

    run: str
    """Run folder; by place, or by --run."""


def write_report(run: pathlib.Path) -> pathlib.Path:
    """Write run/report.html from what the run folder holds; returns its path. Raises UserError when it is no run."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder (no config.json)")
    record = json.loads((run / "config.json").read_text())
    metrics, knn = _entries(run)
    evaluation = _read_evaluation(run)
    if not evaluation and (run / EVALUATION).exists():
        print(f"warning: {run / EVALUATION} is damaged, so the report leaves it out: run evaluate.py again",
              file=sys.stderr)  # fmt: skip
    config, environment = record["config"], record["environment"]
    parts = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        f"<p class=sub>{html.escape(' · '.join([*(config[n] for n in SUBTITLE), environment['machine']]))}</p>",
        f"<div class=cards>{''.join(_card(*card) for card in _headlines(metrics, evaluation))}</div>",
    ]
    if metrics and evaluation and evaluation["step"] != metrics[-1]["step"]:
        done, now = evaluation["step"], metrics[-1]["step"]
        parts.append(f"<p class=sub>The accuracy is that of step {done:,}; training has gone on to step {now:,}.</p>")
    if metrics:
        curves = _curves(metrics) + ([_curve("kNN top-1 while training, %", *knn)] if knn[0] else [])
        parts.append(f"<h2>Curves</h2><div class=curves>{''.join(curves)}</div>")
    if (run / "samples.png").exists():
        picture = base64.b64encode((run / "samples.png").read_bytes()).decode()
        parts.append(
            "<h2>Views</h2><p class=sub>Source images, and the views made of each before the first step."
            f'</p><img alt="source images and their augmented views" src="data:image/png;base64,{picture}">'
        )
    settings = {**config, **environment}
    if evaluation:
        settings |= {f"evaluation {name}": value for name, value in evaluation["settings"].items()}
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
    replace_file(run / "report.html", lambda file: file.write(page.encode()))
    return run / "report.html"


def _read_evaluation(run: pathlib.Path) -> dict:
    """What evaluate.py found last; nothing where it has not been run, or its file is damaged."""
    try:
        return json.loads((run / EVALUATION).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _entries(run: pathlib.Path) -> tuple[list[dict], tuple[list[int], list[float]]]:
    """The entries of training, and the steps and values of kNN accuracy measured during it."""
    entries = read_metrics(run / "metrics.jsonl")
    knn = [entry for entry in entries if "knn_top1" in entry]
    training = [entry for entry in entries if "images_per_sec" in entry]
    return training, ([entry["step"] for entry in knn], [entry["knn_top1"] for entry in knn])


def throughput(metrics: list[dict]) -> float:
    """Median images/s of a run's entries, the first left out (it includes start-up) when there are others."""
    rates = sorted(entry["images_per_sec"] for entry in metrics[1:] or metrics)
    return rates[len(rates) // 2] if rates else 0.0


def _headlines(metrics: list[dict], evaluation: dict) -> list[tuple[str, str]]:
    """(figure, what it is) for the cards on top."""
    cards = []
    names = {"knn_top1": "kNN top-1", "linear_top1": "linear top-1"}
    for key, name in names.items():
        cards += [(f"{evaluation[key]:.1f} %", name)] if key in evaluation else []
        untrained = evaluation.get(f"{key}_untrained")
        cards += [(f"{untrained:.1f} %", f"{name}, untrained")] if untrained is not None else []
    if metrics:
        last = metrics[-1]
        cards += [(f"{throughput(metrics):,.0f}", "images per second"), (f"{last['step']:,}", "steps")]
        cards += [(f"{last['loss']:.3f}", "last loss")] if last["loss"] is not None else []
        cards += [(f"{last['skipped']:,}", "steps skipped, not finite")] if last.get("skipped") else []
    return cards


def _card(figure: str, name: str) -> str:
    return f"<div class=card><b>{html.escape(figure)}</b><span>{html.escape(name)}</span></div>"


def _curves(metrics: list[dict]) -> list[str]:
    """One drawing for each loss term, the learning rate, the rate and the data wait."""
    terms = [name for name in metrics[-1] if name not in FIGURES]
    titles = {"lr": "learning rate", "images_per_sec": "images per second", "data_wait": "waiting for data, % of time"}
    scale = {"data_wait": 100.0}
    steps = [entry["step"] for entry in metrics]
    curves = []
    for name in [*terms, *titles]:
        # None: every step of the entry was skipped
        values = [math.nan if e[name] is None else e[name] * scale.get(name, 1.0) for e in metrics]
        curves.append(_curve(titles.get(name, name.replace("_", " ")), steps, values))
    return curves


def _curve(title: str, steps: list[int], values: list[float]) -> str:
    from matplotlib.figure import Figure  # here: it takes a second that other commands need not wait

    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#1f6feb", linewidth=1.4)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    numbers = [value for value in values if not math.isnan(value)]
    if numbers and min(numbers) >= 0:
        axes.set_ylim(bottom=0, top=max(max(numbers) * 1.08, 1e-9))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def summary(run: pathlib.Path) -> dict:
    """A run's figures in one flat object, as the command prints it last."""
    evaluation = _read_evaluation(run)
    figures = {name: value for name, value in evaluation.items() if name != "settings"}
    rate = throughput(_entries(run)[0])
    return {**figures, "images_per_sec": round(rate, 1), "report": str(run / "report.html")}


def report(options: ReportConfig) -> int:
    run = pathlib.Path(options.run)
    write_report(run)
    print(json.dumps(summary(run)))
    return 0


def main(argv: list[str] | None = None) -> int:
    return finish(lambda: report(parse(ReportConfig, argv, positional=True)))


if __name__ == "__main__":
    raise SystemExit(main())
