"""--shuffle block: the files of a source are read from front to back, some at a time; what that does to the order."""

import io
import itertools
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import one_line_of

from fasttrain.dataprep import convert, order
from fasttrain.dataprep.order import LANES, Chosen, everywhere, in_lanes, in_windows, shuffled_splits
from fasttrain.dataprep.sources.archive import TarReader
from fasttrain.dataprep.sources.kinds import open_source
from fasttrain.formats.listing import Sample
from fasttrain.formats.manifest import Manifest

FEW = 4  # lanes


def write_tars(root: Path, files: int, per_file: int, names: str = "set-{:03d}.tar", labels: bool = True) -> Path:
    """Tars of JPEGs of one colour each, and perhaps their labels: WebDatasets, or folders of images."""
    root.mkdir(exist_ok=True)
    for file in range(files):
        with tarfile.open(root / names.format(file), "w") as archive:
            for i in reversed(range(per_file)):  # where names are sorted, members lie in another order
                stream = io.BytesIO()
                Image.new("RGB", (8, 8), (file * 9 % 256, i * 7 % 256, 100)).save(stream, "JPEG")
                members = {f"{i:04d}.jpg": stream.getvalue(), **({f"{i:04d}.cls": b"%d" % file} if labels else {})}
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return root


@pytest.fixture
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "LANES", FEW)


def places(source_path: Path, seed: int = 0, val_fraction: float = 0.0) -> dict[str, list[tuple[int, ...]]]:
    splits = shuffled_splits(open_source(source_path), val_fraction, seed, block=True)
    return {split: [sample.place for sample in samples] for split, samples in splits.items()}


@pytest.mark.usefixtures("few_lanes")
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("val_fraction", [0.0, 0.3])
def test_files_are_read_from_front_to_back_a_few_at_a_time(tmp_path: Path, labels: bool, val_fraction: float) -> None:
    name = "set-{:03d}.tar" if labels else "n{:08d}x.tar"
    root = write_tars(tmp_path / "tars", 11, 13, name, labels)
    source = open_source(root, "auto" if labels else "tar")
    for samples in shuffled_splits(source, val_fraction, 3, block=True).values():
        taken = [sample.place for sample in samples]
        assert len(set(taken)) == len(taken)
        lanes = [taken[lane::FEW] for lane in range(FEW)]
        for lane in lanes:
            files = [place[0] for place in lane]
            changes = [file for file, before in zip(files, [None, *files], strict=False) if file != before]
            assert len(changes) == len(set(changes)), "a lane comes to a file once"
            for file in changes:
                offsets = [place[1] for place in lane if place[0] == file]
                assert offsets == sorted(offsets)
        sizes = [len(lane) for lane in lanes]
        assert max(sizes) - min(sizes) <= 1
    whole = [place for samples in shuffled_splits(source, val_fraction, 3, True).values() for _, _, place in samples]
    assert sorted(whole) == sorted(sample.place for sample in source.splits["train"])


@pytest.mark.usefixtures("few_lanes")
def test_the_reads_of_a_conversion_are_in_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tars(tmp_path / "tars", 6, 20)
    reads: list[tuple[int, int]] = []
    read = TarReader.read

    def recorded(self: TarReader, sample: Sample) -> bytes:
        reads.append(sample.place[:2])
        return read(self, sample)

    monkeypatch.setattr(TarReader, "read", recorded)
    options = ("--shard-size", "16", "--workers", "1")
    assert convert.main([str(root), str(tmp_path / "out"), *options, "--shuffle", "block"]) == 0
    assert len(reads) == 120
    at: dict[int, list[int]] = defaultdict(list)  # by lane
    for number, (file, offset) in enumerate(reads):
        at[number % FEW].append(file * 10**9 + offset)
    jumps_back = sum(int(a > b) for lane in at.values() for a, b in itertools.pairwise(lane))
    assert jumps_back <= 6, "only from one file to another"
    for start in range(len(reads) - FEW):
        assert len({file for file, _ in reads[start : start + FEW]}) <= FEW
    reads.clear()
    assert convert.main([str(root), str(tmp_path / "global"), *options]) == 0
    back = sum(int(a > b) for a, b in itertools.pairwise(reads))
    assert back > 40, "a global shuffle reads here and there"


@pytest.mark.usefixtures("few_lanes")
def test_parts_read_their_share_of_every_lane(tmp_path: Path) -> None:
    root = write_tars(tmp_path / "tars", 6, 20)
    options = ("--shard-size", "16", "--workers", "1", "--shuffle", "block")
    assert convert.main([str(root), str(tmp_path / "whole"), *options]) == 0
    for number in (3, 1, 2):
        convert.main([str(root), str(tmp_path / "parts"), *options, "--part", f"{number}/3"])
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert json.loads(files[0]["manifest.json"])["settings"]["shuffle"] == "block"


def test_a_set_keeps_the_shuffle_that_it_was_made_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, out = write_tars(tmp_path / "tars", 3, 10), tmp_path / "out"
    assert convert.main([str(root), str(out), "--shuffle", "block"]) == 0
    assert "shuffle" in Manifest.load(out).settings
    assert convert.main([str(root), str(out), "--shuffle", "block"]) == 0
    assert "already converted" in capfd.readouterr().out
    for shuffle in ("auto", "global"):
        assert convert.main([str(root), str(out), "--shuffle", shuffle]) == 2
        assert "other settings: shuffle" in one_line_of(capfd.readouterr().err)


def test_auto_follows_from_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tars(tmp_path / "tars", 3, 4)
    assert order.chosen_shuffle(open_source(root), "auto") == "global"
    monkeypatch.setattr(order, "LANES", 3)
    assert order.chosen_shuffle(open_source(root), "auto") == "global"
    monkeypatch.setattr(order, "BLOCK_BYTES", 100)
    assert order.chosen_shuffle(open_source(root), "auto") == "block"
    assert order.chosen_shuffle(open_source(root), "global") == "global"


def test_a_folder_is_not_read_in_sequence(
    image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(image_folder), str(tmp_path / "out"), "--shuffle", "block"]) == 2
    assert "--shuffle block is for .tar and .beton files" in one_line_of(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_every_order_takes_each_image_once() -> None:
    start_G, count = np.array([0, 5, 5, 200, 1000, 1001]), 1001
    bytes_G = np.array([10, 0, 1 << 27, 1 << 26, 5])
    for seed in range(3):
        for taken in (everywhere(count, seed), in_windows(start_G, bytes_G, seed), in_lanes(start_G, seed)):
            assert sorted(taken(np.arange(count)).tolist()) == list(range(count))
            assert taken(np.array([700])).tolist() == taken(np.arange(count))[700:701].tolist(), "any part by itself"
    assert in_lanes(start_G, 0)(np.arange(count)).tolist() != in_lanes(start_G, 1)(np.arange(count)).tolist()


@pytest.mark.parametrize("listed", [[], [0], [3, 4, 9], list(range(10))])
def test_chosen_rows(listed: list[int]) -> None:
    row_V = np.array(listed, np.int64)
    others = [row for row in range(10) if row not in listed]
    for chosen, expected in ((Chosen(10, row_V), others), (Chosen(10, row_V, without=False), listed)):
        assert chosen.rows(np.arange(len(chosen))).tolist() == expected
        assert chosen.before(np.arange(11)).tolist() == [sum(row < end for row in expected) for end in range(11)]


def test_how_well_a_block_shuffle_mixes() -> None:
    """Of a source sorted by class in 1,000 tars of 1,000 images, 64 in sequence give each shard 64 stretches."""
    start_G = np.arange(0, 1_000_001, 1000)
    file_N = in_lanes(start_G, 0)(np.arange(1 << 17)) // 1000
    distinct = [len(set(file_N[start : start + 2048].tolist())) for start in range(0, 1 << 17, 2048)]
    assert min(distinct) >= LANES
    assert max(distinct) <= 2 * LANES
    most = max(Counter(file_N[start : start + 2048].tolist()).most_common(1)[0][1] for start in range(0, 1 << 17, 2048))
    assert most <= 2 * 2048 // LANES
