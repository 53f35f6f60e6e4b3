"""Copies the next batch to the GPU on a stream of its own while the step on this one runs.

Two slots of device memory take turns. Two events keep each of them, and the host buffer it is filled from, safe: `free`
is recorded behind the step that read the slot, and the copy waits for it on the GPU; `filled` is recorded behind the
copy, and is waited for by the step, on the GPU, and before the loader may use its host buffer again. A host that is
ahead of its GPU lets it catch up there, with one more step queued: that it waits doesn't mean that the copy is slow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fasttrain.input.batch import Batch
from fasttrain.input.loader import Loader


def prefetched(loader: Loader, device: torch.device) -> Loader:
    """The loader itself on a CPU; on a GPU, its batches with their pixels there, copied one step ahead."""
    return loader if device.type == "cpu" else _Prefetch(loader, device)


class _Slot:
    """Device memory for one batch's pixels."""

    def __init__(self, device: torch.device) -> None:
        self.pixels = torch.empty(0, dtype=torch.uint8, device=device)
        self.free, self.filled = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, pixels: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """Start the copy of host pixels; returns where they will be."""
        if len(self.pixels) < len(pixels):
            self.pixels = torch.empty(len(pixels) + len(pixels) // 8, dtype=torch.uint8, device=self.pixels.device)
            self.free.record()  # the memory may have been another tensor's, whose last use lies on this stream
        stream.wait_event(self.free)
        with torch.cuda.stream(stream):
            target = self.pixels[: len(pixels)]
            target.copy_(pixels, non_blocking=True)
            self.filled = torch.cuda.Event(enable_timing=True)  # another one: the batch takes it along
            self.filled.record(stream)
        return target


class _Prefetch:
    """A Loader around another one. Its position is that of the batch handed over, not of the one copied ahead."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch
        self._loader, self._position = loader, loader.state_dict()
        self._stream = torch.cuda.Stream(device)
        self._slots = _Slot(device), _Slot(device)

    def state_dict(self) -> dict[str, int]:
        return self._position

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state
        self._loader.load_state_dict(state)

    def close(self) -> None:
        self._loader.close()

    def epoch(self, n: int) -> Iterator[Batch]:
        """As the loader's own. A batch's pixels are valid until the next one is asked for."""
        self._loader.load_state_dict(self._position)  # it may have run ahead of an abandoned epoch
        batches = self._loader.epoch(n)
        try:
            ready: tuple[Batch, _Slot, dict[str, int]] | None = None
            for number, batch in enumerate(batches):
                slot = self._slots[number % 2]
                pixels = slot.fill(used_pixels(batch), self._stream)
                copied = dataclasses.replace(batch, pixels=pixels, arrived=slot.filled)
                if ready is not None:
                    yield self._hand_over(*ready)
                    ready[1].free.record()
                ready = copied, slot, self._loader.state_dict()
                slot.filled.synchronize()  # the loader may fill its buffer again
            if ready is not None:
                yield self._hand_over(*ready)
                ready[1].free.record()
            self._position = self._loader.state_dict()
        finally:
            self._stream.synchronize()
            for slot in self._slots:  # the last batch of an abandoned epoch may still be read
                slot.free.record()
            batches.close()  # type: ignore[attr-defined]

    def _hand_over(self, batch: Batch, slot: _Slot, position: dict[str, int]) -> Batch:
        torch.cuda.current_stream().wait_event(slot.filled)
        self._position = position
        return batch


def used_pixels(batch: Batch) -> Tensor:
    """The part of a batch's buffer that holds its images."""
    end_B = batch.offset_B + batch.height_B.long() * batch.width_B.long() * 3
    return batch.pixels[: int(end_B.max())]
