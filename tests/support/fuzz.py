"""Damaged files by the hundred, each made from a sound one by a seed, through every reader of files.

    PYTHONPATH=.:tests python -m support.fuzz READER FIRST COUNT

reads the cases FIRST to FIRST + COUNT - 1 of a reader. A case has the same bytes everywhere. What reads may return, or
raise a DataError or UserError; anything else ends the process with a traceback, a signal or the watchdog's report, and
the last line on stdout names the case.
"""

import contextlib
import faulthandler
import io
import json
import os
import pathlib
import pickle
import random
import resource
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from fasttrain.dataprep import verify
from fasttrain.dataprep.destination import LocalFolder
from fasttrain.dataprep.encode import EncodedImage, Encoding, encode_image, encode_samples
from fasttrain.dataprep.order import shuffled_splits
from fasttrain.dataprep.plan import PlannedShard
from fasttrain.dataprep.shards import read_record, record_shard, write_images
from fasttrain.dataprep.sources.kinds import fingerprint, open_source
from fasttrain.dataprep.sources.pickled import unpickled
from fasttrain.formats import image
from fasttrain.formats.beton import BetonWriter
from fasttrain.formats.listing import Sample
from fasttrain.formats.manifest import Manifest, Shard
from fasttrain.formats.names import count_lines, names_path, read_names, sample_name
from fasttrain.formats.tar import TarShardWriter
from fasttrain.system.errors import DataError, UserError

PATIENCE_SECONDS = 120  # for one case, which takes milliseconds: a machine may be slow, but not that slow
MEMORY = 1 << 30  # bytes that a case may take of addresses, besides those of the process before
LARGEST_IMAGE = 1 << 20  # pixels; the true limit would have cases take seconds

SMALL = Encoding(max_side=8)

Files = dict[str, bytes]  # by name
Damage = Callable[[random.Random, bytes, bytes], bytes]  # of a file, with another one at hand


def picture(seed: int, kind: str = "JPEG", **options: object) -> bytes:
    """A small noisy image."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12 + seed, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


PICTURES = {f"{number}.jpg": picture(number) for number in range(4)}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
ROWS = PIXELS.transpose(0, 3, 1, 2).reshape(4, -1)
LABELS = [0, 1, 0, 1]


def tar_of(members: Files, format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zip_of(members: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npy_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def classed(members: Files) -> Files:
    return {
        f"photos/{'ab'[row % 2]}/{'long' * 30}{name}": content for row, (name, content) in enumerate(members.items())
    }


def labelled(members: Files) -> Files:
    label = {".cls": b"3", ".json": b'{"label": {"deep": [1, 2.5, "text"]}, "cls": 1}'}
    files: Files = {}
    for row, (name, content) in enumerate(members.items()):
        files[name] = content
        extension = (".cls", ".json")[row % 2]
        files[name.replace(".jpg", extension)] = label[extension]
    return files


def arrays() -> Files:
    streams = b"".join(PICTURES.values())
    ends = np.cumsum([0, *map(len, PICTURES.values())])
    found = {
        "train_jpeg": np.frombuffer(streams, np.uint8),
        "train_offsets": ends,
        "train_labels": np.array(LABELS),
        "classes": np.array(["ant", "bee"]),
        "val_images": PIXELS,
        "val_labels": np.array([b"ant", b"bee"] * 2),
    }
    return {f"{name}.npy": npy_of(array) for name, array in found.items()}


def batches(binary: bool) -> Files:
    if binary:
        return {
            "data_batch_1.bin": np.hstack([np.array(LABELS, np.uint8)[:, None], ROWS]).tobytes(),
            "batches.meta.txt": b"ant\nbee\n",
        }
    names = pickle.dumps({"label_names": ["ant", "bee"], "num_vis": 3072}, 2)
    return {
        "data_batch_1": pickle.dumps({b"labels": LABELS, b"data": ROWS, b"scalar": np.float32(2)}, 2),
        "batches.meta": names,
    }


def pickles() -> Files:
    content = {"data": PIXELS[0, 0, :3], "labels": [np.int64(3), 4, None], b"names": ("ant", b"bee", {"nested": 2.5})}
    return {str(protocol): pickle.dumps(content, protocol) for protocol in range(6)}


def table() -> Files:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    columns = {
        "image": [{"bytes": content, "path": name} for name, content in PICTURES.items()],
        "label": ["ant", "bee", "ant", None],
        "caption": ["x" * 50] * 4,
    }
    pq.write_table(pa.table(columns), stream, row_group_size=2)
    return {"a.parquet": stream.getvalue()}


def shard(suffix: str) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"train-00000{suffix}"
        with TarShardWriter(path) if suffix == ".tar" else BetonWriter(path, 8) as writer:
            for row, content in enumerate(PICTURES.values()):
                writer.write(content, 12 + row, 20, LABELS[row])
        return {file.name: file.read_bytes() for file in sorted(pathlib.Path(folder).iterdir())}


def manifest() -> Files:
    entry = Shard("train-00000.beton", 4, 1000, "0" * 64, None, ("0" * 16,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": [2, 2]}
        Manifest("ffcv", ["ant", "bee"], {"train": [entry]}, [0.5] * 3, [0.2] * 3, {"seed": 0}, [], counts, {}).save(
            folder
        )
        return {"manifest.json": (pathlib.Path(folder) / "manifest.json").read_bytes()}


PLANNED = PlannedShard("train-00000.beton", "train", [Sample(f"ä{row}.jpg", LABELS[row]) for row in range(4)], 1)


def recorded() -> Files:
    """A shard as an unfinished conversion leaves it: with its names and its record."""
    images = (EncodedImage(content, 12 + row, 20, True, None) for row, content in enumerate(PICTURES.values()))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        record_shard(write_images(path, PLANNED, images, lambda *_: None, lambda _: None), LocalFolder(path))
        return {file.name: file.read_bytes() for file in sorted(pathlib.Path(folder).iterdir())}


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # turned by a quarter
EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\1")
NUMBERS = (b"-1", b"0", b"99999999999999999999", b"1e999", b"2147483648", b"NaN", b"null", b"[" * 3000, b'"\\ud800"')

VALUES = ("null", "true", "-1", "0.5", "1e308", "NaN", "[]", "[[1]]", "{}", '{"a": 1}', '""', '"text"', '"../x"',
          '"\\u0000"', '"\\ud800"', "1" + "0" * 30, "[" * 50 + "]" * 50)  # fmt: skip


def flipped(draw: random.Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def extreme(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """A field of some bytes at an extreme, as sizes and counts are; near one of the ends as often as anywhere."""
    size = draw.choice((1, 2, 4, 8))
    near = draw.choice((len(data), min(64, len(data))))
    at = draw.choice((draw.randrange(near), len(data) - 1 - draw.randrange(near)))
    last = draw.choice(EXTREMES) if draw.random() < 0.5 else None
    value = draw.choice(EXTREMES) * size
    return data[:at] + (value[:-1] + last if last else value) + data[at + size :]


def spliced(draw: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = sorted(draw.randrange(len(other) + 1) for _ in range(2))
    at = draw.randrange(len(data) + 1)
    return data[:at] + other[start:end] + data[at + draw.choice((0, end - start)) :]


def doubled(draw: random.Random, data: bytes, _: bytes) -> bytes:
    unit = draw.choice((1, 16, 512))
    start = draw.randrange(len(data)) // unit * unit
    return data[:start] + data[start : start + unit * draw.randrange(1, 9)] * draw.choice((2, 3, 50)) + data[start:]


def renumbered(draw: random.Random, data: bytes, _: bytes) -> bytes:
    """A run of digits replaced, as sizes in text are."""
    places = [at for at in range(len(data)) if 48 <= data[at] < 58] or [0]
    start = end = draw.choice(places)
    while end < len(data) and 48 <= data[end] < 58:
        end += 1
    return data[:start] + draw.choice(NUMBERS) + data[max(end, start + 1) :]


DAMAGES: tuple[Damage, ...] = (flipped, cut, extreme, extreme, spliced, doubled, renumbered)


def damaged(draw: random.Random, data: bytes, other: bytes) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 3))):
        data = draw.choice(DAMAGES)(draw, data or b"\0", other)
    return data


def summed(draw: random.Random, tar: bytes) -> bytes:
    """The checksums of a tar's headers put right, half of the time: a reader looks no further otherwise."""
    blocks = [bytearray(tar[at : at + 512]) for at in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and draw.random() < 0.5:
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return b"".join(blocks)


def one_damaged(draw: random.Random, files: Files) -> Files:
    name = draw.choice(sorted(files))
    return {**files, name: damaged(draw, files[name], draw.choice(sorted(files.values())))}


def one_tar_damaged(draw: random.Random, files: Files) -> Files:
    changed = one_damaged(draw, files)
    return {name: summed(draw, data) if name.endswith(".tar") else data for name, data in changed.items()}


def value_damaged(draw: random.Random, files: Files) -> Files:
    """One value somewhere in a JSON file replaced by another kind of value, or left out."""
    name = next(name for name in files if name.endswith(".json"))
    content = json.loads(files[name])
    places: list[tuple[Any, Any]] = [(content, key) for key in content]
    for holder, key in places:  # it grows on the way
        inner = holder[key]
        if isinstance(inner, dict | list):
            places += [(inner, key) for key in (inner if isinstance(inner, dict) else range(len(inner)))]
    holder, key = draw.choice(places)
    holder[key] = json.loads(draw.choice(VALUES))
    if draw.random() < 0.1:
        del holder[key]
    return {**files, name: json.dumps(content).encode()}


def members_damaged(pack: Callable[[Files], bytes], name: str) -> Callable[[random.Random, Files], Files]:
    """Damage within a sound archive."""
    return lambda draw, files: {name: pack(one_damaged(draw, files))}


def read_source(folder: pathlib.Path, name: str) -> None:
    """List a source and encode its samples, as a conversion does."""
    source = open_source(folder / name if name else folder)
    fingerprint(source)
    for samples in shuffled_splits(source, 0.0, 0).values():
        for _ in encode_samples(source.reader, [(sample, True) for sample in samples[:20]], SMALL):
            pass


def read_shard(folder: pathlib.Path) -> None:
    path = next(path for path in sorted(folder.iterdir()) if path.suffix in (".beton", ".tar"))
    count = len(verify.read_labels(path))
    images = verify.Images(path, count, None)
    verify.check_images(images, range(min(count, 20)), verify.open_images, lambda: None)


def read_image(folder: pathlib.Path) -> None:
    (path,) = folder.iterdir()
    with contextlib.suppress(DataError):
        image.read_rgb(path.read_bytes())
    encode_image(path.read_bytes(), SMALL)


def read_manifest(folder: pathlib.Path) -> None:
    Manifest.load(folder).check_shards(folder)


def read_unfinished(folder: pathlib.Path) -> None:
    """Read what another run continues: the record tells of damage itself, and the shard is made again."""
    read_record(LocalFolder(folder), PLANNED, 2)
    path = names_path(folder / PLANNED.name)
    count_lines(path)
    sample_name(folder / PLANNED.name, 3, path)
    read_names(path, 4)


def read_pickle(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(DataError):
            unpickled(path.read_bytes())


def from_file(name: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: read_source(folder, name)


Reader = tuple[Callable[[], Files], Callable[[random.Random, Files], Files], Callable[[pathlib.Path], None]]

# By name: the sound files, what damages them, and what reads the folder that they are written to.
READERS: dict[str, Reader] = {
    "pickle": (pickles, one_damaged, read_pickle),
    "cifar": (lambda: batches(binary=False), one_damaged, from_file("")),
    "cifar-binary": (lambda: batches(binary=True), one_damaged, from_file("")),
    "npz": (lambda: {"a.npz": zip_of(arrays())}, one_damaged, from_file("a.npz")),
    "npz-stored": (lambda: {"a.npz": zip_of(arrays(), zipfile.ZIP_STORED)}, one_damaged, from_file("a.npz")),
    "npy": (arrays, members_damaged(zip_of, "a.npz"), from_file("a.npz")),
    "zip": (lambda: {"a.zip": zip_of(classed(PICTURES))}, one_damaged, from_file("a.zip")),
    "tar": (lambda: {"a.tar": tar_of(classed(PICTURES))}, one_tar_damaged, from_file("a.tar")),
    "tar-gnu": (lambda: {"a.tar": tar_of(classed(PICTURES), tarfile.GNU_FORMAT)}, one_tar_damaged, from_file("a.tar")),
    "webdataset": (lambda: labelled(PICTURES), members_damaged(tar_of, "a.tar"), from_file("a.tar")),
    "parquet": (table, one_damaged, from_file("a.parquet")),
    "beton-source": (lambda: shard(".beton"), one_damaged, from_file("train-00000.beton")),
    "beton": (lambda: shard(".beton"), one_damaged, read_shard),
    "tar-shard": (lambda: shard(".tar"), one_tar_damaged, read_shard),
    "jpeg": (lambda: {"a": picture(1)}, one_damaged, read_image),
    "progressive": (lambda: {"a": picture(1, progressive=True, exif=EXIF)}, one_damaged, read_image),
    "png": (lambda: {"a": picture(1, "PNG")}, one_damaged, read_image),
    "webp": (lambda: {"a": picture(1, "WEBP")}, one_damaged, read_image),
    "gif": (lambda: {"a": picture(1, "GIF")}, one_damaged, read_image),
    "tiff": (lambda: {"a": picture(1, "TIFF", compression="tiff_lzw")}, one_damaged, read_image),
    "bmp": (lambda: {"a": picture(1, "BMP")}, one_damaged, read_image),
    "manifest": (manifest, one_damaged, read_manifest),
    "manifest-values": (manifest, value_damaged, read_manifest),
    "record": (recorded, one_damaged, read_unfinished),
    "record-values": (recorded, value_damaged, read_unfinished),
}  # fmt: skip


@contextlib.contextmanager
def _watched(case: str) -> Iterator[None]:
    print(case, flush=True)
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def run(reader: str, first: int, count: int) -> None:
    """Read damaged files; raises what no reader may."""
    sound, damage, read = READERS[reader]
    files = sound()
    with tempfile.TemporaryDirectory() as root:
        for number in range(first, first + count):
            folder = pathlib.Path(root) / str(number)  # of its own: readers keep files open by their names
            folder.mkdir()
            for name, data in damage(random.Random(f"{reader} {number}"), files).items():
                (folder / name).write_bytes(data)
            with _watched(f"{reader} {number}"), contextlib.suppress(DataError, UserError):
                read(folder)


def main() -> None:
    reader, first, count = sys.argv[1:]
    faulthandler.enable()
    os.environ["FASTTRAIN_DEBUG"] = "1"
    image.MAX_PIXELS = LARGEST_IMAGE
    run(reader, -1, 1)  # what is imported and cached late does not count as a case's memory
    taken = int(pathlib.Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    run(reader, int(first), int(count))


if __name__ == "__main__":
    main()
