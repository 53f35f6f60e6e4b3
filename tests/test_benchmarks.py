"""The benchmarks run, end in JSON, and keep their figures. Other projects' sides need their packages."""

import json
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import augment, loader_gpu, record
from benchmarks import convert as bench_convert
from benchmarks.loader import main
from dataprep.convert import main as convert


def test_loader_benchmark_of_our_own_sides(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.loader.BATCH", 24)
    assert convert([str(image_folder), str(tmp_path / "data")]) == 0
    assert main(["--data", str(tmp_path / "data"), "--rounds", "1", "--no-peers"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"decode_vs_limit", "first_batch_s", "rss_gib", "wait_s_per_epoch"} <= set(figures)
    assert ("h2d_overlap" in figures) == torch.cuda.is_available()
    if torch.cuda.is_available():
        assert abs(figures["h2d_copies"] - loader_gpu.STEPS) <= 1  # the first one of the next epoch may be there
        assert 0 <= figures["h2d_overlap"] <= 1
        assert 0 <= figures["wait_share"] <= 1
    assert 0 < figures["rss_gib"] < 1
    (line,) = (tmp_path / "loader.jsonl").read_text().splitlines()
    assert {"commit", "machine", "versions", "images_per_sec", "threads"} <= set(json.loads(line))


def test_several_shards_are_refused(shards, capsys):
    assert main(["--data", str(shards)]) == 2
    assert "one shard" in capsys.readouterr().err


def test_conversion_is_timed_from_the_call_to_the_manifest(image_folder, tmp_path, monkeypatch):
    whole = bench_convert.convert

    def slow(config):
        time.sleep(1)  # as listing a large folder takes
        return whole(config)

    monkeypatch.setattr(bench_convert, "convert", slow)
    rate = bench_convert.convert_ours(bench_convert.BenchConfig(image_folder), 1, 0, tmp_path / "out")
    assert 5 < rate < 96


@pytest.mark.parametrize(
    ("copies", "kernels", "expected"),
    [
        ([(0, 10)], [(4, 20)], 6),  # in part
        ([(2, 5)], [(0, 9)], 3),  # wholly
        ([(0, 10)], [(2, 3), (5, 9)], 5),  # two kernels inside
        ([(0, 10)], [(2, 6), (3, 5), (4, 8)], 6),  # several at once count once
        ([(0, 10)], [(4, 8), (0, 4), (8, 9)], 9),  # touching each other, in any order
        ([(0, 4)], [(4, 9)], 0),  # touching the copy
        ([(0, 4), (10, 14), (20, 24)], [(2, 12)], 4),
        ([(0, 4), (2, 6)], [(0, 9)], 8),  # each copy for itself
        ([], [(0, 9)], 0),
        ([(0, 4)], [], 0),
    ],
)
def test_overlap_of_copies_and_kernels(copies, kernels, expected):
    assert loader_gpu.overlap(copies, kernels) == expected


def test_copies_of_pixels_and_kernels_of_a_trace():
    def event(cat, name, ts, **args):
        return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": 2.5, "args": args}

    events = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1.0, bytes=5000, stream=20),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 2.0, bytes=128, stream=7),  # a table
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 3.0, bytes=5000, stream=7),
        event("gpu_memset", "Memset (Device)", 4.0, bytes=5000, stream=7),
        event("kernel", "resize_kernel", 5.0, stream=7),
        event("gpu_user_annotation", "a step", 6.0),
        event("cuda_runtime", "cudaMemcpyAsync", 7.0),
    ]
    assert loader_gpu.intervals({"traceEvents": events}, 1000) == ([(1.0, 3.5)], [(5.0, 7.5)])


def test_a_trace_of_a_cpu_has_neither():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(8).sum()
    trace = loader_gpu.trace_of(profiler)
    assert any("sum" in event["name"] for event in trace["traceEvents"])
    assert loader_gpu.intervals(trace, 0) == ([], [])


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
