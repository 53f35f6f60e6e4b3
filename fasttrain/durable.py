"""Files that are old, new or absent, never half: whatever ends the process or the machine while they are written."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import BinaryIO

from fasttrain.dataprep.manifest import publish


def replace_file(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file under a temporary name (its suffix is .tmp), flush it to the disk, and rename it.

    Raises what `write` does, and OSError; the temporary file is then gone and the old one is still there.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
