"""What a shard may hold of an image: a JPEG of its own tables, pixels, a PNG. All loaders take and refuse the same."""

import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.loading import images

from fasttrain.dataprep.convert import main as convert
from fasttrain.dataprep.shards import checksum
from fasttrain.dataprep.verify import main as verify
from fasttrain.formats.beton import BetonWriter
from fasttrain.formats.manifest import Manifest
from fasttrain.formats.tar import TarShardReader
from fasttrain.input import Order, open_dataset, open_loader
from fasttrain.input.dali import DaliLoader
from fasttrain.input.folder_store import FolderStore
from fasttrain.input.stores import Store


def has_dali() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


DALI = pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="NVIDIA DALI is not installed"))
DQT, DHT = b"\xff\xdb", b"\xff\xc4"
COUNT = 14  # of sound images


def noise(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def with_comments_for(data: bytes, *markers: bytes) -> bytes:
    """The same stream with comments in place of its tables: not a byte longer."""
    for marker in markers:
        data = data.replace(marker + b"\0", b"\xff\xfe\0")
    return data


UNSOUND = {"0no-dqt": (DQT,), "10no-tables": (DQT, DHT), "5no-dht": (DHT,)}


def make_source(folder: pathlib.Path, sound: bool = False) -> pathlib.Path:
    """Sound JPEGs, each of other tables, and three that use tables without defining them, unless these are sound."""
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:02d}.jpg").write_bytes(as_jpeg(noise(i), quality=20 + 5 * i, optimize=i % 2 == 0))
    for i, (name, markers) in enumerate(UNSOUND.items()):
        data = as_jpeg(noise(COUNT + i))
        (folder / f"{name}.jpg").write_bytes(data if sound else with_comments_for(data, *markers))
    return folder


def decoded(store: Store, kind: str, seed: int, workers: int) -> tuple[dict[int, bytes], dict[str, str]]:
    """The pixels of every image that an epoch gives, and what it found unusable."""
    order = Order(store.num_samples, store.num_samples, seed=seed)  # all of them in one batch
    loader: Any = open_loader(store, order, workers, kind, torch.device("cpu"), max_failed_fraction=1.0)
    found = {i: pixels.tobytes() for batch in loader.epoch(0) for i, _, pixels in images(batch)}
    loader.close()
    return found, loader.failed


@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
def test_a_conversion_skips_what_lacks_tables_whatever_the_order(tmp_path: pathlib.Path, format: str) -> None:
    source = make_source(tmp_path / "source")
    for seed in (0, 1):
        written = set()
        for workers in (1, 2, 3):
            out = tmp_path / f"{seed}-{workers}"
            words = ("--format", format, "--seed", seed, "--workers", workers)
            assert convert([str(source), str(out), *map(str, words)]) == 3
            written.add(tuple(path.read_bytes() for path in sorted(out.iterdir())))
        assert len(written) == 1
        skipped = {skip["path"]: skip["reason"].split()[4] for skip in Manifest.load(out).skipped}
        assert skipped == {"0no-dqt.jpg": "quantisation", "10no-tables.jpg": "quantisation", "5no-dht.jpg": "Huffman"}


def test_a_folder_gives_the_same_pixels_in_every_order(tmp_path: pathlib.Path) -> None:
    source = make_source(tmp_path / "source")
    runs = [decoded(FolderStore(source, "train"), "auto", seed, workers) for seed in (0, 1) for workers in (1, 3)]
    for found, failed in runs:
        assert sorted(failed) == [str(source / f"{name}.jpg") for name in UNSOUND]
        assert failed == runs[0][1]
        assert found == runs[0][0]


def unsound_shard(folder: pathlib.Path, format: str) -> pathlib.Path:
    """Three of its streams have lost tables since the conversion, and nothing that is looked at first tells so."""
    data, source = folder / "data", make_source(folder / "source")
    sound = make_source(folder / "sound", sound=True)
    assert convert([str(sound), str(data), "--format", format, "--workers", "1"]) == 0
    (shard,) = (path for path in data.iterdir() if path.suffix in (".tar", ".beton"))
    content = shard.read_bytes()
    for name in UNSOUND:
        content = content.replace((sound / f"{name}.jpg").read_bytes(), (source / f"{name}.jpg").read_bytes())
    shard.write_bytes(content)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"][0] |= {"glimpses": [], "sha256": checksum(shard)}
    (data / "manifest.json").write_text(json.dumps(manifest))
    return data


@pytest.mark.parametrize("kind", ["auto", "resident", DALI])
@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
def test_every_loader_refuses_the_same_of_a_shard(
    tmp_path: pathlib.Path, format: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = unsound_shard(tmp_path, format)
    store = open_dataset(data, "train")
    expected, named = decoded(store, "auto", 0, 1)
    assert len(named) == 3
    assert sorted(reason.split()[3] for reason in named.values()) == ["Huffman", "quantisation", "quantisation"]
    for seed in (0, 1):
        found, failed = decoded(store, kind, seed, 2)
        assert failed == named
        assert found == expected
    capfd.readouterr()
    assert verify([str(data), "--deep"]) == 1
    assert capfd.readouterr().out.count("table that it does not define") == 6  # each is in the last line, too


# Pixels


def small_source(folder: pathlib.Path) -> pathlib.Path:
    """Small lossless images of several formats, a large one, and photographs."""
    folder.mkdir()
    kinds = (("png", {}), ("bmp", {}), ("webp", {"lossless": True}))
    for i, (kind, options) in enumerate(kinds):
        noise(i, 32, 32).save(folder / f"{i}.{kind}", **options)
    noise(3, 96, 64).save(folder / "3.png")
    noise(4, 40, 100).save(folder / "4.png")
    noise(5, 32, 32).save(folder / "5.webp", quality=50)
    for i in (6, 7):
        noise(i, 32, 32).save(folder / f"{i}.jpg")
    return folder


@pytest.mark.parametrize("kind", ["auto", "resident", DALI])
@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
def test_small_lossless_images_come_back_to_the_bit(tmp_path: pathlib.Path, format: str, kind: str) -> None:
    data = tmp_path / "data"
    assert convert([str(small_source(tmp_path / "source")), str(data), "--format", format, "--workers", "2"]) == 0
    found, failed = decoded(open_dataset(data, "train"), kind, 0, 2)
    assert not failed
    exact = [image.tobytes() in found.values() for image in (noise(0, 32, 32), noise(3, 96, 64), noise(4, 40, 100))]
    assert exact == [True, True, False]
    assert sum(noise(i, 32, 32).tobytes() in found.values() for i in range(8)) == 3
    assert verify([str(data), "--deep"]) == 0
    if format == "webdataset":
        (shard,) = data.glob("*.tar")
        reader = TarShardReader(shard)
        assert sum(reader.sample(row).is_png for row in range(8)) == 4


@pytest.mark.skipif(not has_dali(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("format", ["ffcv", "webdataset"])
def test_dali_decodes_pixels_beside_jpegs_itself(
    tmp_path: pathlib.Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    assert convert([str(small_source(tmp_path / "source")), str(data), "--format", format, "--workers", "2"]) == 0
    store = open_dataset(data, "train")
    expected = decoded(store, "auto", 0, 1)
    monkeypatch.setattr(DaliLoader, "_write", None)  # what decodes where DALI can't
    assert decoded(store, "dali", 0, 1) == expected


@pytest.mark.parametrize("kind", ["auto", "resident", DALI])
def test_another_file_in_the_place_of_a_jpeg_is_refused_alike(tmp_path: pathlib.Path, kind: str) -> None:
    data, path = tmp_path / "data", tmp_path / "data/train.beton"
    data.mkdir()
    stream = io.BytesIO()
    noise(1).save(stream, "PNG")
    bare = b"P6\n48 40\n255\n" + noise(2).tobytes()
    with BetonWriter(path, 12) as writer:
        for content in (*(as_jpeg(noise(i)) for i in range(10)), stream.getvalue(), bare):
            writer.write(content, 40, 48, 0)
    found, failed = decoded(open_dataset(data, "train"), kind, 0, 2)
    assert len(failed) == 2
    assert sorted(found) == list(range(10))


def test_a_damaged_png_of_a_shard_is_replaced(tmp_path: pathlib.Path) -> None:
    data = tmp_path / "data"
    words = ("--format", "webdataset", "--workers", "2")
    assert convert([str(small_source(tmp_path / "source")), str(data), *words]) == 0
    (shard,) = data.glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 1
    shard.write_bytes(content)
    found, failed = decoded(open_dataset(data, "train"), "auto", 0, 2)
    assert len(found) == 7
    assert list(failed.values()) == ["damaged: the checksum of its IDAT is wrong"]
    assert verify([str(data), "--deep"]) == 1
