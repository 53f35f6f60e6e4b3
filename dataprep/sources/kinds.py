"""Where images come from: folders, archives, WebDataset tars, tables, arrays; each a `Source` in a fixed order."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fasttrain.dataprep.sources.archive import tar_source, zip_source
from fasttrain.dataprep.sources.beton import beton_source
from fasttrain.dataprep.sources.cifar import cifar_folder, cifar_source
from fasttrain.dataprep.sources.files import numbered
from fasttrain.dataprep.sources.folder import scan_folder
from fasttrain.dataprep.sources.labels import NoClasses
from fasttrain.dataprep.sources.npz import npz_source
from fasttrain.dataprep.sources.parquet import parquet_source
from fasttrain.dataprep.sources.source import Source
from fasttrain.dataprep.sources.webdataset import looks_like_samples, webdataset_source
from fasttrain.formats.beton_set import beton_files
from fasttrain.formats.boundary import boundary
from fasttrain.formats.listing import (
    IMAGE_EXTENSIONS,
    Sample,
    SourceError,
    file_states,
    listing_digests,
    other_file,
)
from fasttrain.formats.splits import split_of
from fasttrain.storage.patterns import expand

Kind = Literal["auto", "folder", "tar", "zip", "webdataset", "parquet", "cifar", "npz", "beton"]

KINDS: dict[str, Callable[[Path], Source] | Callable[[Path, str], Source]] = {
    "folder": scan_folder,
    "tar": tar_source,
    "zip": zip_source,
    "webdataset": webdataset_source,
    "parquet": parquet_source,
    "cifar": cifar_source,
    "npz": npz_source,
    "beton": beton_source,
}
_WITH_NAMED_LABELS = ("webdataset", "parquet", "npz")
# To recognise a folder: of each level of folders so many entries in so many folders.
_TARS_LOOKED_AT, _LEVELS_LOOKED_AT, _FOLDERS_LOOKED_AT, _ENTRIES_LOOKED_AT = 3, 16, 100, 10_000


def open_source(path: Path, kind: Kind = "auto", labels: str = "auto") -> Source:
    """List the samples of a source of this kind, or of the kind that `recognise` sees.

    labels: "auto" goes on without labels where they are no classes, and notes it; "none" reads none; else the name of a
    column, a member's extension, a key of a .json or an array that holds them.

    Raises:
        SourceError: it is missing, damaged, of another kind, or holds no images, or not the labels that are asked for.
        UserError: a package that this kind needs is missing.
    """
    with boundary(path):
        found = recognise(path) if kind == "auto" else kind
        if kind == "auto" and found == "tar" and labels not in ("auto", "none"):
            found = "webdataset"  # its labels lie in other members than is customary
        source = _opened(path, found, labels)
        if kind == "auto" and found == "tar" and not source.classes and other_file(".x.cls") in source.unused.reasons:
            source = _opened(path, "webdataset", labels)  # the labels come late: after all images
        return replace(source, classes=tuple(map(_storable, source.classes)))


def _storable(name: str) -> str:
    """Return the name of a class without what no encoding can write; bytes of a file's name that are no text may stay.

    JSON, also that in a table, may hold halves of characters.
    """
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace").decode()
    return name


def _opened(path: Path, kind: str, labels: str) -> Source:
    read: Callable[..., Source] = KINDS[kind]
    if kind not in _WITH_NAMED_LABELS:
        if labels not in ("auto", "none"):
            raise SourceError(f"{path}: --labels {labels}: a source of kind {kind} has its own: auto or none")
        source = read(path)
    else:
        source = _named_labels(path, read, labels)
    if empty := [split for split, listing in source.splits.items() if not listing]:
        raise SourceError(f"{path}: no images in the {empty[0]} split")
    if labels != "none":
        return source
    unlabelled = {split: listing.unlabelled() for split, listing in source.splits.items()}
    return replace(source, classes=(), splits=unlabelled)


def _named_labels(path: Path, read: Callable[..., Source], labels: str) -> Source:
    try:
        source = read(path, labels)
    except NoClasses as error:
        if labels != "auto":
            raise
        source = read(path, "none")
        source.notes.append(f"no labels: {error}")
    if labels not in ("auto", "none") and not source.classes:
        raise SourceError(f"{path}: --labels {labels}: there are none, or no classes")
    return source


def recognise(path: Path) -> str:
    """Return the kind of a source by the names, and for tars by their first members. Raises SourceError, OSError."""
    if path.is_dir():
        return _folder_kind(path)
    suffix = path.suffix.lower()
    if suffix == ".tar" and path.is_file():
        return _tar_kind([str(path)])
    if not path.exists():
        files = expand(str(path))
        if files == [str(path)]:
            raise SourceError(f"{path}: no such folder or file")
        if not files:
            raise SourceError(f"{path}: no file has such a name")
        return _kind_of_several(path, files)
    if beton_files(path):
        return "beton"
    kind = {".zip": "zip", ".npz": "npz", ".parquet": "parquet"}.get(suffix)
    if kind is None:
        raise SourceError(
            f"{path}: not a folder, .tar, .zip, .parquet, .npz or .beton (--kind names it; decompress .tar.gz)"
        )
    return kind


def _kind_of_several(pattern: Path, files: list[str]) -> str:
    endings = {os.path.splitext(file)[1].lower() for file in files}
    if endings == {".parquet"}:
        return "parquet"
    if endings != {".tar"}:
        raise SourceError(f"{pattern}: names {files[0]}, but a pattern is for .tar files, or for .parquet files")
    return _tar_kind(files)


def _tar_kind(files: list[str]) -> str:
    """Return "webdataset" for tars of samples, or shards by their numbers; "tar" for folders of images, one or each."""
    if any(map(looks_like_samples, files[:_TARS_LOOKED_AT])):
        return "webdataset"
    return "webdataset" if len(files) > 1 and numbered(files) else "tar"


def _folder_kind(root: Path) -> str:
    """Return the kind of the telling files that lie nearest to the root of a folder."""
    if cifar_folder(root):
        return "cifar"
    if beton_files(root):
        return "beton"
    level = [str(root)]
    for _ in range(_LEVELS_LOOKED_AT):
        count, below, tars = Counter[str](), list[str](), list[str]()
        for folder in level[:_FOLDERS_LOOKED_AT]:
            names, folders = _first_entries(folder, _ENTRIES_LOOKED_AT // len(level[:_FOLDERS_LOOKED_AT]))
            count.update(name.rpartition(".")[2].lower() for name in names)
            tars += [os.path.join(folder, name) for name in names if name.lower().endswith(".tar")]
            below += folders
        images = sum(count[extension[1:]] for extension in IMAGE_EXTENSIONS)
        if images > count["tar"] + count["parquet"] or (_unpacked(tars, below) and _holds_images(below)):
            return "folder"
        if count["parquet"] > count["tar"]:
            return "parquet"
        if tars:
            return _tar_kind(sorted(tars))
        level = sorted(below)
    return "folder"


def _unpacked(tars: list[str], folders: list[str]) -> bool:
    """Whether folders are what lies in the tars beside them: of a training split, or of the names of all of these."""
    training = any(split_of(os.path.basename(folder), whole=True) == "train" for folder in folders)
    return bool(tars) and (training or {os.path.splitext(tar)[0] for tar in tars} <= set(folders))


def _first_entries(folder: str, most: int) -> tuple[list[str], list[str]]:
    """Return names of files and paths of folders among the first entries of a folder; hidden ones are left out."""
    with os.scandir(folder) as entries:
        seen = [e for e in itertools.islice(entries, most) if not e.name.startswith(".")]
    folders = [entry.path for entry in seen if entry.is_dir(follow_symlinks=False)]
    return [entry.name for entry in seen if not entry.is_dir(follow_symlinks=False)], folders


def _holds_images(folders: list[str]) -> bool:
    """Whether images lie in these folders or one below: of those that were unpacked beside their archive."""
    below = [path for folder in folders for path in _first_entries(folder, _FOLDERS_LOOKED_AT)[1]][:_FOLDERS_LOOKED_AT]
    names = (name for folder in (*folders, *below) for name in _first_entries(folder, _FOLDERS_LOOKED_AT)[0])
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for name in names)


def fingerprint(source: Source) -> str:
    """Return the first of `fingerprints`: a copy of the source has the same."""
    return fingerprints(source)[0]


def fingerprints(source: Source) -> tuple[str, str]:
    """Return the SHA-256 (hex) of every sample's split, path, label and size or place; and one with mtimes, too."""

    def states(sample: Sample) -> tuple[object, object]:
        if source.files:
            place = str(sample.place)
            return place, place
        return file_states(os.path.join(source.root, sample.path))

    files = [(os.path.basename(file), file_states(file)) for file in source.files]
    plain, with_times = listing_digests(source.classes, source.splits, states, files)
    return plain, with_times
