"""The benchmarks run, end in JSON, and keep their figures. Other projects' sides need their packages."""

import json

import torch

from benchmarks import augment, record
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


SMALL = ("--images", "8", "--batch", "8", "--batches", "1", "--size", "32", "--rounds", "1")


def test_augment_benchmark(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert augment.main(["--data", str(image_folder), *SMALL]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figures["most_levels"]["float32"] < 0.1
    (line,) = (tmp_path / "augment.jsonl").read_text().splitlines()
    assert {"commit", "machine", "versions", "seconds", "floor", "differences"} <= set(json.loads(line))


def test_augment_benchmark_refuses_to_time_wrong_views(image_folder, tmp_path, monkeypatch, capsys):
    right = augment.augment

    def wrong(*inputs, impl="auto", **options):
        views = right(*inputs, impl=impl, **options)
        if impl != "reference":
            views[0, 0, 0, 3, 3] = 0.5 if views[0, 0, 0, 3, 3] > 0.7 else 0.9
        return views

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(augment, "augment", wrong)
    assert augment.main(["--data", str(image_folder), *SMALL]) == 1
    assert "differ from the reference" in capsys.readouterr().err
    assert not (tmp_path / "augment.jsonl").exists()


def test_differences_count_a_nan_and_values_that_may_have_been_clipped():
    truth = torch.tensor([0.0, 1.0, 0.5, 0.5])
    found = augment.difference(torch.tensor([0.1, 1.0, 0.9, torch.nan]), truth)
    assert (found.over, found.over_clipped, found.clipped, found.values) == (3, 1, 2, 4)
