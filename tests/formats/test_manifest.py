"""A manifest from anywhere is checked value by value, and older ones are read as they were."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fasttrain.formats.manifest import Manifest, ManifestError, Shard, glimpses

SHARD = {"name": "train-00000.beton", "num_samples": 2, "num_bytes": 9, "sha256": "00", "index": None, "glimpses": []}
VALID = {
    "version": 2, "format": "ffcv", "classes": ["a", "b"], "splits": {"train": [SHARD]}, "pixel_mean": [0.5] * 3,
    "pixel_std": [0.2] * 3, "settings": {"seed": 0}, "skipped": [{"path": "a/0.jpg", "reason": "damaged"}],
    "class_counts": {"train": [1, 1]}, "versions": {"fasttrain": "1"},
}  # fmt: skip


def loaded(folder: Path, content: object) -> Manifest:
    (folder / "manifest.json").write_text(json.dumps(content))
    return Manifest.load(folder)


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    old = {name: value for name, value in SHARD.items() if name not in ("index", "glimpses")}
    manifest = loaded(tmp_path, {**VALID, "version": 1, "splits": {"train": [old]}})
    assert manifest.splits == {"train": [Shard("train-00000.beton", 2, 9, "00")]}
    assert (manifest.unused, manifest.notes) == ([], [])


def test_what_is_saved_is_loaded_alike(tmp_path: Path) -> None:
    names = {"name": "train-00000.names", "num_bytes": 1, "sha256": "11"}
    more = {"unused": [{"reason": "x", "count": 2, "first": ["y"]}], "notes": ["a note"]}
    manifest = loaded(tmp_path, {**VALID, "splits": {"train": [{**SHARD, "names": names}]}, **more})
    assert [file.name for file in manifest.splits["train"][0].files()] == ["train-00000.beton", "train-00000.names"]
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_bytes())["version"] == 2


def shard(**more: object) -> dict[str, Any]:
    return {"splits": {"train": [{**SHARD, **more}]}}


DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({"classes": "ab"}, "classes: 'ab' is no list"),
    ({"classes": [1, 2]}, r"classes\[0\]: 1 is no text"),
    ({"splits": []}, "splits: .* is no JSON object"),
    ({"splits": {"train": SHARD}}, "is no list"),
    ({"splits": {"train": ["x"]}}, "is no JSON object"),
    ({"pixel_mean": [0.5, 0.5]}, "pixel_mean: .* is no list of 3"),
    ({"pixel_mean": [0.5, 0.5, float("nan")]}, r"pixel_mean\[2\]: nan is no number"),
    ({"pixel_mean": [0.5, 0.5, True]}, r"pixel_mean\[2\]: True is no number"),
    ({"pixel_std": [0.5, 0.5, 1e9]}, r"pixel_std\[2\]: .* is no number from 0 to 1"),
    ({"class_counts": {"train": [1]}}, "class_counts.train: not a count for each of the 2 classes"),
    ({"class_counts": {"other": [1, 1]}}, "class_counts.other: not a count"),
    ({"class_counts": {"train": [1, -1]}}, "-1 is no whole number"),
    ({"settings": []}, "settings"),
    ({"skipped": [{"path": 1, "reason": ""}]}, r"skipped\[0\].path: 1 is no text"),
    ({"versions": {"numpy": 2}}, "versions"),
    ({"surplus": 2}, "unknown entry 'surplus'"),
    ({"unused": ["x"]}, "unused"),
    ({"notes": "x"}, "notes"),
    (shard(num_samples=2.0), "num_samples: 2.0 is no whole number"),
    (shard(num_samples=True), "num_samples: True is no whole number"),
    (shard(num_bytes=1 << 70), "num_bytes"),
    (shard(sha256=None), "sha256: None is no text"),
    (shard(glimpses="x"), "glimpses"),
    (shard(index={"name": "x"}), "is missing"),
    (shard(index=7), "index: 7 is no JSON object"),
    (shard(surplus=7), "unknown entry 'surplus'"),
    (shard(name="train-00000.tar"), "is no .beton file, which the format 'ffcv' has"),
    ({"splits": {"train": [SHARD, SHARD]}}, "named twice"),
    ({"splits": {"train": [SHARD], "val": [SHARD]}}, "named twice"),
    (shard(index={"name": "train-00000.beton", "num_bytes": 1, "sha256": ""}), "named twice"),
]
BAD_NAMES = ["", ".", "..", "/etc/a.beton", "../a.beton", "a/b.beton", "a\0.beton", "a\n.beton", "\x1b[2J.beton",
             "\udc80.beton", "x" * 300 + ".beton"]  # fmt: skip
DAMAGES += [(shard(name=name), "no plain file name") for name in BAD_NAMES]
DAMAGES += [(shard(index={"name": "../a", "num_bytes": 1, "sha256": ""}), "no plain file name")]
DAMAGES += [(shard(names={"name": "../a", "num_bytes": 1, "sha256": ""}), "no plain file name")]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_a_wrong_value_is_named_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    loaded(tmp_path, VALID)
    with pytest.raises(ManifestError, match=message) as error:
        loaded(tmp_path, {**VALID, **change})
    assert str(tmp_path / "manifest.json") in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < len(str(tmp_path)) + 200


@pytest.mark.parametrize("missing", [name for name in VALID if name not in ("version", "format")])
def test_a_missing_value_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ManifestError, match=missing):
        loaded(tmp_path, {name: value for name, value in VALID.items() if name != missing})


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": ' * 100_000, "\0", "\udcff"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ManifestError, match="malformed"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("kind", ["FIFO", "folder"])
def test_what_is_no_file_in_the_place_of_a_shard_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train-00000.beton"
    os.mkfifo(path) if kind == "FIFO" else path.mkdir()
    manifest = loaded(tmp_path, {**VALID, **shard(num_bytes=path.stat().st_size, glimpses=["00"] * 3)})
    with pytest.raises(ManifestError, match="not a regular file"):
        manifest.check_shards(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        glimpses(path)
