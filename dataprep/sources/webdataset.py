"""WebDataset tars as a source: members of one key are one sample, `<key>.jpg` with `<key>.cls` or `<key>.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo
from typing import NamedTuple

from fasttrain.dataprep.sources.archive import TarReader, plain_name, read_range, tar_members
from fasttrain.dataprep.sources.files import shown_names, source_files, split_files
from fasttrain.dataprep.sources.labels import Labels, Value, label_notes, number_labels
from fasttrain.dataprep.sources.source import Source
from fasttrain.formats.layout import Skipped
from fasttrain.formats.listing import IMAGE_EXTENSIONS, Listing, Sample, SourceError, Unused, other_file
from fasttrain.formats.manifest import FILE_NAME, Manifest, ManifestError, check_finished

_IMAGES = tuple(extension[1:] for extension in IMAGE_EXTENSIONS)
_LABELS = ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 1 << 20
_MEMBERS_LOOKED_AT = 64

Group = dict[str, TarInfo]  # the members of a sample by extension


def looks_like_samples(path: str) -> bool:
    """Whether a .cls or .json member lies beside an image of the same key among the first members of a tar."""
    keys: dict[str, set[str]] = {}
    for member, _ in zip(tar_members(path, []), range(_MEMBERS_LOOKED_AT), strict=False):
        key, extension = split_key(plain_name(member.name))
        keys.setdefault(key, set()).add(extension.rpartition(".")[2])
    return any(found & set(_LABELS) and found & set(_IMAGES) for found in keys.values())


def split_key(name: str) -> tuple[str, str]:
    """Return the key of a member, which ends at the first dot of the last part, and its extension, as `seg.png`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


class _LabelMember(NamedTuple):
    """Where a label may be read: its extension, offset and size."""

    extension: str
    offset: int
    size: int


class _Tars:
    """The tars of a source while they are listed.

    labels: "auto" for a .cls or a .json's label, "none", or an extension or a key of the .json.
    """

    def __init__(self, files: tuple[str, ...], labels: str, unused: Unused) -> None:
        self.files, self.names, self.unused = files, shown_names(files), unused
        self.skipped = Skipped()
        self._wanted = labels
        self._beside_none: dict[tuple[int, str], list[_LabelMember]] = {}  # by file and key

    def listed(self, rows: list[int], values: Labels) -> Listing:
        """Return the samples of some of the files; their labels go to values."""
        listing = Listing(sample for row in rows for sample in self._samples(row, values))
        self._match(listing, values)
        return listing

    def _samples(self, row: int, values: Labels) -> Iterator[Sample]:
        for key, group in _by_key(self.files[row], self.skipped):
            extension = _image_of(group)
            members = self._label_members(group, extension or "")
            if extension is None:
                if members:
                    self._beside_none.setdefault((row, key), []).extend(members)
                self._count(group, {member.extension for member in members})
                continue
            image = group[extension]
            path = f"{self.names[row]}/{plain_name(image.name)}"
            value, used = self._value(row, path, members, values)
            values.append(value)
            self._count(group, {extension, used})
            yield Sample(path, -1, (row, image.offset_data, image.size))

    def _label_members(self, group: Group, image: str) -> list[_LabelMember]:
        """Return the members that may hold the label, the likeliest first: `05.cls` goes with `05.png`."""
        if self._wanted == "none":
            return []
        last = _LABELS if self._wanted == "auto" else (self._wanted.lower(), "json")
        prefix = image.rpartition(".")[0]
        found = [name for name in group if name in last or name.rpartition(".")[2] in last]
        found.sort(key=lambda name: (last.index(name if name in last else name.rpartition(".")[2]),
                                     name.rpartition(".")[0] != prefix))  # fmt: skip
        return [_LabelMember(name, group[name].offset_data, group[name].size) for name in found]

    def _value(self, row: int, path: str, members: list[_LabelMember], values: Labels) -> tuple[Value, str]:
        """Return the label of a sample, None for none, and the extension of the member that holds it.

        What is no label counts in values.
        """
        for member in members:
            try:
                value = self._label(row, member)
            except (SourceError, ValueError, RecursionError) as error:
                values.count_unreadable(path, error)
                return None, member.extension
            if value is not None:
                return value, member.extension
        return None, ""

    def _label(self, row: int, member: _LabelMember) -> Value:
        if member.size > _MAX_LABEL_BYTES:
            raise SourceError(f"larger than {_MAX_LABEL_BYTES} bytes")
        text = read_range(self.files[row], member.offset, member.size).decode("utf-8-sig")
        if member.extension.rpartition(".")[2] != "json":
            return text.strip() or None
        keys = _LABEL_KEYS if self._wanted in ("auto", "json") else (self._wanted,)
        return _json_label(json.loads(text), keys)

    def _count(self, group: Group, used: set[str]) -> None:
        for extension in (extension for extension in group if extension not in used):
            name = plain_name(group[extension].name)
            further = extension.rpartition(".")[2] in _IMAGES
            self.unused.add("further images of a sample" if further else other_file(name), name)

    def _match(self, listing: Listing, values: Labels) -> None:
        """Give labels that lay beside no image, as where they come after all images, to the image of their key."""
        if self._beside_none:
            for position in values.missing():
                row, path = listing[position].place[0], listing[position].path
                key = split_key(path.removeprefix(f"{self.names[row]}/"))[0]
                if members := self._beside_none.pop((row, key), None):
                    values.replace(position, self._value(row, path, members, values)[0])
        for row, key in self._beside_none:
            self.unused.add("labels beside no image", f"{self.names[row]}/{key}")
        self._beside_none.clear()


def webdataset_source(root: Path, labels: str = "auto") -> Source:
    """List the samples of one tar, of the tars of a folder, or of those a pattern names. Raises SourceError, OSError.

    `.cls` holds a whole number or a name; `.json` an object with `label`, `cls` or `class`. What is no label leaves an
    image without one; members that are not used are counted. A folder with our manifest has its names of classes.
    """
    unused = Unused()
    classes_of_numbers, notes = _converted_classes(root)
    tars = _Tars(tuple(source_files(root, ".tar", unused)), labels, unused)
    listings: dict[str, Listing] = {}
    values: dict[str, Labels] = {}
    for split, rows in split_files(tars.files, unused).items():
        values[split] = Labels()
        listings[split] = tars.listed(rows, values[split])
    classes, numbers = number_labels({**values}, classes_of_numbers if labels in ("auto", "cls") else ())
    splits = {split: listing.labelled(numbers[split]) for split, listing in listings.items()}
    notes += label_notes(values.values())
    return Source(
        root,
        classes,
        splits,
        TarReader(tars.files),
        tars.files,
        tars.skipped,
        in_sequence=True,
        unused=unused,
        notes=notes,
    )


def _converted_classes(root: Path) -> tuple[list[str], list[str]]:
    """Return the classes of a folder that was converted, [] for another, and notes; ManifestError for a part of one."""
    check_finished(root)
    if not (root / FILE_NAME).exists():
        return [], []
    try:
        manifest = Manifest.load(root)
    except ManifestError as error:  # a stranger's file may have the name
        return [], [f"the names of classes are not looked up: {error}"]
    if manifest.format != "webdataset":
        return [], []
    manifest.check_shards(root)
    return manifest.classes, []


def _by_key(file: str, skipped: Skipped) -> Iterator[tuple[str, Group]]:
    """Yield each run of equal keys and its members, by extension; one that comes again begins another sample."""
    last, group = "", Group()
    for member in tar_members(file, skipped):
        key, extension = split_key(plain_name(member.name))
        if key.rpartition("/")[2] == "":  # hidden
            continue
        if group and (key != last or extension in group):
            yield last, group
            group = {}
        last = key
        group[extension] = member
    if group:
        yield last, group


def _image_of(group: Group) -> str | None:
    """Return the extension of a sample's image: a plain one, as `jpg`, before others, as `seg.png`."""
    plain = next((extension for extension in _IMAGES if extension in group), None)
    return plain or next((extension for extension in group if extension.rpartition(".")[2] in _IMAGES), None)


def _json_label(content: object, keys: tuple[str, ...]) -> Value:
    """Return the label in the content of a .json, None if it has none; SourceError if it is no label."""
    if not isinstance(content, dict):
        raise SourceError("no JSON object")
    value = next((content[key] for key in keys if content.get(key) is not None), None)
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if value is not None and not isinstance(value, int | str):
        raise SourceError(f"{type(value).__name__} instead of a whole number or a name")
    return value
