"""How the sections on the representation look."""

from __future__ import annotations

from collections.abc import Sequence

# Petroff's ten (arXiv 2107.02270), which can be told apart with any colour vision; two are lighter in the dark.
MAP_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
_IN_THE_DARK = {"#bd1f01": "#c82204", "#832db6": "#9035c6"}


# Of a share of 0 and of 1, in the light and in the dark: between them the page's ink can be read on all.
_HEAT = ("#f6f8fa", "#6f9be2"), ("#181f28", "#2f5c9e")
LEVELS = 11


def _heat(scheme: int) -> str:
    """The colours of LEVELS shares."""
    ends = [[int(end[at : at + 2], 16) for at in (1, 3, 5)] for end in _HEAT[scheme]]
    shares = [level / (LEVELS - 1) for level in range(LEVELS)]
    mixed = [[round(a + share * (b - a)) for a, b in zip(*ends, strict=True)] for share in shares]
    return " ".join(f"--h{level}: rgb({r} {g} {b});" for level, (r, g, b) in enumerate(mixed))


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--m{number}: {colour};" for number, colour in enumerate(colours))


STYLE = (
    f":root {{ {_variables(MAP_COLOURS)} {_heat(0)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ "
    f"{_variables([_IN_THE_DARK.get(colour, colour) for colour in MAP_COLOURS])} {_heat(1)} }} }}\n"
    + " ".join(f".m{number} {{ --of: var(--m{number}); }}" for number in range(len(MAP_COLOURS)))
    + " ".join(f".h{level} {{ background: var(--h{level}); }}" for level in range(LEVELS))
    + """
.map { border: 1px solid var(--line); border-radius: 8px; }
.map path { fill: none; stroke: var(--of); stroke-width: 4.5; stroke-linecap: round; opacity: .8; }
.map path.box { stroke-linecap: square; stroke-width: 3.8; }
.map path.cross { stroke-width: 1.3; stroke-linecap: butt; opacity: 1; }
.map text { font-size: 12px; font-weight: 600; text-anchor: middle; fill: var(--ink); stroke: var(--paper);
  stroke-width: 3.5px; paint-order: stroke; }
.keys { margin: .8rem 0 0; font-size: .875rem; line-height: 1.7; } .key.box::before { border-radius: 1px; }
.key.cross::before { content: "×"; background: none; color: var(--of); font-weight: 700; line-height: .7rem; }
.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1.6rem 2rem;
  margin-top: 1rem; }
.query { display: grid; grid-template-columns: 1.5fr 1fr 1fr 1fr; gap: .5rem; align-items: start; }
.query figure:first-child { grid-row: span 2; }
.query img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 5px; }
.query figcaption { font-size: .75rem; margin: .15rem 0 0; line-height: 1.3; overflow: hidden;
  text-overflow: ellipsis; }
.query strong, .query strong + span { font-size: .8rem; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; }
.query figcaption span:only-child { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.query .other img { outline: 2px dashed var(--bad); outline-offset: -2px; } .query .other { color: var(--bad); }
.query .same img { outline: 3px solid var(--good); outline-offset: -3px; } .query .same { color: var(--good); }
.small { image-rendering: pixelated; }
.bars { columns: 3 260px; column-gap: 2rem; margin: .6rem 0 1rem; padding: 0; list-style: none; }
.bars li { display: grid; grid-template-columns: 7.5rem 1fr 3.2rem; gap: .6rem; align-items: center; font-size: .85rem;
  break-inside: avoid; padding: .12rem 0; }
.bars span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars b { font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars i { height: .7rem; border-radius: 2px; background: linear-gradient(var(--c1) 0 0) 0 / var(--share) 100% no-repeat
  var(--line); }
.scroll { overflow-x: auto; max-width: 100%; }
.confusion { width: auto; font-size: .75rem; } .confusion th, .confusion td { border: 1px solid var(--paper); }
.confusion td { text-align: center; vertical-align: middle; padding: 0; min-width: 1.6rem; height: 1.6rem; }
.confusion td.right { outline: 1px solid var(--ink); outline-offset: -2px; }
.confusion th { padding: .1rem .3rem; max-width: min(9rem, 24vw); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.confusion tbody th { position: sticky; left: 0; background: var(--paper); text-align: right; color: var(--ink); }
.confusion thead th { vertical-align: bottom; } .confusion thead span { writing-mode: vertical-rl; max-height: 8rem;
  overflow: hidden; text-overflow: ellipsis; transform: rotate(180deg); }
.pairs { columns: 2 300px; column-gap: 2rem; padding: 0; list-style: none; font-size: .9rem; }
.pairs li { padding: .2rem 0; break-inside: avoid; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.seen { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 1rem 1.6rem;
  margin-top: 1rem; }
.seen figure { display: flex; gap: .6rem; align-items: center; }
.seen img { height: 116px; width: auto; max-width: 56%; object-fit: contain; border-radius: 5px; }
"""
)
