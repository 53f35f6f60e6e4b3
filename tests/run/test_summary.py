"""A run in one line, from little of its files, whatever state they are in."""

import json
import math
import os
import pathlib
from typing import Any

import pytest

from fasttrain.run.evaluations import Evaluation, keep_evaluations
from fasttrain.run.summary import BLOCK_BYTES, RATES, Accuracy, _lines_backwards, summary


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    settings = {"method": "moco", "arch": "small", "data": "/some/where/flowers", "preset": "demo", "knn_every": 1}
    record = {"config": settings, "steps": {"last": 100, "per_epoch": 8}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    return tmp_path


def write(run: pathlib.Path, *entries: dict[str, Any]) -> None:
    lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    (run / "metrics.jsonl").write_text(lines)


def trained(step: int, rate: float = 10.0, loss: float | None = 2.5) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "loss": loss, "lr": 0.1, "images_per_sec": rate, "data_wait": 0.0}


def evaluated(protocol: str, step: int, top1: float, untrained: bool = False, variant: str = "") -> Evaluation:
    return Evaluation(protocol, step, untrained, {}, "x", "f", 10, top1, top1, 10.0, variant=variant)


def test_what_was_trained_on_what_and_how_far_it_is(run: pathlib.Path) -> None:
    write(run, trained(10, 1.0), trained(20, 30.0), trained(30, 20.0), trained(40, 90.0, 2.0))
    found = summary(run)
    assert (found.method, found.arch, found.data, found.preset) == ("moco", "small", "flowers", "demo")
    assert (found.step, found.last_step, found.epochs, found.loss) == (40, 100, 5.0, 2.0)
    assert found.images_per_sec == 30.0  # without the first, which has the start in it
    assert (found.knn, found.linear) == (None, None)
    assert found.ended.state == "killed"


def test_of_a_long_run_the_newest_rates_count(run: pathlib.Path) -> None:
    write(run, *(trained(step, 1000.0 if step < 400 else 5.0) for step in range(10, 2000)))
    assert summary(run).images_per_sec == 5.0
    assert BLOCK_BYTES < RATES * 1000 < (run / "metrics.jsonl").stat().st_size


def test_how_it_ended_tells_the_step_more_exactly(run: pathlib.Path) -> None:
    write(run, trained(40))
    ending = {"state": "failed", "line": "why", "step": 47, "time": "2026-01-01 00:00:00+0000"}
    (run / "ending.json").write_text(json.dumps(ending))
    found = summary(run)
    assert (found.step, found.ended.state, found.ended.line) == (47, "failed", "why")


@pytest.mark.parametrize(
    ("measured", "at", "expected"),
    [
        (None, 40, Accuracy(70.0, 40, "evaluation")), (30, 40, Accuracy(70.0, 40, "evaluation")),
        (40, 40, Accuracy(70.0, 40, "evaluation")), (50, 40, Accuracy(60.0, 50, "training")),
        (50, None, Accuracy(60.0, 50, "training")), (None, None, None),
    ],
)  # fmt: skip
def test_the_newer_knn_accuracy_counts_and_where_it_is_from_is_told(
    run: pathlib.Path, measured: int | None, at: int | None, expected: Accuracy | None
) -> None:
    knn = [{"step": measured, "epoch": 1, "knn_top1": 60.0}] if measured else []
    write(run, trained(10), *knn, *(trained(step) for step in range(60, 400)))
    if at:
        keep_evaluations(run, [evaluated("knn", 20, 99.0), evaluated("knn", at, 70.0)])
        keep_evaluations(run, [evaluated("knn", at, 5.0, untrained=True), evaluated("linear", 20, 80.0)])
        keep_evaluations(run, [evaluated(protocol, 60, 95.0, variant="on_birds") for protocol in ("knn", "linear")])
    found = summary(run)
    assert found.knn == expected
    assert found.linear == (Accuracy(80.0, 20, "evaluation") if at else None)
    assert found.linear is None or found.linear.settings == evaluated("linear", 20, 80.0).settings


@pytest.mark.parametrize("seed", range(4))
def test_lines_backwards_are_the_lines_of_the_file(seed: int, tmp_path: pathlib.Path) -> None:
    lengths = [
        (seed * 7919 + 31 * place * place) % (BLOCK_BYTES * 2 if place % 40 == 0 else 300) for place in range(200)
    ]
    content = b"\n".join(bytes([97 + place % 26]) * length for place, length in enumerate(lengths))
    path = tmp_path / "lines"
    path.write_bytes(content)
    assert list(_lines_backwards(path)) == content.split(b"\n")[::-1]


def test_a_line_as_long_as_a_file_takes_no_memory_of_it(run: pathlib.Path) -> None:
    write(run, trained(10), trained(20))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"x" * 3_000_000)
    assert summary(run).step == 20


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"7", b"[]", b"null", b"\xff\xfe", b"[" * 30_000, b'{"step": "x", "images_per_sec": 1.0}',
     b'{"step": 70, "images_per_sec": "fast", "knn_top1": []}', b'{"step": -3, "images_per_sec": 1.0}',
     b'{"step": 30, "images_per_sec": 1%s}' % (b"0" * 400), b'{"step": 1%s, "images_per_sec": 1.0}' % (b"0" * 400)],
)  # fmt: skip
def test_damaged_lines_of_metrics_are_passed_over(line: bytes, run: pathlib.Path) -> None:
    write(run, trained(10), trained(20))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n" + line)
    assert (summary(run).step, summary(run).loss) == (20, 2.5)


def test_figures_that_are_no_numbers_are_not_known(run: pathlib.Path) -> None:
    write(run, trained(10), trained(20, math.inf), trained(30, 5.0, math.nan))
    found = summary(run)
    assert (found.step, found.loss, found.images_per_sec) == (30, None, 5.0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 7}', '{"config": {"method": 3}}', "[" * 100_000])
def test_a_run_without_its_settings_is_damaged_and_says_so(content: str, run: pathlib.Path) -> None:
    (run / "config.json").write_text(content)
    found = summary(run)
    assert found.ended.state == "damaged"
    assert str(run / "config.json") in found.ended.line
    (run / "config.json").unlink()
    assert "no config.json" in summary(run).ended.line


def test_settings_of_other_types_are_shown_as_they_are(run: pathlib.Path) -> None:
    (run / "config.json").write_text('{"config": {"arch": 7, "data": [1]}, "steps": [3]}')
    found = summary(run)
    assert (found.method, found.arch, found.data, found.last_step, found.epochs) == ("", "7", "[1]", None, None)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "ending.json", "lock"])
def test_a_fifo_or_a_folder_in_a_files_place_is_not_waited_for(name: str, run: pathlib.Path) -> None:
    os.mkfifo(run / name)
    assert summary(run).ended.state in ("damaged", "killed", "unknown")
    (run / name).unlink()
    (run / name).mkdir()
    assert summary(run).ended.state in ("damaged", "killed", "unknown")
