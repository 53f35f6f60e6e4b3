"""Parquet tables as a source: a column of images (bytes, or Hugging Face's struct of them) and one of labels."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttrain.dataprep.sources.files import shown_names, source_files, split_files
from fasttrain.dataprep.sources.labels import Labels, NoClasses, number_labels, whole_numbers
from fasttrain.dataprep.sources.source import Groups, Source
from fasttrain.formats.listing import MAX_FILE_BYTES, Listing, Sample, SourceError, Unused
from fasttrain.system.errors import UserError
from fasttrain.system.regular import open_regular

_IMAGE_NAMES = ("image", "img", "jpg", "png", "bytes")
_LABEL_NAMES = (
    "label", "labels", "fine_label", "cls", "class", "target", "class_id", "class_label", "category", "y",
)  # fmt: skip
# Row groups of one file are read whole. A process keeps those it read last, up to this many bytes of images, or one.
CACHE_BYTES = 1 << 28
MAX_GROUP_BYTES = 1 << 30
_ROWS_AT_ONCE, _LABELS_AT_ONCE = 4, 1 << 14


def _pyarrow() -> Any:  # noqa: ANN401 - a module that may be missing
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet sources need pyarrow: pip install pyarrow") from None
    return pyarrow


class ParquetReader(NamedTuple):
    """Reads rows of parquet files; place = (file, row group, row in it); column: a path, as `image.bytes`."""

    files: tuple[str, ...]
    column: str

    def read(self, sample: Sample) -> bytes:
        file, group, row = sample.place
        value = _cached_group(self.files[file], group, self.column)[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if value is None:
            raise SourceError("no image bytes in this row")
        if len(value) > MAX_FILE_BYTES:
            raise SourceError(f"larger than {MAX_FILE_BYTES} bytes")
        return bytes(value)

    def size(self, sample: Sample) -> int:
        file, group, _ = sample.place
        return _mean_bytes(self.files[file], group)


_groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
_groups_lock = threading.Lock()


def _cached_group(file: str, group: int, column: str) -> Any:  # noqa: ANN401 - pyarrow's chunked array
    key = (file, group, column)
    with _groups_lock:  # reading, too, so that no two threads read one group
        if key not in _groups:
            try:
                _groups[key] = _decoded(file, group, column)
            except SourceError as error:
                # Each row gets the reason, without decoding all again. What was decoded hangs on the error itself.
                _groups[key] = SourceError(str(error))
            while len(_groups) > 1 and sum(getattr(found, "nbytes", 0) for found in _groups.values()) > CACHE_BYTES:
                _groups.popitem(last=False)
        _groups.move_to_end(key)
        if isinstance(_groups[key], SourceError):
            raise SourceError(str(_groups[key]))
        return _groups[key]


def _decoded(file: str, group: int, column: str) -> Any:  # noqa: ANN401 - pyarrow's chunked array
    """Return a column of a row group; SourceError if it is damaged or takes more than MAX_GROUP_BYTES.

    What the file says of its size is no limit: rows may share one value, which each takes anew when decoded. Hence
    few rows at once.
    """
    pyarrow = _pyarrow()
    parts, num_bytes = [], 0
    try:
        for batch in _opened(file).iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
            batch.validate(full=True)  # places in it may lead anywhere
            parts.append(batch.column(0))
            num_bytes += batch.nbytes
            if num_bytes > MAX_GROUP_BYTES:
                raise SourceError(f"row group {group} takes more than {MAX_GROUP_BYTES} bytes in memory")
        decoded = pyarrow.chunked_array(parts)
    except SourceError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:  # ValueError: no rows
        if getattr(error, "errno", None):  # the system's: it may be able to read it later
            raise
        raise SourceError(f"damaged row group {group}: {_line(error)}") from None
    if len(decoded) != _opened(file).metadata.row_group(group).num_rows:
        raise SourceError(f"damaged row group {group}: {len(decoded)} rows")
    return decoded


@functools.lru_cache(maxsize=1024)
def _mean_bytes(file: str, group: int) -> int:
    metadata = _opened(file).metadata.row_group(group)
    return _stated_bytes(metadata) // metadata.num_rows


def _stated_bytes(group: Any) -> int:  # noqa: ANN401 - pyarrow's metadata
    """Return the bytes of all columns: pyarrow ends the process where what is said of a single one is damaged.

    It is what the file says, and no more than MAX_GROUP_BYTES, which no group takes.
    """
    return min(max(0, group.total_byte_size), MAX_GROUP_BYTES)


@functools.lru_cache(maxsize=64)
def _opened(file: str, as_dictionary: str | None = None) -> Any:  # noqa: ANN401 - pyarrow's file
    pyarrow = _pyarrow()
    with open_regular(file) as checked:
        num_bytes = os.fstat(checked.fileno()).st_size
    try:
        opened = pyarrow.parquet.ParquetFile(file, memory_map=True, read_dictionary=as_dictionary and [as_dictionary])
        names = opened.schema_arrow.names
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: damaged or truncated parquet file: {_line(error)}") from None
    rows = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) > num_bytes:  # a listing grows with the rows, which may cost nothing
        raise SourceError(f"{file}: more rows than bytes")
    if len(set(names)) < len(names):
        raise SourceError(f"{file}: has several columns {Counter(names).most_common(1)[0][0]!r}")
    return opened


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def parquet_source(root: Path, labels: str = "auto") -> Source:
    """List the rows of a file, of the files of a folder, or of those a pattern names; images are not read.

    Row groups are read whole, so samples are shuffled among neighbours in a shuffled order of row groups.

    Args:
        root: the file, folder or pattern.
        labels: "auto" for a column named like labels, "none", or a column's name.

    Raises:
        SourceError, OSError, UserError: also for a named column that is missing or holds no classes.
    """
    unused, notes = Unused(), list[str]()
    files, column = _tables(source_files(root, ".parquet", unused), unused)
    schemas = [_opened(file).schema_arrow for file in files]
    label = _label_column(files[0], schemas, labels)
    if label and (lacking := sum(not _holds(schema, label) for schema in schemas)):
        notes.append(f"{lacking} of {len(files)} tables have no column {label!r}, so their images have no labels")
    names, splits, groups = shown_names(files), {}, {}
    rows_by_split = split_files(files, unused)
    for split, rows in rows_by_split.items():
        groups[split] = _groups_of(files, rows)
        splits[split] = Listing(_rows(files, names, rows))
    try:
        values = {split: _labels(files, rows, label) for split, rows in rows_by_split.items()}
    except NoClasses as error:
        if labels != "auto":
            raise
        notes.append(f"no labels: {error}")
        values = {split: _labels(files, rows, None) for split, rows in rows_by_split.items()}
    for split, listing in splits.items():
        if len(values[split]) != len(listing):
            raise SourceError(f"{root}: {len(listing)} rows, but {len(values[split])} labels")
    classes, numbers = number_labels({**values}, _class_names(schemas, label))
    labelled = {split: listing.labelled(numbers[split]) for split, listing in splits.items()}
    reader = ParquetReader(files, column)
    return Source(root, classes, labelled, reader, files, groups=groups, unused=unused, notes=notes)


def _tables(files: list[str], unused: Unused) -> tuple[tuple[str, ...], str]:
    """Return the tables of images and the path of their column; other tables, and other such columns, are counted."""
    columns = {file: _image_columns(_opened(file).schema_arrow) for file in files}
    first = next((file for file in files if columns[file]), None)
    if first is None:
        names = ", ".join(_opened(files[0]).schema_arrow.names)
        raise SourceError(f"{files[0]}: no column of images (bytes, or a struct with bytes); columns: {names}")
    column = columns[first][0]
    for file in files:
        if not columns[file]:
            unused.add("tables without images", file)
        elif columns[file][0] != column:
            other = columns[file][0]
            raise SourceError(f"{file}: its images are in column {other!r}, those of {first} in {column!r}")
    for other in columns[first][1:]:
        unused.add("further columns of bytes", other)
    return tuple(file for file in files if columns[file]), column


def _label_column(first: str, schemas: list[Any], labels: str) -> str | None:
    """Return the column of labels that any table has, None for none; SourceError for one that is asked for."""
    if labels == "none":
        return None
    names = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    by_lower = {name.lower(): name for name in reversed(names)}
    if labels == "auto":
        return next((by_lower[name] for name in _LABEL_NAMES if name in by_lower), None)
    if labels in names or labels.lower() in by_lower:
        return labels if labels in names else by_lower[labels.lower()]
    raise SourceError(f"{first}: no column {labels!r}; columns: {', '.join(names)}")


def _image_columns(schema: Any) -> list[str]:  # noqa: ANN401 - pyarrow's schema
    """Return the paths of the columns that could be of images, the likeliest first.

    Of a struct that is the path of its bytes: nothing else in it is decoded. A column of labels is not among them.
    """
    types = _pyarrow().types

    def holds_images(kind: Any) -> bool:  # noqa: ANN401 - pyarrow's type
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return holds_bytes(kind)

    def holds_bytes(kind: Any) -> bool:  # noqa: ANN401 - pyarrow's type
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def rank(name: str) -> int:
        return _IMAGE_NAMES.index(name.lower()) if name.lower() in _IMAGE_NAMES else len(_IMAGE_NAMES)

    found = sorted((name for name in schema.names if holds_images(schema.field(name).type)), key=rank)
    found = [name for name in found if name.lower() not in _LABEL_NAMES]
    return [f"{name}.bytes" if types.is_struct(schema.field(name).type) else name for name in found]


def _class_names(schemas: list[Any], label: str | None) -> list[str]:
    """Return the names in the metadata of the first schema that has any, as Hugging Face's datasets write them."""
    for schema in schemas:
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            return [str(name) for name in features[label]["names"]]
        except (KeyError, TypeError, ValueError, RecursionError):
            continue
    return []


def _rows(files: tuple[str, ...], names: list[str], rows: list[int]) -> Iterator[Sample]:
    for file in rows:
        metadata = _opened(files[file]).metadata
        count, name = 0, names[file]
        for group in range(metadata.num_row_groups):
            for row in range(metadata.row_group(group).num_rows):
                yield Sample(f"{name}/{count + row}", -1, (file, group, row))
            count += metadata.row_group(group).num_rows


def _groups_of(files: tuple[str, ...], rows: list[int]) -> Groups:
    metadata = (_opened(files[file]).metadata for file in rows)
    groups = [one.row_group(number) for one in metadata for number in range(one.num_row_groups)]
    counts, sizes = [group.num_rows for group in groups], [_stated_bytes(group) for group in groups]
    return Groups(np.cumsum([0, *counts]), np.array(sizes, np.int64))


def _labels(files: tuple[str, ...], rows: list[int], label: str | None) -> Labels:
    """Return the labels of files, none for those without the column.

    Raises NoClasses; SourceError for a column that can't be read.
    """
    as_text = _are_texts(files, rows, label)
    labels = Labels()
    try:
        for file in rows:
            for column in _label_columns(files[file], label, as_text):
                try:
                    if as_text:
                        _add_texts(labels, column)
                    else:
                        _add_numbers(labels, column)
                except (_pyarrow().ArrowException, SourceError) as error:
                    raise NoClasses(f"column {label!r} holds no classes: {_line(error)}") from None
    except (_pyarrow().ArrowException, KeyError, OSError) as error:
        raise SourceError(f"column {label!r} can't be read: {_line(error)}") from None
    return labels


def _are_texts(files: tuple[str, ...], rows: list[int], label: str | None) -> bool:
    """Whether the labels of files are text; NoClasses where some are and others not, or one is of parts."""
    schemas = [_opened(files[file]).schema_arrow for file in rows]
    kinds = [schema.field(label).type for schema in schemas if _holds(schema, label)]
    for kind in kinds:
        if _pyarrow().types.is_nested(kind):  # may take any memory when it is read
            raise NoClasses(f"column {label!r} holds no classes: it holds {kind}, neither whole numbers nor text")
    if len(found := set(map(_is_text, kinds))) > 1:
        raise NoClasses(f"column {label!r} holds text in some tables, and something else in others")
    return found == {True}


def _holds(schema: Any, label: str | None) -> bool:  # noqa: ANN401 - pyarrow's schema
    """Whether a table has the column of labels; one that holds nothing but nulls has no type."""
    return label in schema.names and not _pyarrow().types.is_null(schema.field(label).type)


def _label_columns(file: str, label: str | None, as_text: bool) -> Iterator[Any]:
    """Yield arrays of labels, text as pyarrow's dictionary arrays: a text that many rows share is decoded once."""
    opened = _opened(file, label if as_text else None)
    if not _holds(opened.schema_arrow, label):
        nothing = _pyarrow().nulls(opened.metadata.num_rows)
        yield nothing.dictionary_encode() if as_text else nothing
        return
    for batch in opened.iter_batches(batch_size=_LABELS_AT_ONCE, columns=[label]):
        batch.validate(full=True)
        yield batch.column(0)


def _is_text(kind: Any) -> bool:  # noqa: ANN401 - pyarrow's type
    types = _pyarrow().types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_binary))


def _add_texts(texts: Labels, column: Any) -> None:  # noqa: ANN401 - pyarrow's dictionary array
    names = list(map(_text, column.dictionary.to_pylist()))
    index_N = column.indices.cast(_pyarrow().int64()).fill_null(len(names)).to_numpy()
    texts.extend([*names, None], index_N)


def _text(name: str | bytes | None) -> str | None:
    if not isinstance(name, bytes):
        return name
    try:
        return name.decode()
    except UnicodeDecodeError:  # it may be an image: a mask
        raise SourceError(f"{name[:8]!r} is no text") from None


def _add_numbers(labels: Labels, column: Any) -> None:  # noqa: ANN401 - pyarrow's array
    number_V, index_N = np.unique(_as_numbers(column), return_inverse=True)
    labels.extend([number if number >= 0 else None for number in number_V.tolist()], index_N)


def _as_numbers(column: Any) -> np.ndarray:  # noqa: ANN401 - pyarrow's array
    pyarrow, kind = _pyarrow(), column.type
    if pyarrow.types.is_dictionary(kind):
        return _as_numbers(column.dictionary_decode())
    if pyarrow.types.is_floating(kind):
        return whole_numbers(column.cast(pyarrow.float64()).fill_null(-1).to_numpy())
    if pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind) or pyarrow.types.is_null(kind):
        return column.cast(pyarrow.int64()).fill_null(-1).to_numpy()
    raise SourceError(f"it holds {kind}, neither whole numbers nor text")
