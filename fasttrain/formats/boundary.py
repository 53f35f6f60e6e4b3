"""The boundary around a stranger's file: whatever reading it raises ends in one line, as damage does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fasttrain.formats.listing import SourceError
from fasttrain.system.errors import DataError, RunError, UserError

DEBUG = "FASTTRAIN_DEBUG"  # with 1, what no reader expects passes through, with its traceback
_LONGEST = 400  # characters of a reason: a file may quote itself in an error without end


def reason_of(error: Exception) -> str:
    """Return why a file or a sample can't be used, in one line of bounded length.

    With FASTTRAIN_DEBUG=1 an error that is neither a DataError nor an OSError is raised again.
    """
    if isinstance(error, OSError):
        text = error.strerror or str(error)
    elif isinstance(error, DataError):
        text = str(error)
    elif os.environ.get(DEBUG) == "1":
        raise error
    elif isinstance(error, MemoryError):
        text = "it takes more memory than there is"
    else:
        text = f"damaged: {type(error).__name__}: {error}"
    return one_line(text)


def one_line(text: object, longest: int = _LONGEST) -> str:
    """Return text as one line of at most so many characters."""
    line = " ".join(str(text)[: 4 * longest].split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


@contextlib.contextmanager
def boundary(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every error while a file is read into a SourceError of one line that names it.

    UserError and RunError, which are not about the file, a missing package, and with FASTTRAIN_DEBUG=1 all that no
    reader expects pass through.
    """
    try:
        yield
    except (UserError, RunError, ImportError):
        raise
    except Exception as error:
        reason = reason_of(error)
        name = os.fspath(error.filename) if isinstance(error, OSError) and error.filename else os.fspath(path)
        name = name if isinstance(name, str) else os.fsdecode(name)
        raise SourceError(reason if str(path) in reason else f"{name}: {reason}") from None
