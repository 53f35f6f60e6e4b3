"""How a run is doing, as its own process can tell: memory, skipped steps, what to change when it waits for input."""

from __future__ import annotations

import time

import psutil
import torch

WAIT = 0.10  # of the time; more than that is worth a line
HINT_SECONDS = 600.0  # between such lines
MEMORY = {"rss_gib": "GiB of memory", "gpu_gib": "GiB of the GPU's"}
ADVICE = {
    "decoding": "the step waits for decoding; give more --workers (now {workers}, with {cores} cores here), convert "
    "with a smaller --max-side, or use --loader resident if all pixels fit in memory",
    "transfer": "the step waits for images on their way to the GPU; convert with a smaller --max-side, use --loader "
    "resident if all pixels fit in the GPU's memory, or keep other processes off the PCIe link",
    "views": "the step waits for views to be made; use a smaller --size, a --recipe with less in it, or give each "
    "process more cores: they draw the parameters",
}


class Health:
    """Memory of this process and its device; advice on the input."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self._device, self._workers, self._process = device, workers, psutil.Process()
        self._entries, self._last_hint = 0, -HINT_SECONDS

    def memory(self) -> dict[str, float]:
        """rss_gib: resident memory of this process, mapped shards included; gpu_gib: the most it held on its GPU."""
        figures = {"rss_gib": self._process.memory_info().rss / 2**30}
        if self._device.type == "cuda":
            figures["gpu_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return figures

    def hint(self, entry: dict) -> str:
        """What to change when more than WAIT of an entry's time was spent on a side of the input, or "".

        The first entry of a process, which holds its start, says nothing, nor is the same said again for HINT_SECONDS.
        """
        self._entries += 1
        if self._entries == 1 or time.monotonic() - self._last_hint < HINT_SECONDS:
            return ""
        said = advice(entry, self._device.type == "cpu", self._workers, len(self._process.cpu_affinity() or [0]))
        self._last_hint = time.monotonic() if said else self._last_hint
        return said


def advice(entry: dict, on_cpu: bool, workers: object, cores: int) -> str:
    """What to change when more than WAIT of an entry's time was spent on a side of the input, or "".

    workers: decoding threads, as many as there are, or "auto".
    """
    views = 0.0 if on_cpu else entry["views_time"]  # there, they are part of the work
    waited = max(entry["data_wait"], views)
    if waited <= WAIT:
        return ""
    side, part = ("views", views) if views == waited else _slower(entry)
    return f"{100 * part:.0f}% of the time {ADVICE[side].format(workers=workers, cores=cores)}"


def _slower(entry: dict) -> tuple[str, float]:
    """Which of decoding and transfer makes the step wait for its batch, and for what part of the time."""
    transfer = entry["transfer_wait"]
    decoding = entry["data_wait"] - transfer
    # A batch is copied while others are decoded; only what isn't decoded by then is waited for after the copy. So where
    # both are waited for, decoding takes longer.
    if decoding > min(transfer, WAIT):
        return "decoding", decoding
    return "transfer", transfer
