"""The benchmarks run, end in JSON, and keep their figures. Other projects' sides need their packages."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from torch.profiler import ProfilerActivity, profile

from benchmarks import (
    augment,
    health,
    label_free,
    loader_gpu,
    ranks,
    record,
    redundancy,
    scale,
    similarity,
    startup,
    step,
)
from benchmarks import convert as bench_convert
from benchmarks.loader import LoaderBenchmark, main
from benchmarks.repeated import LEAST_BATCHES, Repeated
from benchmarks.step_sides import Parts
from fasttrain.dataprep.convert import ConvertConfig
from fasttrain.dataprep.convert import main as convert
from fasttrain.formats.manifest import Manifest
from fasttrain.input import Order, ThreadLoader, open_dataset
from fasttrain.system.cli import finish
from fasttrain.system.errors import RunError, UserError


def test_loader_benchmark_of_our_own_sides(
    image_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.loader.BATCH", 24)
    assert convert([str(image_folder), str(tmp_path / "data")]) == 0
    assert main(["--data", str(tmp_path / "data"), "--rounds", "1", "--no-peers"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"decode_vs_limit", "first_batch_s", "rss_gib", "wait_s_per_epoch"} <= set(figures)
    assert ("h2d_overlap" in figures) == torch.cuda.is_available()
    assert 0 < figures["rss_gib"] < 1
    (line,) = (tmp_path / "loader.jsonl").read_text().splitlines()
    assert {"commit", "machine", "versions", "images_per_sec", "threads"} <= set(json.loads(line))


def test_scale_benchmark_reads_a_set_of_many_names_by_either_shuffle(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(scale, "LINKS", 7)  # so that there are two real shards
    assert scale.main(["--shards", "12", "--shard-size", "16", "--steps", "2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["shards"], figures["shard_size"]) == (12, 16)
    for kind in ("global", "block"):
        assert {"open_s", "first_batch_s", "peak_mib", "plans_per_sec, rank 3 of 8"} <= set(figures[kind])
        assert all(value >= 0 for value in figures[kind].values())
    assert len((tmp_path / "scale.jsonl").read_text().splitlines()) == 1


@pytest.mark.gpu
def test_loader_benchmark_on_a_gpu(shards: pathlib.Path) -> None:
    figures = loader_gpu.measure(shards, threads=2, batch_size=24)
    assert abs(figures["h2d_copies"] - loader_gpu.STEPS) <= 1  # the first one of the next steps may be there
    assert 0 <= figures["h2d_overlap"] <= 1
    assert 0 <= figures["wait_share"] <= 1


@pytest.mark.parametrize(
    "made",
    [
        lambda: LoaderBenchmark("x", rounds=0),
        lambda: bench_convert.ConvertBenchmark(pathlib.Path("x"), rounds=0),
        lambda: augment.AugmentBenchmark("x", rounds=0),
        lambda: health.HealthBenchmark("x", rounds=0),
        lambda: label_free.LabelFreeBenchmark(rounds=0),
        lambda: ranks.RanksBenchmark(rounds=0),
        lambda: redundancy.RedundancyBenchmark(rounds=0),
        lambda: startup.StartupBenchmark(rounds=0),
        lambda: similarity.SimilarityBenchmark(rounds=0),
        lambda: step.StepBenchmark(rounds=0),
    ],
)
def test_no_rounds_are_refused(made: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="--rounds must be above 0, not 0"):
        made()


def test_several_shards_are_refused(shards: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(shards)]) == 2
    assert "one shard" in capsys.readouterr().err


def test_conversion_is_timed_from_the_call_to_the_manifest(
    image_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench_convert.convert

    def slow(config: ConvertConfig) -> tuple[Manifest, float]:
        time.sleep(1)  # as listing a large folder takes
        return whole(config)

    monkeypatch.setattr(bench_convert, "convert", slow)
    rate = bench_convert.convert_ours(bench_convert.ConvertBenchmark(image_folder), 1, 0, "decode", tmp_path / "out")
    assert 0 < rate < 96


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
def test_overlap_of_copies_and_kernels(
    copies: list[tuple[int, int]], kernels: list[tuple[int, int]], expected: int
) -> None:
    assert loader_gpu.overlap(copies, kernels) == expected


def test_copies_of_pixels_and_kernels_of_a_trace() -> None:
    def event(cat: str, name: str, ts: float, **args: int) -> dict[str, Any]:
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


def test_a_trace_of_a_cpu_has_neither() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(8).sum()
    trace = loader_gpu.trace_of(profiler)
    assert any("sum" in event["name"] for event in trace["traceEvents"])
    assert loader_gpu.intervals(trace, 0) == ([], [])


SMALL = ("--images", "8", "--batch", "8", "--batches", "1", "--size", "32", "--rounds", "1")


def test_augment_benchmark(
    image_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert augment.main(["--data", str(image_folder), *SMALL]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figures["most_levels"]["float32"] < 0.1
    assert len(figures["us_per_multi_crop"]) == 2
    assert min(*figures["us_per_multi_crop"].values(), figures["floor_us_per_multi_crop"]) > 0
    assert figures["one_call_vs_each_size"] > 0
    (line,) = (tmp_path / "augment.jsonl").read_text().splitlines()
    assert {"commit", "machine", "versions", "seconds", "floor", "differences"} <= set(json.loads(line))


def test_augment_benchmark_refuses_to_time_wrong_views(
    image_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = augment.augment

    def wrong(*inputs: Any, impl: str = "auto", **options: Any) -> tuple[torch.Tensor, ...]:
        views = right(*inputs, impl=impl, **options)
        if impl != "reference":
            views[0][0, 0, 0, 3, 3] = 0.5 if views[0][0, 0, 0, 3, 3] > 0.7 else 0.9
        return views

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(augment, "augment", wrong)
    assert augment.main(["--data", str(image_folder), *SMALL]) == 1
    assert "differ from the reference" in capsys.readouterr().err
    assert not (tmp_path / "augment.jsonl").exists()


def test_differences_count_a_nan_and_values_that_may_have_been_clipped() -> None:
    truth = torch.tensor([0.0, 1.0, 0.5, 0.5])
    found = augment.difference(torch.tensor([0.1, 1.0, 0.9, torch.nan]), truth)
    assert (found.over, found.over_clipped, found.clipped, found.values) == (3, 1, 2, 4)


def test_marks_around_a_compiled_network_are_not_compiled_with_it() -> None:
    """Otherwise it would be compiled anew in every step, and the marks be those of its compilation."""
    compilations = []

    def count(module: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        compilations.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled, eager = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    compiled.compile(dynamic=False, backend=count)
    parts = Parts(torch.device("cpu"))
    for network in (compiled, eager):
        parts.wrap_network("forward", network)
        for _ in range(4):
            network(torch.ones(2, 3))
        assert len(parts._marks) == 4
        parts.clear()
    assert len(compilations) == 1


def test_a_small_set_is_repeated_as_one_long_epoch(shards: pathlib.Path) -> None:
    store = open_dataset(shards, "train")
    repeated = Repeated(store, 16)
    assert repeated.num_samples >= LEAST_BATCHES * 16 > repeated.num_samples - store.num_samples
    index = torch.tensor([3, 3 + store.num_samples, repeated.num_samples - 1]).numpy()
    assert repeated.labels(index).tolist() == store.labels(index % store.num_samples).tolist()
    assert repeated.read(int(index[1])) == store.read(3)
    assert repeated.name(int(index[1])) == store.name(3)
    with contextlib.closing(ThreadLoader(repeated, Order(repeated.num_samples, 16), 2)) as loader:
        assert len(next(iter(loader.epoch(0)))) == 16


@pytest.mark.slow
def test_step_benchmark(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the others, one is run, on loaded views; its figures stand for the rest."""
    in_turn, known = step._in_turn, {}

    def fewer(names: Sequence[str], case: step.Case, data: pathlib.Path | None, *more: Any) -> dict[str, list[Any]]:
        run = [name for name in names if name == "ours" or (data and name == "moco amp")]
        known.update(in_turn(run, case, data, *more))
        return {name: known.get(name, known["ours"]) for name in names}

    monkeypatch.setattr(step, "_in_turn", fewer)
    case = step.Case("small", "small", False, 16, 16, 64, "linear", steps=1)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setitem(step.CASES, "small", case)
    assert step.measure(step.StepBenchmark(data=str(shards), case="small", rounds=1)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"vs_moco_fp32", "vs_moco_amp", "vs_channels_last_amp", "loaded_vs_synthetic", "images_per_sec"} <= set(
        figures
    )
    lines = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(line["case"], line["views"]) for line in lines] == [("small", "synthetic"), ("small", "loaded")]
    assert all({"data wait", "views", "query forward", "backward"} <= set(line["ms_by_part"]) for line in lines[1:])


def test_augment_benchmark_takes_the_images_there_are_and_prints_before_it_records(
    image_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(record, "append", full)
    small = ("--images", "8", "--size", "16", "--rounds", "1")
    assert augment.main(["--data", str(image_folder), "--batches", "5", *small]) == 1
    printed, failed = capsys.readouterr()
    assert "5 batches of 14 images" in printed  # of 72
    assert set(json.loads(printed.splitlines()[-1])) >= {"us_per_pair", "vs_reference"}
    assert "No space left" in failed
    assert augment.main(["--data", str(image_folder), "--batches", "73", *small]) == 2
    assert "has 72 images" in capsys.readouterr().err


@pytest.mark.gpu
def test_augment_benchmark_does_not_time_the_host() -> None:
    ones = torch.ones(1000, device="cuda")
    ones.add_(1)

    def slow_host() -> None:
        time.sleep(0.003)
        ones.add_(1)

    assert augment.timed(slow_host, ones.device) < 0.001


ONE_PASS = similarity.SimilarityBenchmark(rounds=2, seconds=0)


@pytest.fixture
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "CACHE", 0)


def test_similarity_benchmark_leaves_out_what_is_wrong_or_cannot_run(
    few_inputs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image\nand more")

    sides = {"ours": similarity.ours, "wrong": lambda *x: 1.1 * similarity.ours(*x), "broken": broken}
    inputs = similarity.make_inputs(128, 256, "cpu", torch.float32)
    times = similarity.measure_sides(sides, inputs, ("launched",), ONE_PASS)
    assert [len(values) for values in times["launched"].values()] == [2]
    assert list(times["launched"]) == ["ours"]
    wrong, lacking = capsys.readouterr().out.splitlines()
    assert wrong.startswith("wrong, N 128: left out, ArithmeticError: loss")
    assert lacking == "broken, N 128: left out, RuntimeError: no kernel image"


def test_similarity_benchmark_checks_the_gradient_of_every_row(few_inputs: None) -> None:
    q, k, queue = similarity.make_inputs(128, 256, "cpu", torch.float32)[0]
    loss, gradient = similarity.exact(q, k, queue)
    similarity.check(similarity.eager, (q, k, queue), (loss, gradient))
    gradient[-1] *= 2
    with pytest.raises(ArithmeticError, match="gradient"):
        similarity.check(similarity.eager, (q, k, queue), (loss, gradient))


def test_similarity_benchmark_times_nt_xent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda side, **_: lambda z: side(z[1:]))  # wrong
    monkeypatch.setattr(similarity.nt_xent, "_AT_ONCE", 50)
    figures = similarity.measure_nt_xent(64, torch.float32, ONE_PASS)
    assert list(figures["nt_xent_ms_64"]) == ["ours", "eager"]
    assert figures["nt_xent_vs_eager_64"] > 0
    assert "compile, N 128: left out, ArithmeticError" in capsys.readouterr().out


def test_similarity_benchmark_goes_on_without_ours(
    few_inputs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(similarity, "make_sides", lambda _: {"eager": similarity.eager})
    figures = similarity.measure_batch(64, 256, torch.float32, ONE_PASS, 1e-3)
    assert list(figures["ms_64"]) == ["eager"]
    assert "of_floor_64" not in figures
    assert "  eager" in capsys.readouterr().out


def test_similarity_benchmark_prints_its_figures_whatever_happens_to_one_size_or_the_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(n: int, *_: object) -> dict[str, dict[str, float]]:
        if n == similarity.MEMORY_ROWS or n == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {f"ms_{n}": {"ours": 1.0}}

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(similarity, "speeds", lambda *_: (1e12, 1e11))
    monkeypatch.setattr(similarity, "measure_batch", measured)
    monkeypatch.setattr(similarity, "measure_nt_xent", measured)
    memory = {f"{case}memory_of_eager_{similarity.MEMORY_ROWS}": 0.5 for case in ("", "nt_xent_")}
    monkeypatch.setattr(similarity, "memory_on_cpu", lambda: memory)
    monkeypatch.setattr(record, "append", full)
    with pytest.raises(OSError, match="No space"):
        similarity.measure(ONE_PASS)
    lines = capsys.readouterr().out.splitlines()
    assert "left out, OutOfMemoryError: CUDA out of memory" in "".join(lines)
    assert json.loads(lines[-1])["ms_256"] == {"ours": 1.0}


@pytest.mark.gpu
def test_similarity_benchmark_times_graphs_and_tiles(few_inputs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"ours": similarity.ours, "eager": similarity.eager, "attention": similarity.attention}
    monkeypatch.setattr(similarity, "make_sides", lambda _: sides)
    figures = similarity.measure_batch(512, 4096, torch.bfloat16, ONE_PASS, 1e-3)
    assert {"ours", "eager"} <= figures["ms_512"].keys() == figures["ms_launched_512"].keys()
    assert len(figures["ms_tiles_512"]) == 4
    assert 0 < figures["memory_of_eager_512"] < 1


def test_redundancy_benchmark(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(redundancy, "ON_CPU", [(8, 16)])
    monkeypatch.setattr(redundancy, "ON_GPU", [(8, 16)])
    assert redundancy.measure(redundancy.RedundancyBenchmark(rounds=2)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["8x16"]) == set(redundancy.LOSSES)
    assert all(side["ms"] > 0 for side in figures["8x16"].values())
    assert len((tmp_path / "redundancy.jsonl").read_text().splitlines()) == 1


def test_ranks_benchmark_reckons_what_a_step_waits_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert ranks.main(ranks.RanksBenchmark()) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    both, machine = figures["simclr 64"], figures["simclr machine 64"]
    assert machine["mb"]["statistics"] == both["mb"]["statistics"] * 7 / 63
    assert 0 < machine["waits_8_links"] < both["waits_8_links"] < both["waits_1_links"] < 1
    assert figures["simclr machine 8"]["waits_8_links"] == figures["simclr 8"]["waits_8_links"]
    # rings and trees inside a machine and between eight, as NCCL reckons them, in microseconds
    assert 1e6 * ranks.latency("all-gather", 8) == pytest.approx(3.6 + 7 * 0.47)
    assert 1e6 * ranks.latency("all-reduce", 64) == pytest.approx(4.4 + 2 * (7 * 1.8 * 0.52 + 3 * 5))


def _time_collectives(folder: pathlib.Path) -> int:
    record.RESULTS, ranks.RUNS = folder, {"moco": {}}
    return ranks.main(ranks.RanksBenchmark(images=2, rounds=1))


def test_ranks_benchmark_times_collectives_between_the_ranks_there_are(tmp_path: pathlib.Path) -> None:
    done = on_ranks(tmp_path, 2, _time_collectives, tmp_path)
    succeed(done)
    figures = json.loads(done[0].stdout.splitlines()[-1])
    assert min(figures[f"moco: {part}"] for part in ("gradients", "images", "keys", "terms")) > 0
    assert done[1].stdout == ""
    assert len((tmp_path / "ranks.jsonl").read_text().splitlines()) == 1


def test_label_free_benchmark(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(label_free, "SHAPES", [(32, 16), (16, 32)])
    assert label_free.measure(label_free.LabelFreeBenchmark(rounds=2)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["16x32"]) == set(label_free.FIGURES)
    assert all(ms >= 0 for ms in figures["32x16"].values())
    assert len((tmp_path / "label_free.jsonl").read_text().splitlines()) == 1


def test_health_benchmark(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    options = health.HealthBenchmark(str(shards), size=16, batch_size=16, epochs=2000, rounds=1, probe=True)
    assert health.benchmark(options) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 8000
    assert figures["events"] > 2
    assert min(figures[name] for name in ("event_s", "step_s", "events_percent", "probe_percent")) > 0
    (line,) = (tmp_path / "health.jsonl").read_text().splitlines()
    assert json.loads(line)["images"] == figures["images"]


@pytest.mark.parametrize(("slow", "status"), [("none", 0), ("fasttrain/train.py --help", 1), (startup.BOTH, 1)])
def test_startup_benchmark_fails_where_a_person_would_wait(
    slow: str, status: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = startup.command_lines()
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(startup, "seconds", lambda words: 5.0 if words == lines.get(slow) else 0.5)
    assert finish(lambda: startup.measure(startup.StartupBenchmark(rounds=2))) == status
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["seconds"]) == set(lines)
    assert len((tmp_path / "startup.jsonl").read_text().splitlines()) == 1


def test_startup_benchmark_starts_commands() -> None:
    assert startup.seconds(startup.command_lines()["fasttrain/report.py --help"]) > 0
    with pytest.raises(RunError, match="ZeroDivisionError"):
        startup.seconds(["-c", "1 / 0"])
