"""Names of files with braces and wildcards in them."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable


def expand(pattern: str, matching: Callable[[str], Iterable[str]] = glob.glob, wildcards: str = "*?[") -> list[str]:
    """Return the files that a pattern with braces (`{000..012}`, `{a,b}`) and wildcards names, sorted.

    matching: gives the files that a pattern with these wildcards names.
    """
    ranged = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    listed = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found := ranged or listed:
        if ranged:
            first, last = ranged.groups()
            values = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            values = found[1].split(",")
        each = (f"{pattern[: found.start()]}{value}{pattern[found.end() :]}" for value in values)
        return sorted({name for one in each for name in expand(one, matching, wildcards)})
    if any(character in pattern for character in wildcards):
        return sorted(matching(pattern))
    return [pattern]
