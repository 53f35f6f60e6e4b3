"""What the page shows of the representation itself."""

from __future__ import annotations

import pathlib


def sections(run: pathlib.Path) -> list[str]:
    """The sections on a run's representation, as HTML; none where evaluation has left nothing to show."""
    return []
