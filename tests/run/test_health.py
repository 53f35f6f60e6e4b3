"""What a run says of itself: skipped steps, memory, advice, and means that leave skipped steps out."""

import pytest
import torch

from fasttrain.engine.skips import Skips
from fasttrain.input import Batch
from fasttrain.run.health import Health
from fasttrain.run.log import ON_THEIR_WAY, TrainLog, _Arriving, read_metrics

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def entry(data_wait=0.0, views_time=0.0, transfer_wait=0.0):
    return {"data_wait": data_wait, "views_time": views_time, "transfer_wait": transfer_wait}


@pytest.mark.parametrize(
    ("skips", "steps", "too_many"),
    [
        (Skips(19, 19, 30), 31, False), (Skips(20, 20, 30), 31, True), (Skips(69, 1, 999), 1000, False),
        (Skips(71, 1, 999), 1000, True), (Skips(), 0, False),
    ],
)  # fmt: skip
def test_when_it_makes_no_sense_to_go_on(skips, steps, too_many):
    assert skips.too_many(steps) == too_many


def test_advice_names_the_side_and_what_to_change():
    health_of_gpu = Health(GPU, workers=3)
    assert health_of_gpu.hint(entry(0.9)) == ""  # the first entry holds the start of the process
    hint = health_of_gpu.hint(entry(0.35, 0.2))
    assert hint.startswith("35% of the time the step waits for decoding")
    assert "--workers (now 3" in hint
    assert "--loader resident" in hint
    assert health_of_gpu.hint(entry(0.35, 0.2)) == ""  # said a moment ago


def test_views_are_a_wait_on_a_gpu_and_work_on_a_cpu():
    for device, text in ((GPU, "40% of the time the step waits for views"), (CPU, "")):
        advisor = Health(device, 1)
        advisor.hint(entry())
        assert advisor.hint(entry(0.05, 0.4)).startswith(text)
        assert bool(text) == (device is GPU)
    advisor = Health(CPU, 1)
    advisor.hint(entry())
    assert advisor.hint(entry(0.1, 0.4)) == ""


@pytest.mark.parametrize(
    ("data", "transfer", "text"),
    [
        (0.5, 0.5, "50% of the time the step waits for images on their way"),
        (0.5, 0.45, "45% of the time the step waits for images on their way"),
        (0.5, 0.3, "20% of the time the step waits for decoding"),  # images are copied while others are decoded
        (0.12, 0.05, "7% of the time the step waits for decoding"),
        (0.12, 0.07, "7% of the time the step waits for images on their way"),
        (0.09, 0.08, ""),
    ],
)
def test_a_wait_for_batches_is_one_for_decoding_or_for_transfer(data, transfer, text):
    advisor = Health(GPU, 1)
    advisor.hint(entry())
    hint = advisor.hint(entry(data, 0.04, transfer))
    assert hint.startswith(text)
    assert bool(hint) == bool(text)


def test_memory_of_this_process():
    block = torch.ones(2**27)  # 0.5 GiB, written to
    figure = Health(CPU, 1).memory()["rss_gib"]
    assert figure > 0.5
    assert len(block) == 2**27


def test_means_leave_skipped_steps_out(tmp_path):
    log = TrainLog(tmp_path, 0, 100, 4, 10, False, CPU, 1)
    skipped = {1: Skips(1, 1, 1), 2: Skips(2, 2, 2)}
    for step in range(4):
        terms = {"loss": torch.tensor(float("nan") if step in skipped else 10.0 + step), "part": torch.tensor(step / 2)}
        state = skipped.get(step, Skips(2 * (step > 2), 0, 2))
        log.step(step + 1, 0, 0.1, terms, torch.tensor(state))
    log.event(4, 0, 0.0, knn_top1=50.0)
    log.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["part"], first["skipped"]) == (4, 11.5, 0.75, 2)
    assert log.skips == Skips(2, 0, 2)
    assert second == {"step": 4, "epoch": 0, "knn_top1": 50.0}


def test_entries_wait_for_their_values_and_the_run_does_not(tmp_path, monkeypatch):
    """As on a GPU whose host is some steps ahead, with an entry for every step."""
    here, waited = [False], []

    class Late(_Arriving):
        def arrived(self):
            return here[0]

        def read(self):
            waited.append(not here[0])
            return super().read()

    monkeypatch.setattr("fasttrain.run.log._Arriving", Late)
    log = TrainLog(tmp_path, 0, 100, 1, 10, False, CPU, 1)

    def take(steps):
        for step in steps:
            log.step(step + 1, 0, 0.1, {"loss": torch.tensor(float(step))}, torch.tensor(Skips()))

    take(range(ON_THEIR_WAY))
    assert (waited, read_metrics(tmp_path / "metrics.jsonl")) == ([], [])
    take([ON_THEIR_WAY])
    assert waited == [True]
    here[0] = True
    take([ON_THEIR_WAY + 1])
    here[0] = False
    take([ON_THEIR_WAY + 2])
    log.flush(ON_THEIR_WAY + 3, 0, 0.1)
    log.close()
    assert [entry["loss"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == list(range(ON_THEIR_WAY + 3))


def test_time_of_an_evaluation_is_no_training_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fasttrain.run.log.time.monotonic", lambda: now[0])
    log = TrainLog(tmp_path, 0, 100, 2, 10, False, CPU, 1)
    one = {"loss": torch.tensor(1.0)}
    now[0] += 3.0
    log.step(1, 0, 0.1, one, torch.tensor(Skips()))
    now[0] += 50.0
    log.event(1, 0, 50.0, knn_top1=1.0)

    def batches():
        now[0] += 1.0
        yield Batch(*[torch.zeros(1)] * 6)

    assert len(list(log.timed(batches()))) == 1
    log.step(2, 0, 0.1, one, torch.tensor(Skips()))
    log.close()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["images_per_sec"] == pytest.approx(20 / 4)
    assert last["data_wait"] == pytest.approx(1 / 4)
    assert last["transfer_wait"] == 0


@pytest.mark.parametrize("first", [0, 7, 20])
def test_skipped_steps_are_noticed_however_seldom_entries_are_written(tmp_path, first):
    log = TrainLog(tmp_path, 0, 5000, 1000, 10, False, CPU, 1)
    for step in range(first + 40):
        in_a_row = max(0, step + 1 - first)
        skips = torch.tensor(Skips(in_a_row, in_a_row, step if in_a_row else -1))
        log.step(step + 1, 0, 0.1, {"loss": torch.tensor(1.0)}, skips)
        if log.skips.too_many(step + 1):
            break
    log.close()
    assert first + 20 <= step + 1 < first + 40
    assert read_metrics(tmp_path / "metrics.jsonl") == []
