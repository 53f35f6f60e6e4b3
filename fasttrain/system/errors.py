"""Errors whose text is one line for a person, and the exit status that each ends a command with."""

from __future__ import annotations

import sys

EXIT_USER_ERROR = 2

EXIT_FAILURE = 1

EXIT_SKIPPED = 3  # done, but some images could not be read


class UserError(Exception):
    """Bad input: something the person who typed the command can put right. Its text is the one line they see."""


class RunError(Exception):
    """Well begun, but it can't go on (disk full, loss not finite, data unreadable). Its text is one line."""


class DataError(ValueError):
    """Something is wrong with data on disk; the text is one line for a person. Base of every error about data."""


def printable(text: object) -> str:
    """Text for a terminal: what a stranger's name holds of control characters is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def note(text: object) -> None:
    """Print a line on stderr that a person should know of."""
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)
