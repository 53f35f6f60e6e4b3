"""What a run says of itself: when too many steps are skipped, memory, advice."""

import pytest
import torch

from fasttrain.engine.skips import Skips
from fasttrain.run.health import Health

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def entry(data_wait: float = 0.0, views_time: float = 0.0, transfer_wait: float = 0.0) -> dict[str, float]:
    return {"data_wait": data_wait, "views_time": views_time, "transfer_wait": transfer_wait}


@pytest.mark.parametrize(
    ("skips", "steps", "too_many"),
    [
        (Skips(19, 19, 30), 31, False), (Skips(20, 20, 30), 31, True), (Skips(69, 1, 999), 1000, False),
        (Skips(71, 1, 999), 1000, True), (Skips(), 0, False),
    ],
)  # fmt: skip
def test_when_it_makes_no_sense_to_go_on(skips: Skips, steps: int, too_many: bool) -> None:
    assert skips.too_many(steps) == too_many


def test_advice_names_the_side_and_what_to_change() -> None:
    health_of_gpu = Health(GPU, workers=3)
    assert health_of_gpu.hint(entry(0.9)) == ""  # the first entry holds the start of the process
    hint = health_of_gpu.hint(entry(0.35, 0.2))
    assert hint.startswith("35% of the time the step waits for decoding")
    assert "--workers (now 3" in hint
    assert "--loader resident" in hint
    assert health_of_gpu.hint(entry(0.35, 0.2)) == ""  # said a moment ago


def test_views_are_a_wait_on_a_gpu_and_work_on_a_cpu() -> None:
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
def test_a_wait_for_batches_is_one_for_decoding_or_for_transfer(data: float, transfer: float, text: str) -> None:
    advisor = Health(GPU, 1)
    advisor.hint(entry())
    hint = advisor.hint(entry(data, 0.04, transfer))
    assert hint.startswith(text)
    assert bool(hint) == bool(text)


def test_memory_of_this_process() -> None:
    block = torch.ones(2**27)  # 0.5 GiB, written to
    figure = Health(CPU, 1).memory()["rss_gib"]
    assert figure > 0.5
    assert len(block) == 2**27
