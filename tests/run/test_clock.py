"""What steps wait for, on a GPU with a clock of its own: decoding, transfer, or nothing but the GPU itself."""

import contextlib
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from support.loading import Numbers
from support.metrics import make_metrics

from fasttrain.engine.skips import Skips
from fasttrain.input import Batch, Order, ThreadLoader
from fasttrain.input.prefetch import _Prefetch, prefetched
from fasttrain.run.clock import BatchClock, seconds_of
from fasttrain.run.metrics import read_metrics

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STEPS, LAUNCH = 40, 0.002  # of an epoch; seconds the host takes to queue a step


class Machine:
    """A host, a GPU and the way between them, in seconds that nobody waits for.

    The host's time is `now`. A stream is the moment at which all it was given is done; events are such moments.
    """

    def __init__(self, decode: float, copy: float, step: float) -> None:
        self.now, self.decode, self.copy, self.step = 0.0, decode, copy, step
        machine = self

        class Stream:
            def __init__(self, _device: object = None) -> None:
                self.done = 0.0

            def work(self, seconds: float) -> None:
                self.done = max(self.done, machine.now) + seconds

            def wait_event(self, event: "Event") -> None:
                self.done = max(self.done, event.at)

            def synchronize(self) -> None:
                machine.now = max(machine.now, self.done)

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.timed, self.at = enable_timing, 0.0

            def record(self, stream: Stream | None = None) -> None:
                stream = stream or machine.stream
                stream.work(0.0)
                self.at = stream.done

            def synchronize(self) -> None:
                machine.now = max(machine.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                assert self.timed
                assert other.timed
                return 1000 * (other.at - self.at)

        self.Stream, self.Event, self.stream = Stream, Event, Stream()

    @contextlib.contextmanager
    def copying(self, stream: Any) -> Iterator[None]:
        stream.work(self.copy)
        yield

    def train(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Queue a step on every batch."""
        for batch in batches:
            self.now += LAUNCH
            self.stream.work(self.step)
            yield batch

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Event", self.Event)
        monkeypatch.setattr(torch.cuda, "Stream", self.Stream)
        monkeypatch.setattr(torch.cuda, "stream", self.copying)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Decoded:
    """A loader whose batches are decoded one after the other, the three next ones ahead."""

    num_samples, steps_per_epoch = STEPS, STEPS

    def __init__(self, machine: Machine) -> None:
        self.machine, self.waited = machine, 0.0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 0, "step": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass

    def epoch(self, n: int) -> Iterator[Batch]:
        one, ready, asked = torch.ones(1), 0.0, [0.0] * 4
        for _ in range(STEPS):
            ready = max(ready, asked[-4]) + self.machine.decode  # there is room once a batch was given back
            self.waited += max(0.0, ready - self.machine.now)
            self.machine.now = max(self.machine.now, ready)
            yield Batch(torch.zeros(3, dtype=torch.uint8), 0 * one.long(), one.int(), one.int(), one.long(), one.long())
            asked.append(self.machine.now)


@pytest.mark.parametrize(
    ("decode", "copy", "step", "data", "transfer", "advice"),
    [
        (0.010, 0.010, 0.100, 0.0, 0.0, ""),  # the host waits for its GPU nearly all the time
        (0.090, 0.090, 0.100, 0.0, 0.0, ""),
        (0.100, 0.010, 0.020, 0.8, 0.0, "the step waits for decoding"),
        (0.010, 0.100, 0.020, 0.8, 0.8, "the step waits for images on their way to the GPU"),
        (0.100, 0.080, 0.020, 0.8, 0.6, "the step waits for decoding"),  # a faster copy would change nothing
        (0.080, 0.100, 0.020, 0.8, 0.8, "the step waits for images on their way to the GPU"),
    ],
)
def test_a_wait_is_counted_to_the_side_that_causes_it(
    decode: float,
    copy: float,
    step: float,
    data: float,
    transfer: float,
    advice: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(decode, copy, step)
    machine.patch(monkeypatch)
    metrics = make_metrics(tmp_path, STEPS // 2, 1, GPU, STEPS)
    terms, skips = {"loss": torch.tensor(1.0), "replaced": torch.tensor(0.0)}, torch.tensor(Skips())
    loader = _Prefetch(Decoded(machine), CPU)
    for number, _ in enumerate(machine.train(metrics.timed(loader.epoch(0)))):
        metrics.step(number + 1, 0, 0.1, terms, skips)
    metrics.close()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["data_wait"] == pytest.approx(data, abs=0.05)
    assert last["transfer_wait"] == pytest.approx(transfer, abs=0.05)
    hints = [line for line in capfd.readouterr().err.splitlines() if "% of the time the step" in line]
    assert [advice in hint for hint in hints] == ([True] if advice else [])


def test_on_a_cpu_the_host_waits_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.1, 0.0, 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    loader, clock = Decoded(machine), BatchClock(CPU)
    assert len(list(clock.timed(loader.epoch(0)))) == STEPS
    with clock.making_views():
        machine.now += 0.25
    assert seconds_of(clock.take()) == (pytest.approx(loader.waited), 0.0, pytest.approx(0.25))
    assert seconds_of(clock.take()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("queued", "host", "kernels", "expected"),
    [(1.0, 0.3, 0.1, 0.1), (0.0, 0.3, 0.1, 0.4)],  # the GPU has work meanwhile, or waits for the host
)
def test_views_take_what_keeps_the_gpu_from_the_step(
    queued: float, host: float, kernels: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(0.0, 0.0, 0.0)
    machine.patch(monkeypatch)
    clock = BatchClock(GPU)
    machine.stream.work(queued)
    with clock.making_views():
        machine.now += host
        machine.stream.work(kernels)
    assert seconds_of(clock.take()).views == pytest.approx(expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("slow", "waits"), [("step", False), ("decoding", True)])
def test_waits_of_a_gpu(slow: str, waits: bool) -> None:
    store = Numbers(200)
    write = store.write
    store.write = lambda *sample: (time.sleep(0.004 if slow == "decoding" else 0.0), write(*sample))
    loader, clock = prefetched(ThreadLoader(store, Order(200, 10), 2, pinned=True), GPU), BatchClock(GPU)
    began = time.monotonic()
    for _ in clock.timed(loader.epoch(0)):
        torch.cuda._sleep(50_000_000 if slow == "step" else 1_000_000)  # clock cycles: some 30 ms, or less than one
    torch.cuda.synchronize()
    data, transfer, _ = (part / (time.monotonic() - began) for part in seconds_of(clock.take()))
    assert data > 0.5 if waits else data < 0.2
    assert transfer < 0.2
    loader.close()
