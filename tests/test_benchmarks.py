"""The benchmark of the loader runs, ends in JSON, and keeps its figures. Other projects' sides need their packages."""

import json

from benchmarks import record
from benchmarks.loader import main
from dataprep.convert import main as convert


def test_loader_benchmark_of_our_own_sides(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.loader.BATCH", 24)
    assert convert([str(image_folder), str(tmp_path / "data")]) == 0
    assert main(["--data", str(tmp_path / "data"), "--rounds", "1", "--no-peers"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"decode_vs_limit", "first_batch_s", "rss_gib", "wait_s_per_epoch"}
    assert 0 < figures["rss_gib"] < 1
    (line,) = (tmp_path / "loader.jsonl").read_text().splitlines()
    assert {"commit", "machine", "versions", "images_per_sec", "threads"} <= set(json.loads(line))


def test_several_shards_are_refused(shards, capsys):
    assert main(["--data", str(shards)]) == 2
    assert "one shard" in capsys.readouterr().err
