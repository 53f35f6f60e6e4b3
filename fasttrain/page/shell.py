"""What every page is made of: its frame, sections, figures and tables, as HTML."""

from __future__ import annotations

import html
import pathlib
import re
from collections.abc import Iterable, Sequence

from fasttrain.page.style import COLOURS, SERIES, SOLID, STYLE
from fasttrain.system.durable import replace_file
from fasttrain.system.errors import printable

LONG_WORD = 24  # characters
AXES = {"step": "steps", "epoch": "epochs", "hours": "hours"}  # what the curves can be drawn over


class Html(str):
    """A table's cell that is HTML by itself, in which strangers' words are escaped already."""


def text(value: object) -> str:
    """A stranger's words as HTML, in text and in quoted attributes; what can't be printed is escaped."""
    return html.escape(printable(value))


def section(title: str, *content: str, note: str = "") -> str:
    """A part of a page under a heading; "" where it would hold nothing. note: HTML below the heading."""
    if not any(content):
        return ""
    said = f"<p class=note>{note}</p>" if note else ""
    return f"<section><h2>{text(title)}</h2>{said}{''.join(content)}</section>"


def charts(figures: Iterable[str]) -> str:
    """Figures side by side, as many as the page is wide; "" for none."""
    inside = "".join(figures)
    return f"<div class=charts>{inside}</div>" if inside else ""


def figure(title: str, picture: str, caption: str = "", wide: bool = False) -> str:
    """A picture (SVG, or an img with its alt text) under its title. caption: HTML. wide: over the whole page."""
    kind = " class=wide" if wide else ""
    return f"<figure{kind}><figcaption><strong>{text(title)}</strong>{caption}</figcaption>{picture}</figure>"


def key(name: str, colour: str, value: str = "") -> str:
    """What a colour of COLOURS, by its light value, stands for in a figure."""
    variable = next(each for each, (light, _) in COLOURS.items() if light == colour)
    kind = '"key dashed"' if colour in SERIES[SOLID:] else "key"
    return f'<span class={kind} style="--of: var(--{variable})">{text(name)}{text(f" {value}" if value else "")}</span>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], best: Iterable[tuple[int, int]] = (), kind: str = ""
) -> str:
    """Cells are plain words, or Html. best: places (row, column) of marked cells. kind: "many" for more columns than a
    page is wide."""
    marked = set(best)
    lines = []
    for y, row in enumerate(rows):
        cells = (
            f'<td data-name="{text(name)}" class="{_kinds(cell, (y, x) in marked)}">'
            f"{cell if isinstance(cell, Html) else text(cell)}</td>"
            for x, (name, cell) in enumerate(zip(head, row, strict=True))
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    named = "".join(f"<th>{text(name)}</th>" for name in head)
    whole = f"<table class='{kind}'><thead><tr>{named}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return whole if lines else ""


def _kinds(cell: str, best: bool) -> str:
    """The classes of a cell: a number is never broken into two lines, and of words only long ones are."""
    long = not isinstance(cell, Html) and any(len(word) > LONG_WORD for word in cell.split())
    return " ".join(["number"] * bool(re.fullmatch(r"[\d.,–]+", cell)) + ["long"] * long + ["best"] * best)


def pairs(values: Iterable[tuple[str, str]], kind: str) -> str:
    """Names with their values, as a list of a kind that the style sheet knows; values are HTML. "" for none."""
    inside = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in values)
    return f"<dl class={kind}>{inside}</dl>" if inside else ""


def folded(title: str, content: str) -> str:
    """What is read when it is asked for."""
    return f"<details><summary>{text(title)}</summary>{content}</details>" if content else ""


def switch() -> str:
    """Lets the reader choose what all curves of a page are drawn over; works without a script."""
    return f"<div class=switch>{''.join(f'<label for=by-{name}>{AXES[name]}</label>' for name in AXES)}</div>"


def write_page(path: pathlib.Path, title: str, parts: Iterable[str], kind: str) -> None:
    """Write a page whole or not at all. kind: of the page, for those who would write another one in its place."""
    chosen = "".join(
        f'<input class=by type=radio name=by id=by-{name} aria-label="over {what}"{" checked" * (name == "step")}>'
        for name, what in AXES.items()
    )
    content = _with_own_ids("".join(parts))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><meta name="generator" content="fasttrain {kind}">'
        f'<link rel="icon" href="data:,"><title>{text(title)} – fasttrain</title><style>{STYLE}</style></head>'
        f"<body>{chosen if switch() in content else ''}<main>{content}</main></body></html>\n"
    )
    replace_file(path, lambda file: file.write(page.encode()))


def _with_own_ids(page: str) -> str:
    """Each picture's ids by its number: pictures are drawn apart, and ids are the page's."""
    pictures = re.split(r"(<svg .*?</svg>)", page, flags=re.DOTALL)
    for number, place in enumerate(range(1, len(pictures), 2)):
        names = dict.fromkeys(re.findall(r'\bid="([^"]+)"', pictures[place]))
        new = {name: f"p{number}-{n}" for n, name in enumerate(names)}
        pattern = r'(\bid="|href="#|url\(#)([^")]+)'
        pictures[place] = re.sub(pattern, lambda m: m[1] + new.get(m[2], m[2]), pictures[place])  # noqa: B023
    return "".join(pictures)
