"""WebDataset tars as a source: members of one key are one sample, `<key>.jpg` with `<key>.cls` or `<key>.json`."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo

from fasttrain.dataprep.sources.archive import Skipped, TarReader, plain_name, read_range, tar_members
from fasttrain.dataprep.sources.labels import Labels, Value, number_labels, split_files
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.listing import Listing, Sample, SourceError

_IMAGES, _LABELS = ("jpg", "jpeg", "png", "webp"), ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 1 << 20
_MEMBERS_LOOKED_AT = 64


def expand(pattern: str) -> list[str]:
    """Return the files that a pattern with braces (`{000..012}`, `{a,b}`) and wildcards names, sorted."""
    ranged = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    listed = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found := ranged or listed:
        if ranged:
            first, last = ranged.groups()
            values = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            values = found[1].split(",")
        return sorted({name for v in values for name in expand(pattern[: found.start()] + v + pattern[found.end() :])})
    if any(character in pattern for character in "*?["):
        return sorted(glob.glob(pattern))
    return [pattern]


def looks_like_samples(path: str) -> bool:
    """Whether a .cls or .json member lies beside an image of the same key among the first members of a tar."""
    keys: dict[str, set[str]] = {}
    for member, _ in zip(tar_members(path, []), range(_MEMBERS_LOOKED_AT), strict=False):
        key, extension = _split_key(plain_name(member.name))
        keys.setdefault(key, set()).add(extension)
    return any(found & set(_LABELS) and found & set(_IMAGES) for found in keys.values())


def webdataset_source(root: Path) -> Source:
    """List the samples of one tar, of the tars of a folder, or of those a pattern names. Raises SourceError, OSError.

    `.cls` holds a whole number or a name; `.json` an object with `label`, `cls` or `class`. Samples without an image
    are left out; unreadable labels are reported, and their samples left out.
    """
    files = tuple(sorted(map(str, root.glob("*.tar"))) if root.is_dir() else expand(str(root)))
    if not files:
        raise SourceError(f"{root}: no .tar files")
    skipped: Skipped = []
    listings: dict[str, Listing] = {}
    values: dict[str, Labels] = {}
    for split, rows in split_files(files).items():
        values[split] = Labels()
        listings[split] = Listing(_samples(files, rows, values[split], skipped))
        if not listings[split]:
            raise SourceError(f"{root}: no images ({', '.join(_IMAGES)}) in the {split} split")
    classes, labels = number_labels({**values})
    splits = {split: listing.labelled(labels[split]) for split, listing in listings.items()}
    return Source(root, classes, splits, TarReader(files), files, skipped)


def _samples(files: tuple[str, ...], rows: list[int], values: Labels, skipped: Skipped) -> Iterator[Sample]:
    for row in rows:
        for group in _by_key(files[row], skipped):
            image = next((group[extension] for extension in _IMAGES if extension in group), None)
            if image is None:
                continue
            path = f"{os.path.basename(files[row])}/{plain_name(image.name)}"
            try:
                label = _label(files[row], group)
            except (SourceError, ValueError) as error:
                skipped.append({"path": path, "reason": f"unreadable label: {error}"})
                continue
            values.append(label)
            yield Sample(path, -1, (row, image.offset_data, image.size))


def _by_key(file: str, skipped: Skipped) -> Iterator[dict[str, TarInfo]]:
    """Yield the members of each run of equal keys, by extension."""
    last, group = "", dict[str, TarInfo]()
    for member in tar_members(file, skipped):
        key, extension = _split_key(plain_name(member.name))
        if group and key != last:
            yield group
            group = {}
        last = key
        group[extension] = member
    if group:
        yield group


def _split_key(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _label(file: str, group: dict[str, TarInfo]) -> Value:
    found = next((extension for extension in _LABELS if extension in group), None)
    if found is None:
        return None
    member = group[found]
    if member.size > _MAX_LABEL_BYTES:
        raise SourceError(f"larger than {_MAX_LABEL_BYTES} bytes")
    text = read_range(file, member.offset_data, member.size).decode()
    if found == "cls":
        return text.strip() or None
    try:
        return _json_label(json.loads(text))
    except RecursionError:
        raise SourceError("JSON that is nested too deeply") from None


def _json_label(content: object) -> Value:
    """Return the label in the content of a .json, None if it has none; SourceError if it is no label."""
    if not isinstance(content, dict):
        raise SourceError("no JSON object")
    value = next((content[key] for key in _LABEL_KEYS if key in content), None)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is not None and not isinstance(value, int | str):
        raise SourceError(f"{type(value).__name__} instead of a whole number or a name")
    return value
