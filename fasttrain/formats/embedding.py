"""Features of images on disk: OUT.npy with OUT.tsv and OUT.json beside it, or OUT.parquet, which holds all three."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fasttrain.formats.names import escaped
from fasttrain.system.durable import publish, read_json, replace_file, write_json
from fasttrain.system.errors import UserError
from fasttrain.system.regular import open_regular

EXTENSIONS = (".npy", ".parquet")
BESIDE = (".tsv", ".json")
HEADER_BYTES = 128  # of an .npy file of any length: rows can be written before their number is known
ROWS_AT_ONCE = 1 << 13  # of a parquet file's row group: 64 MiB of 2,048 features
_METADATA = b"fasttrain"


class Row(NamedTuple):
    """What stands beside a row of features: the source's name of the image, its split, its label and the class's name
    (-1 and "": none)."""

    name: str
    split: str
    label: int
    kind: str

    @classmethod
    def of(cls, name: str, split: str, label: int, classes: tuple[str, ...]) -> Row:
        """Names are escaped as in shards' files of names, so that a line holds each."""
        return cls(escaped(name), split, label, escaped(classes[label]) if label >= 0 else "")


COLUMNS = ("name", "split", "label", "class")


def check_out(out: Path) -> None:
    """Raises UserError for a name of another kind, and for parquet where pyarrow is missing."""
    if out.suffix not in EXTENSIONS:
        raise UserError(f"{out}: features are written to a file whose name ends in {' or '.join(EXTENSIONS)}")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file")
    if out.suffix == ".parquet":
        _pyarrow()


def check_free(out: Path) -> None:
    """Raises UserError where something else has the name of what will lie beside OUT.npy."""
    for path in (out.with_suffix(suffix) for suffix in BESIDE if out.suffix == ".npy"):
        if os.path.lexists(path):
            raise UserError(f"{path}, which would lie beside {out.name}, is there already: remove it or name another")


def _pyarrow() -> Any:  # noqa: ANN401 - a module that may be missing
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow; or name an OUT.npy") from None
    return pyarrow


def finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished file tells of itself, None where there is none. Raises UserError for one of other settings."""
    if not os.path.lexists(out):
        return None
    try:
        if out.suffix == ".npy":
            found = dict(read_json(out.with_suffix(".json"), follow=False))
        else:
            with open_regular(out) as file:
                found = dict(json.loads(_pyarrow().parquet.read_schema(file).metadata[_METADATA]))
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{out} is there and was not written by this command: remove it or name another") from None
    check_same(out, found, settings)
    return found


def check_same(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises UserError where old differs from the values of new."""
    changed = [f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(f"{out} holds other features ({'; '.join(changed)}): remove it or name another file")


def write(out: Path, features: Path, about: dict[str, Any], rows: Iterator[Row]) -> None:
    """Give features their place.

    features: a file of fp32 rows behind HEADER_BYTES; an .npy is made of the file itself, which is then gone. about:
    what the file tells of itself, with "images" and "width". rows: as many.
    """
    shape = about["images"], about["width"]
    if out.suffix == ".parquet":
        values_NF = np.memmap(features, np.float32, "r", HEADER_BYTES, shape)
        replace_file(out, lambda file: _write_parquet(file, values_NF, about, rows))
        return
    # The .npy comes last: where it is, the others are.
    lines = (row._replace(label=row.label if row.label >= 0 else "") for row in rows)  # type: ignore[arg-type]
    text = ("\t".join(map(str, line)) + "\n" for line in itertools.chain([COLUMNS], lines))
    replace_file(out.with_suffix(".tsv"), lambda file: file.writelines(line.encode() for line in text))
    write_json(out.with_suffix(".json"), about)
    with open(features, "r+b") as file:
        file.write(npy_header(shape))
        file.flush()
        os.fsync(file.fileno())
    publish(features, out)


def npy_header(shape: tuple[int, int]) -> bytes:
    """The first HEADER_BYTES of an .npy file (format 1.0) of fp32 rows."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(HEADER_BYTES - 11)
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode() + b"\n"


def _write_parquet(file: BinaryIO, values_NF: np.ndarray, about: dict[str, Any], rows: Iterator[Row]) -> None:
    pyarrow, width = _pyarrow(), values_NF.shape[1]
    word, vector = pyarrow.string(), pyarrow.list_(pyarrow.float32(), width)
    kinds = (word, word, pyarrow.int32(), word)
    schema = pyarrow.schema([*zip(COLUMNS, kinds, strict=True), ("feature", vector)], {_METADATA: json.dumps(about)})
    # Features hardly compress, and no two are the same.
    options = {"compression": {"name": "zstd"}, "use_dictionary": ["split", "class"]}
    with pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for first in range(0, len(values_NF), ROWS_AT_ONCE):
            block_NF = values_NF[first : first + ROWS_AT_ONCE]
            names, splits, labels, classes = zip(*itertools.islice(rows, len(block_NF)), strict=True)
            columns = names, splits, [n if n >= 0 else None for n in labels], [name or None for name in classes]
            beside = [pyarrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block_NF.reshape(-1)), width)
            writer.write_table(pyarrow.table([*beside, features.cast(vector)], schema))
