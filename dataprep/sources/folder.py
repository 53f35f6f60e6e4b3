"""Folders of images as a source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.folder import list_folder, read_regular
from fasttrain.formats.listing import Sample


class FolderReader(NamedTuple):
    """Reads the files of a folder."""

    root: str

    def read(self, sample: Sample) -> bytes:
        return read_regular(os.path.join(self.root, sample.path))

    def size(self, sample: Sample) -> int:
        try:
            return os.stat(os.path.join(self.root, sample.path)).st_size
        except OSError:  # reported by read
            return 0


def scan_folder(root: str | os.PathLike[str]) -> Source:
    """List the images of a folder; raises what list_folder does."""
    found = list_folder(Path(root))
    reader = FolderReader(str(root))
    return Source(
        Path(root), found.classes, found.splits, reader, (), found.skipped, unused=found.unused, notes=found.notes
    )
