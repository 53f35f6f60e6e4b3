"""Steps that were skipped because their gradients were not finite: the count, and when there are too many."""

from __future__ import annotations

from typing import NamedTuple

MAX_SKIPPED = 20  # steps in a row; fp16 may need some while it looks for its scale, 2^16 at first and halved each time


MAX_SKIPPED_PART = 0.05  # of all steps, beyond MAX_SKIPPED


class Skips(NamedTuple):
    """Steps that were skipped: in all, in a row until now, and the number of the last one (the first step is 0)."""

    total: int = 0
    in_a_row: int = 0
    last: int = -1

    def too_many(self, steps: int) -> bool:
        """After so many steps, does it make sense to go on?"""
        return self.in_a_row >= MAX_SKIPPED or self.total > MAX_SKIPPED + MAX_SKIPPED_PART * steps
