"""The fields of a .beton file: what a stranger's file holds, and where the image and the label of a sample lie.

A file lists its fields, each with a type and a name. The metadata of a sample is a C struct of one entry for each, so
that every type before the image moves it. Types: ffcv/types.py and ffcv/fields of FFCV 1.0.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
IMAGE_TYPE, INT_TYPE, CUSTOM_TYPE = 2, 1, 255

_BYTES = np.dtype([("pointer", "<u8"), ("size", "<u8")])


class _Type(NamedTuple):
    name: str
    metadata: np.dtype
    allocates: bool  # an entry in the allocation table for each sample


_TYPES = {
    0: _Type("float", np.dtype("<f8"), False),
    INT_TYPE: _Type("int", np.dtype("<i8"), False),
    IMAGE_TYPE: _Type("RGB image", IMAGE, True),
    3: _Type("bytes", _BYTES, True),
    4: _Type("array", np.dtype("<u8"), True),
    5: _Type("JSON", _BYTES, True),
    6: _Type("tensor", np.dtype("<u8"), True),
}
# Of several fields of a type, the one whose name begins so is taken.
_IMAGE_NAMES, _LABEL_NAMES = re.compile("image|img|picture|photo|rgb", re.I), re.compile("label|class|cls|target", re.I)
_MOST_FIELDS = 256
_NAMED = 8  # fields in a message


class Field(NamedTuple):
    """One field: the number of its type, and its name."""

    type_id: int
    name: str

    def __str__(self) -> str:
        kind = "custom" if self.type_id == CUSTOM_TYPE else _TYPES[self.type_id].name
        return f"{self.name}: {kind}"


class Layout(NamedTuple):
    """How the metadata of a sample lies.

    sample: fields `image` and, if there is one, `label`; its itemsize is that of the whole struct.
    per_sample: entries in the allocation table for each sample.
    """

    sample: np.dtype
    per_sample: int


def read_fields(rows: np.ndarray) -> list[Field]:
    """Return the fields of an array of FIELD; ValueError for names or types that FFCV does not write."""
    if len(rows) > _MOST_FIELDS:
        raise ValueError(f"{len(rows)} fields, more than {_MOST_FIELDS}")
    fields = []
    for place, row in enumerate(rows):
        name, type_id = row["name"].decode("latin1"), int(row["type_id"])
        if not (name.isascii() and name.isprintable()):
            raise ValueError(f"of its {len(rows)} fields, number {place + 1} has no readable name")
        if type_id not in _TYPES and type_id != CUSTOM_TYPE:
            raise ValueError(f"of its {len(rows)} fields, {name!r} has an unknown type ({type_id})")
        fields.append(Field(type_id, name))
    return fields


def layout_of(fields: Sequence[Field]) -> Layout:
    """Return the layout of a file with these fields; ValueError says what they are if the image can't be told."""
    image = _chosen(fields, IMAGE_TYPE, _IMAGE_NAMES)
    if image is None:
        raise ValueError(f"{_listed(fields)}; no RGBImageField")
    if any(field.type_id == CUSTOM_TYPE for field in fields):
        raise ValueError(
            f"{_listed(fields)}; the size of a custom field is not in the file, so the images can't be found"
        )
    types = [_TYPES[field.type_id] for field in fields]
    struct = np.dtype([("", kind.metadata) for kind in types], align=True)
    offsets = [struct.fields[name][1] for name in struct.names]  # type: ignore[index, union-attr]
    places = {"image": image}
    if (label := _chosen(fields, INT_TYPE, _LABEL_NAMES)) is not None:
        places["label"] = label
    sample = np.dtype({
        "names": list(places), "formats": [types[place].metadata for place in places.values()],
        "offsets": [offsets[place] for place in places.values()], "itemsize": struct.itemsize,
    })  # fmt: skip
    return Layout(sample, sum(kind.allocates for kind in types))


def _chosen(fields: Sequence[Field], type_id: int, names: re.Pattern[str]) -> int | None:
    """Return the place of the field of a type, of several the one with such a name; None if there is none."""
    found = [place for place, field in enumerate(fields) if field.type_id == type_id]
    named = [place for place in found if names.match(fields[place].name)]
    if len(found) > 1 and len(named) != 1:
        kind = _TYPES[type_id].name
        raise ValueError(f"{_listed(fields)}; which of the {kind} fields to take can't be told by the names")
    return next(iter(found if len(found) < 2 else named), None)


def _listed(fields: Sequence[Field]) -> str:
    more = f" and {len(fields) - _NAMED} more" if len(fields) > _NAMED else ""
    return f"holds fields {', '.join(map(str, fields[:_NAMED])) or 'none'}{more}"
