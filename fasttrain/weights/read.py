"""Files of weights, read so that nothing in them is run: torch.save's, of any age, and safetensors."""

from __future__ import annotations

import argparse
import codecs
import hashlib
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.formats.boundary import one_line
from fasttrain.system.errors import UserError
from fasttrain.system.memory import is_full_memory
from fasttrain.system.regular import open_regular
from fasttrain.weights.foreign import present_name

MAX_BYTES = 1 << 35  # of a file, far more than an image encoder and its optimizer take
READ_BYTES = 1 << 20
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how torch.save's files begin, since 1.6 and before
_numpy = np._core if hasattr(np, "_core") else np.core  # type: ignore[attr-defined] # its name until NumPy 2
# What published checkpoints hold beside tensors, numbers and text: the options of their command, and NumPy's numbers.
HARMLESS: list[Any] = [
    argparse.Namespace, np.dtype, codecs.encode, np.ndarray, *(type(np.dtype(c)) for c in "?bBhHiIlLqQefdSU"),
    *((getattr(_numpy.multiarray, name), f"numpy.{core}.multiarray.{name}")
      for name in ("scalar", "_reconstruct") for core in ("core", "_core")),
]  # fmt: skip
FOREIGN = re.compile(r"GLOBAL (\S+) was not an allowed|unsupported GLOBAL (\S+) whose")


class File(NamedTuple):
    """What a file holds: tensors by name, the names of nested dicts joined by dots. digest: SHA-256 of the file."""

    tensors: dict[str, Tensor]
    digest: str
    content: Any


def read_file(path: pathlib.Path) -> File:
    """Read a file of weights onto the CPU. Raises UserError, in one line, for what is none, or holds anything else."""
    try:
        with open_regular(path) as file:
            digest = _digest(file)
            file.seek(0)
            content = _content(path, file)
        return File(tensors_of(content), digest, content)
    except UserError as error:
        raise UserError(f"{path} can't be read as weights: {error}") from None
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        raise UserError(f"{path} can't be read as weights: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if is_full_memory(error):
        return "it takes more memory than there is"
    if isinstance(error, pickle.UnpicklingError):  # torch goes on to say how to run what is in it
        found = FOREIGN.search(str(error))
        if found is None:
            return "it is damaged, or holds other things than tensors, numbers and text"
        return f"it holds {found[1] or found[2]}, which could run code: save the state dict alone"
    return one_line(f"{type(error).__name__}: {error}", 200)


def _digest(file: BinaryIO) -> str:
    """Raises UserError for a file that can't be one of weights, before it is read as a whole."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UserError("it is empty")
    if size > MAX_BYTES:
        raise UserError(f"it is larger than {MAX_BYTES >> 30} GiB")
    start = file.read(9)
    if not start.startswith((ZIP, PICKLE)) and not _is_safetensors(start, size):
        raise UserError("it is no file of torch.save or safetensors")
    sha256 = hashlib.sha256(start)
    while data := file.read(READ_BYTES):
        sha256.update(data)
    return sha256.hexdigest()


def _is_safetensors(start: bytes, size: int) -> bool:
    """The length of a JSON object, and its first character."""
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


def _content(path: pathlib.Path, file: BinaryIO) -> object:
    start = file.read(9)
    if not start.startswith((ZIP, PICKLE)):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError("the package safetensors is missing here") from None
        return load_file(path)
    if start.startswith(ZIP):
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise UserError("it is compressed, which torch.save's files are not")
    file.seek(0)
    with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols other than torch's usual one
        return torch.load(file, map_location="cpu", weights_only=True)


def tensors_of(content: object) -> dict[str, Tensor]:
    """Dense tensors, of values, by their present names, of dicts within dicts; of one that is there twice, once."""
    found, seen, left = {}, set(), [("", content)]
    while left:
        path, value = left.pop()
        if isinstance(value, Tensor):
            if path and value.layout == torch.strided and not value.is_meta:
                found[present_name(path)] = value.detach()
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            inside = [(f"{path}.{key}" if path else key, v) for key, v in value.items() if isinstance(key, str)]
            left += reversed(inside)
    return found


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors that lie in no file: of their names, dtypes, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha256.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
