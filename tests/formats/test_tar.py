"""WebDataset shards: every reader finds the same samples, and the bytes depend on nothing but source and settings."""

import io
import json
import resource
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasttrain.dataprep import convert
from fasttrain.dataprep.sources.kinds import open_source
from fasttrain.formats import jpeg, tar
from fasttrain.formats.image import read_rgb
from fasttrain.formats.manifest import Manifest
from fasttrain.formats.tar import TarShardError, TarShardReader, TarShardWriter, index_path


def make_source(root: Path, per_class: int = 6) -> Path:
    for c in range(2):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", (40, 24), (90 * c, 12 * i, 128)).save(root / f"class{c}" / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tar")
    run(make_source(folder / "source"), folder / "out")
    return folder / "out"


def run(source: Path, out: Path, *more: object) -> int:
    options = ("--format", "webdataset", "--shard-size", 5, "--workers", 2, *more)
    return convert.main([str(source), str(out), *map(str, options)])


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def numbers(pixels_HW3: np.ndarray, label: int) -> tuple[int, int]:
    red, green, _ = pixels_HW3.reshape(-1, 3).mean(0)
    assert round(red / 90) == label
    return label, round(green / 12)


EVERY = [(c, i) for c in range(2) for i in range(6)]


def test_files_and_manifest(converted: Path) -> None:
    manifest = Manifest.load(converted)
    manifest.check_shards(converted)
    assert sorted(files_of(converted)) == [
        "manifest.json", *sorted(f"train-0000{i}.{kind}" for i in range(3) for kind in ("tar", "idx", "names"))
    ]  # fmt: skip
    assert [shard.num_samples for shard in manifest.splits["train"]] == [5, 5, 2]
    with tarfile.open(converted / "train-00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["train-00000-0000000.jpg", "train-00000-0000000.cls"]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}


def test_reads_back_as_a_source(converted: Path, tmp_path: Path) -> None:
    source = open_source(converted)
    assert source.classes == ("class0", "class1")
    seen = [numbers(jpeg.decode(source.reader.read(s)), s.label) for s in source.splits["train"]]
    assert sorted(seen) == EVERY != seen


def test_the_webdataset_package_reads_it(converted: Path) -> None:
    wds = pytest.importorskip("webdataset")
    files = sorted(map(str, converted.glob("*.tar")))
    samples = wds.WebDataset(files, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
    assert sorted(numbers(np.asarray(image), label) for image, label in samples) == EVERY


def test_small_lossless_images_are_png_members_that_other_readers_take(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    images = [np.full((8, 8 + i, 3), 20 * i, np.uint8) for i in range(4)]
    for i, pixels_HW3 in enumerate(images):
        Image.fromarray(pixels_HW3).save(tmp_path / "source" / f"{i}.png")
    Image.new("RGB", (40, 24)).save(tmp_path / "source" / "photograph.jpg")
    assert run(tmp_path / "source", tmp_path / "out") == 0
    (path,) = (tmp_path / "out").glob("*.tar")
    with tarfile.open(path) as tar:
        names = [name.split(".")[1] for name in tar.getnames()]
    assert (names.count("png"), names.count("jpg"), names.count("cls")) == (4, 1, 5)
    source = open_source(tmp_path / "out")
    read = [read_rgb(source.reader.read(sample)) for sample in source.splits["train"]]
    assert {pixels.tobytes() for pixels in images} < {pixels.tobytes() for pixels in read}
    wds = pytest.importorskip("webdataset")
    samples = wds.WebDataset(str(path), shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("jpg;png", "cls")
    assert [pixels.shape for pixels, _ in samples] == [pixels.shape for pixels in read]
    wds2idx = pytest.importorskip("wds2idx")
    with wds2idx.IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert index_path(path).read_text() == (tmp_path / "theirs.idx").read_text()


@pytest.mark.parametrize("with_index", [True, False])
def test_dali_reads_it(converted: Path, with_index: bool) -> None:
    dali = pytest.importorskip("nvidia.dali")
    fn, pipeline = pytest.importorskip("nvidia.dali.fn"), pytest.importorskip("nvidia.dali.pipeline")
    paths = sorted(map(str, converted.glob("*.tar")))
    index = {"index_paths": sorted(map(str, converted.glob("*.idx")))} if with_index else {}

    @pipeline.pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipe() -> tuple[Any, Any]:
        encoded, label = fn.readers.webdataset(
            paths=paths, ext=["jpg", "cls"], missing_component_behavior="error", **index
        )
        return fn.decoders.image(encoded, device="cpu", output_type=dali.types.RGB), label

    built = pipe()
    built.build()
    seen = []
    for _ in range(3):
        images, labels = built.run()
        for image, label in zip(images, labels, strict=True):
            seen.append(numbers(np.asarray(image), int(bytes(np.asarray(label)))))
    assert sorted(seen) == EVERY


def test_the_index_is_that_of_wds2idx(converted: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    path = converted / "train-00001.tar"
    with wds2idx.IndexCreator(str(path), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert index_path(path).read_text() == (tmp_path / "theirs.idx").read_text()


def test_same_bytes_again_and_after_an_interruption(converted: Path, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    assert run(source, tmp_path / "out", "--workers", 1) == 0
    assert files_of(tmp_path / "out") == files_of(converted)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert run(source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes()) == manifest


def test_raw_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(make_source(tmp_path / "source"), tmp_path / "out", "--write", "raw") == 2
    assert "a .tar shard holds files of images" in capfd.readouterr().err
    with TarShardWriter(tmp_path / "a.tar") as writer, pytest.raises(ValueError, match="JPEGs and PNGs only"):
        writer.write(b"", 1, 1, 0, raw=True)
    assert not list(tmp_path.glob("a.*"))


def test_a_disk_that_is_full_at_the_end_leaves_neither_shard_nor_index(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the shard does not fit, its index would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = TarShardWriter(tmp_path / "a.tar")
    writer.write(bytes(500_000), 1, 1, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), writer:
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("held", [0, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"no v1\.2 index"),
        ("v1.2 2\njpg 512 1 a cls 1 1 b\n", r"no v1\.2 index"),
        ("v1.2 1\njpg x 1 a cls 1 1 b\n", "a place is no number"),
        ("v1.2 1\njpg 1 1 a\n", r"a sample is not one \.jpg or \.png followed by one \.cls"),
        ("v1.2 1\njpg 1 1 a cls 1 1 b", r"no v1\.2 index"),
        ("v1.2 1\njpg 1 99999999 a cls 1 1 a\n", r"a sample lies outside a\.tar"),
        ("v1.2 1\njpg 1 1 a cls 1 99999999999999999999 a\n", "a place is no number"),
        ("v1.2 1\njpg 1_0 1 a cls 1 1 a\n", "a place is no number"),
        ("v1.2 1\njpg -1 1 a cls 1 1 a\n", "a place is no number"),
        ("v1.2 1\njpg 1 " + "9" * 900 + " a cls 1 1 a\n", "a place is no number"),
        ("v1.2 1\njpg 1 1 " + "a" * 9000 + " cls 1 1 a\n", "larger than"),
        ("v1.2 1\ncls 1 1 a jpg 1 1 a\n", r"a sample is not one \.jpg or \.png followed by one \.cls"),
    ],
)
def test_damaged_indices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str, held: int
) -> None:
    monkeypatch.setattr(tar, "HELD_BYTES", held)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    with TarShardWriter(tmp_path / "a.tar") as writer:
        writer.write(stream.getvalue(), 8, 8, -1)
    reader = TarShardReader(tmp_path / "a.tar")
    assert reader.image(reader.sample(0)).tobytes() == reader.image_bytes(reader.sample(0)) == stream.getvalue()
    assert reader.label(0) == -1
    (tmp_path / "a.idx").write_text(content)
    with pytest.raises(TarShardError, match=rf"a.idx: {message}"):
        TarShardReader(tmp_path / "a.tar").sample(0)


@pytest.mark.parametrize("label", [b"99999999999999999999", b"-2", b"x", b"2147483648", b"1.0"])
def test_a_label_that_is_no_class(tmp_path: Path, label: bytes) -> None:
    with TarShardWriter(tmp_path / "a.tar") as writer:
        writer.write(b"x", 8, 8, 10 ** (len(label) - 1))
    at = TarShardReader(tmp_path / "a.tar").sample(0).label_at
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:at] + label + content[at + len(label) :])
    with pytest.raises(TarShardError, match=r"sample 0 of .*a\.tar: its \.cls is no number of a class"):
        TarShardReader(tmp_path / "a.tar").label(0)
