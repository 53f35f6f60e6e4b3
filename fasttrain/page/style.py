"""How the pages look: one style sheet, whose colours are variables with a value for light and one for dark."""

from __future__ import annotations

from fasttrain.page.representation_style import STYLE as REPRESENTATION

# by name: light, dark. Charts are drawn in the light ones, which become variables in the page.
COLOURS = {
    "paper": ("#ffffff", "#11161d"), "ink": ("#1c2733", "#e4e9ef"), "soft": ("#5a6776", "#9dabb9"),
    "line": ("#e1e7ed", "#2b3541"), "panel": ("#f6f8fa", "#181f28"), "good": ("#16793a", "#5ccb85"),
    "bad": ("#b42318", "#ff8a7a"),
    "c1": ("#1d62d1", "#74acff"), "c2": ("#ad4e08", "#f3a461"), "c3": ("#123524", "#d5f5e3"),
    "c4": ("#4a1a6b", "#f04fa0"), "c5": ("#102040", "#8080ff"), "c6": ("#8a53a6", "#ff4080"),
    "c7": ("#397360", "#4ff0f0"), "c8": ("#591e00", "#cccc33"),
}  # fmt: skip
SERIES = tuple(light for name, (light, _) in COLOURS.items() if name[1:].isdigit())  # of curves side by side
SOLID = 4  # of them; the others are dashed. Within each kind any colour vision tells them apart
INK, SOFT, LINE, PAPER, BAD = (COLOURS[name][0] for name in ("ink", "soft", "line", "paper", "bad"))
ACCENT = SERIES[0]


def _variables(scheme: int) -> str:
    return " ".join(f"--{name}: {pair[scheme]};" for name, pair in COLOURS.items())


def _in_blocks(kind: str) -> str:
    """Rules for tables whose rows are blocks, with each cell's column named in it."""
    return f"""{kind}, {kind} tbody {{ display: block; }} {kind} thead {{ display: none; }}
{kind} tr {{ display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }}
{kind} td {{ display: inline-block; border: 0; padding: 0 1rem .1rem 0; }}
{kind} td:first-child {{ display: block; font-weight: 600; color: var(--ink); }}
{kind} td > small:only-child {{ display: inline; }}
{kind} td:not(:first-child)::before {{ content: attr(data-name) " "; color: var(--soft); font-weight: normal; }}"""


STYLE = (
    f":root {{ color-scheme: light dark; {_variables(0)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}\n"
    """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); margin: 0; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
main { max-width: 1200px; margin: 0 auto; padding: 2.2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 .2rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .6rem; }
h1, h2, h3, p, td.long, td:first-child, dd, summary, small { overflow-wrap: anywhere; }
a { color: var(--c1); }
p { margin: .3rem 0 1rem; } .sub, .note { color: var(--soft); max-width: 52rem; } .note { font-size: .875rem; }
.state { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .8rem;
  font-size: .875rem; margin: .2rem 0 1rem; } .state.bad { color: var(--bad); border-color: var(--bad); }
.state.good { color: var(--good); border-color: var(--good); }
.advice { border-left: 4px solid var(--c2); background: var(--panel); padding: .6rem 1rem; margin: 1rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; background: var(--panel); }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: .95rem; } .card small { display: block; color: var(--soft); font-size: .8rem; }
.card.first b { color: var(--c1); }
.track { position: relative; height: 8px; border-radius: 4px; background: var(--line); margin: .7rem 0 .6rem; }
.track i { position: absolute; top: 0; height: 100%; border-radius: 4px; background: var(--c1); }
.track i.range { top: -3px; height: 14px; opacity: .35; }
.track i.at { margin-left: -1px; top: -4px; height: 16px; border-radius: 0; }
i.at { width: 3px; background: var(--ink); } i.at.majority { background: repeating-linear-gradient(var(--ink) 0 3px,
  transparent 0 5px); } small i.at { display: inline-block; height: .8rem; margin-right: .35rem; vertical-align: -1px; }
.card em { color: var(--bad); font-style: normal; }
.once { font-size: .95rem; } .once b { font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.once small { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1.2rem 0 0; }
.facts div { min-width: 6rem; } .facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.1rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.if-narrow { display: none; } .if-wide { max-width: 900px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 2rem 1.6rem;
  margin-top: 1rem; }
figure { margin: 0; max-width: 480px; min-width: 0; } figure.wide { max-width: none; }
figure svg { display: block; width: 100%; height: auto; } figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .875rem; color: var(--soft); margin-bottom: .3rem; line-height: 1.4; }
figcaption strong { color: var(--ink); font-weight: 600; display: block; font-size: .95rem; }
svg { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
.key { white-space: nowrap; margin-right: .8rem; font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .35rem; background: var(--of); }
.key.dashed::before { width: 1.1rem; height: .2rem; border-radius: 0; vertical-align: middle;
  background: linear-gradient(90deg, var(--of) 60%, transparent 0) 0 / .45rem; }
.x-epoch, .x-hours { display: none; }
#by-epoch:checked ~ main .x-step, #by-hours:checked ~ main .x-step { display: none; }
#by-epoch:checked ~ main .x-epoch, #by-hours:checked ~ main .x-hours { display: inline; }
.by { position: absolute; opacity: 0; }
.switch { display: inline-flex; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: .4rem 0; }
.switch label { padding: .65rem 1.1rem; cursor: pointer; font-size: .9rem; }
#by-step:checked ~ main label[for=by-step], #by-epoch:checked ~ main label[for=by-epoch],
#by-hours:checked ~ main label[for=by-hours] { background: var(--c1); color: var(--paper); }
#by-step:focus-visible ~ main label[for=by-step], #by-epoch:focus-visible ~ main label[for=by-epoch],
#by-hours:focus-visible ~ main label[for=by-hours] { outline: 3px solid var(--c2); outline-offset: -3px; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: normal; } td.best { font-weight: 700; color: var(--good); }
td.number { white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .8rem; font-weight: normal; }
details { border-bottom: 1px solid var(--line); } summary { cursor: pointer; padding: .7rem 0; min-height: 2.75rem; }
details.brief { border: 0; color: var(--soft); font-size: .8rem; line-height: 1.5rem; }
details.brief summary { padding: .55rem 0; margin: -.55rem 0; min-height: 0; }
td details.brief { display: inline-block; }
.settings { columns: 3 300px; column-gap: 2.4rem; margin: 0 0 1rem; } .settings div { display: flex; gap: 1rem;
  justify-content: space-between; border-bottom: 1px solid var(--line); padding: .3rem 0; break-inside: avoid;
  font-size: .9rem; }
.settings dt { color: var(--soft); } .settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.settings small { color: var(--soft); font-size: .8rem; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; background: var(--panel); padding: .7rem 1rem;
  border-radius: 8px; }
@media (max-width: 940px) { .if-wide { display: none; } .if-narrow { display: block; max-width: 480px; } }
.runs { list-style: none; padding: 0; margin: 1rem 0; columns: 2 320px; } .runs li { padding: .35rem 0; }
"""
    f"{_in_blocks('table.many')} @media (max-width: 720px) {{ {_in_blocks('table:not(.grid)')} }}\n"
    """@media print { main { padding: 0; max-width: none; } .switch { display: none; } figure { break-inside: avoid; } }
""" + REPRESENTATION
)
