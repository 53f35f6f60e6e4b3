"""A run's figures: means that leave skipped steps out, no wait for values, the count of skipped steps, its files."""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import pytest
import torch
from support.metrics import CPU, make_metrics

from fasttrain.engine.skips import Skips
from fasttrain.input import Batch
from fasttrain.run.health import Health
from fasttrain.run.metrics import ON_THEIR_WAY, Metrics, MetricsFile, _Arriving, read_lines, read_metrics

NONE = {"replaced": torch.tensor(0.0)}
ONE = {"loss": torch.tensor(1.0), **NONE}


def test_means_leave_skipped_steps_out(tmp_path: pathlib.Path) -> None:
    metrics = make_metrics(tmp_path, every=4)
    skipped = {1: Skips(1, 1, 1), 2: Skips(2, 2, 2)}
    for step in range(4):
        terms = {"loss": torch.tensor(float("nan") if step in skipped else 10.0 + step), "part": torch.tensor(step / 2)}
        state = skipped.get(step, Skips(2 * (step > 2), 0, 2))
        metrics.step(step + 1, 0, 0.1, {**terms, **NONE}, torch.tensor(state))
    metrics.event(4, 0, 0.0, knn_top1=50.0)
    metrics.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["part"], first["skipped"]) == (4, 11.5, 0.75, 2)
    assert metrics.skips == Skips(2, 0, 2)
    assert second == {"step": 4, "epoch": 0, "knn_top1": 50.0}


def test_a_mean_over_skipped_steps_alone_is_null(tmp_path: pathlib.Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.step(1, 0, 0.1, {"loss": torch.tensor(float("inf")), **NONE}, torch.tensor(Skips(1, 1, 0)))
    metrics.close()
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_entries_wait_for_their_values_and_the_run_does_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU whose host is some steps ahead, with an entry for every step."""
    here, waited = [False], []

    class Late(_Arriving):
        def arrived(self) -> bool:
            return here[0]

        def read(self) -> list[float]:
            waited.append(not here[0])
            return super().read()

    monkeypatch.setattr("fasttrain.run.metrics._Arriving", Late)
    metrics = make_metrics(tmp_path)

    def take(steps: Iterable[int]) -> None:
        for step in steps:
            metrics.step(step + 1, 0, 0.1, {"loss": torch.tensor(float(step)), **NONE}, torch.tensor(Skips()))

    take(range(ON_THEIR_WAY))
    assert (waited, read_metrics(tmp_path / "metrics.jsonl")) == ([], [])
    take([ON_THEIR_WAY])
    assert waited == [True]
    here[0] = True
    take([ON_THEIR_WAY + 1])
    here[0] = False
    take([ON_THEIR_WAY + 2])
    metrics.flush(ON_THEIR_WAY + 3, 0, 0.1)
    metrics.close()
    assert [entry["loss"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == list(range(ON_THEIR_WAY + 3))


def test_time_of_an_event_is_no_training_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    metrics = make_metrics(tmp_path, every=2)
    now[0] += 3.0
    metrics.step(1, 0, 0.1, ONE, torch.tensor(Skips()))
    now[0] += 50.0
    metrics.event(1, 0, 50.0, knn_top1=1.0)

    def slow_batches() -> Iterator[Batch]:
        now[0] += 1.0
        yield Batch(*[torch.zeros(1)] * 6)

    assert len(list(metrics.timed(slow_batches()))) == 1
    metrics.step(2, 0, 0.1, ONE, torch.tensor(Skips()))
    metrics.close()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["images_per_sec"] == pytest.approx(20 / 4)
    assert last["data_wait"] == pytest.approx(1 / 4)
    assert last["transfer_wait"] == 0


def test_replaced_samples_are_counted_from_one_entry_to_the_next_also_in_skipped_steps(tmp_path: pathlib.Path) -> None:
    metrics = make_metrics(tmp_path, every=2)
    for step, count in enumerate((1, 2, 0, 4)):
        terms = {"replaced": torch.tensor(float(count)), "loss": torch.tensor(1.0)}
        metrics.step(step + 1, 0, 0.1, terms, torch.tensor(Skips(step == 1, step == 1, 1)))
    metrics.close()
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["replaced"], entry["loss"]) for entry in entries] == [(3, 1.0), (4, 1.0)]


@pytest.mark.parametrize("first", [0, 7, 20])
def test_skipped_steps_are_noticed_without_sinks_and_however_seldom_there_is_an_entry(first: int) -> None:
    metrics = Metrics((), Health(CPU, 1), CPU, 1000, 10)
    for step in range(first + 40):
        in_a_row = max(0, step + 1 - first)
        skips = torch.tensor(Skips(in_a_row, in_a_row, step if in_a_row else -1))
        metrics.step(step + 1, 0, 0.1, ONE, skips)
        if metrics.skips.too_many(step + 1):
            break
    metrics.close()
    assert first + 20 <= step + 1 < first + 40


def test_an_event_is_on_the_disk_with_all_before_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, on_disk = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, 0)
    monkeypatch.setattr(os, "fsync", lambda _file: on_disk.append([entry["step"] for entry in read_metrics(path)]))
    file.write({"step": 1})
    assert on_disk == []
    file.event({"step": 2})
    file.close()
    assert on_disk == [[1, 2]]


def test_a_line_that_was_cut_ends_the_entries_and_is_removed_with_later_ones(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_histograms_are_lists_of_counts_and_nothing_else_is_a_list(tmp_path: pathlib.Path) -> None:
    metrics = make_metrics(tmp_path)
    metrics.event(4, 0, 0.0, std=0.5, histogram_positive=[0, 3, 1])
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == [{"step": 4, "epoch": 0, "std": 0.5, "histogram_positive": [0, 3, 1]}]
    odd: list[dict[str, object]] = [{"histogram_x": value} for value in (1.0, [0.5], [-1], [True], [None], [0] * 2000)]
    odd += [{"std": [1, 2]}, {"knn_top1": [1]}]
    path.write_text("".join(json.dumps({"step": 4, "epoch": 0, **figure}) + "\n" for figure in odd))
    assert read_lines(path) == ([], len(odd))


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_none_to_who_reads_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')  # as versions before wrote it
    file = MetricsFile(path, 1)
    file.event({"step": 2, "rankme": float("nan"), "std": float("inf"), "alignment": 0.5})
    file.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    expected = [{"step": 1, "loss": None}, {"step": 2, "rankme": None, "std": None, "alignment": 0.5}]
    assert read_lines(path) == (expected, 0)


def test_an_event_comes_after_the_entries_that_are_on_their_way(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.run.metrics._Arriving.arrived", lambda _self: False)
    metrics = make_metrics(tmp_path)
    for step in (1, 2):
        metrics.step(step, 0, 0.1, ONE, torch.tensor(Skips()))
    metrics.event(2, 0, 0.0, std=0.5)
    metrics.close()
    order = [(entry["step"], "std" in entry) for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert order == [(1, False), (2, False), (2, True)]
