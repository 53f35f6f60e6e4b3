"""The resident loader: every image is decoded once and stays in memory, on the device where there is one.

A batch is then nothing but offsets into that memory: no pixel is read, decoded or copied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from fasttrain.input.batch import Batch
from fasttrain.input.loader import (
    MAX_ATTEMPTS,
    MAX_FAILED_FRACTION,
    MIN_FAILED,
    LoaderError,
    too_many_failed,
    warn_of_failed,
)
from fasttrain.input.order import Order
from fasttrain.input.stores import Store, label_of
from fasttrain.system.cores import machine_size
from fasttrain.system.errors import DataError, UserError
from fasttrain.system.memory import CGROUP
from fasttrain.system.watch import Watch
from fasttrain.system.workers import Workers

MEMORY_SHARE = 0.5  # of the memory that is free may be taken; the rest is for weights, activations and views
_BLOCK = 1024  # samples decoded between two copies to the device
_TASK = 16  # samples of one call of a worker


class ResidentLoader:
    """Iterates a store in an Order out of memory. Every rank holds all samples, since any may come in its share."""

    def __init__(
        self, store: Store, order: Order, workers: int, device: torch.device,
        max_failed_fraction: float = MAX_FAILED_FRACTION, labels: bool = False, needs_labels: bool = False,
    ) -> None:  # fmt: skip
        """Decode everything, which takes two reads of each sample: the first one only asks for sizes, and for `labels`.
        needs_labels: whether a sample without one fails.

        Raises UserError where memory does not suffice, LoaderError where too many samples fail or the storage hangs,
        and whatever a worker raised.
        """
        self.num_samples, self.steps_per_epoch = store.num_samples, order.steps_per_epoch
        self.failed: dict[str, str] = {}  # sample -> reason, of every one that others stand in for
        self._store, self._order, self._epoch, self._next_step = store, order, 0, 0
        self._needs_labels = needs_labels
        self._label_N = torch.full((store.num_samples,), -1) if labels else None
        self._height_N, self._width_N = (torch.zeros(store.num_samples, dtype=torch.int32) for _ in range(2))
        self._sound_N = np.ones(store.num_samples, dtype=bool)
        self._pool, self._watch = Workers(workers), Watch("sample", store.place, LoaderError)
        try:
            self._over(range(store.num_samples), self._measure)
            size_N = self._height_N.long() * self._width_N.long() * 3
            self._offset_N = size_N.cumsum(0) - size_N
            self._pixels = _room(int(size_N.sum()), device)
            for start in range(0, store.num_samples, _BLOCK):
                self._decode_block(range(start, min(start + _BLOCK, store.num_samples)))
        finally:
            self._pool.close()
        if len(self.failed) > max(MIN_FAILED, max_failed_fraction * store.num_samples):
            raise too_many_failed(len(self.failed), store.num_samples, *list(self.failed.items())[-1])

    def state_dict(self) -> dict[str, int]:
        return self._order.position(self._epoch, self._next_step)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._next_step = state["epoch"], state["step"]
        self._order = self._order.continued(state)

    def epoch(self, n: int) -> Iterator[Batch]:
        """The batches of epoch n from the position on. Raises LoaderError where nothing can stand in for a sample."""
        if n != self._epoch:
            self._epoch, self._next_step = n, 0
        for step in range(self._next_step, self.steps_per_epoch):
            self._next_step = step + 1
            asked_B = self._order.step(n, step)
            given_B = self._with_stand_ins(n, asked_B)
            index_B = torch.from_numpy(given_B)
            yield Batch(
                self._pixels, self._offset_N[index_B], self._height_N[index_B], self._width_N[index_B], index_B,
                None if self._label_N is None else self._label_N[index_B], int((given_B != asked_B).sum()),
            )  # fmt: skip
        self._epoch, self._next_step = n + 1, 0

    def close(self) -> None:
        """Free the memory, once no batch refers to it."""
        self._pixels = torch.empty(0, dtype=torch.uint8)

    def _with_stand_ins(self, epoch: int, index_B: np.ndarray) -> np.ndarray:
        """The samples, with the order's substitutes in place of those that could not be decoded."""
        index_B = index_B.copy()
        for place in np.flatnonzero(~self._sound_N[index_B]):
            others = (self._order.substitute(epoch, int(index_B[place]), k) for k in range(1, MAX_ATTEMPTS))
            stand_in = next((other for other in others if self._sound_N[other]), None)
            if stand_in is None:
                raise LoaderError(f"no sample could be decoded in place of {self._store.place(int(index_B[place]))}")
            index_B[place] = stand_in
        return index_B

    # Decoding, once

    def _over(self, samples: Sequence[int], call: Callable[[int], None]) -> None:
        """Have the workers make a call for every sample; a sample whose call raises DataError is marked and named."""

        def run(task: Sequence[int]) -> None:
            for index in task:
                with self._watch.at(index):
                    try:
                        call(index)
                    except (DataError, OSError) as error:
                        self._sound_N[index] = False
                        name, reason = self._store.name(index), str(error)
                        self.failed[name] = reason
                        warn_of_failed(len(self.failed), name, reason)

        futures = [self._pool.submit(run, samples[at : at + _TASK]) for at in range(0, len(samples), _TASK)]
        for future in futures:
            self._watch.result(future)

    def _measure(self, index: int) -> None:
        if self._label_N is not None:
            self._label_N[index] = label_of(self._store, index, self._needs_labels)
        encoded = self._store.read(index)
        self._height_N[index], self._width_N[index] = encoded.height, encoded.width

    def _decode_block(self, samples: range) -> None:
        """Decode consecutive samples to their places, by way of host memory where these lie on a GPU."""
        first, last = int(self._offset_N[samples[0]]), samples[-1]
        end = int(self._offset_N[last]) + int(self._height_N[last]) * int(self._width_N[last]) * 3
        block = self._pixels[first:end]
        host = block if block.device.type == "cpu" else torch.empty(len(block), dtype=torch.uint8)
        base = host.data_ptr() - first

        def decode(index: int) -> None:
            encoded = self._store.read(index)
            if (encoded.height, encoded.width) != (int(self._height_N[index]), int(self._width_N[index])):
                raise DataError("has another size than a moment ago")
            self._store.write(encoded, base + int(self._offset_N[index]))

        self._over([index for index in samples if self._sound_N[index]], decode)
        if host is not block:
            block.copy_(host)


def _room(num_bytes: int, device: torch.device) -> Tensor:
    """Memory for all pixels. Raises UserError where it would take more than MEMORY_SHARE of what is free."""
    free = free_memory(device)
    if num_bytes > MEMORY_SHARE * free:
        raise UserError(
            f"--loader resident would keep {num_bytes / 2**30:.2f} GiB of pixels, more than {MEMORY_SHARE:.0%} of the "
            f"{free / 2**30:.2f} GiB that are free for this process on {device}: use --loader auto"
        )
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def free_memory(device: torch.device) -> int:
    """Bytes this process could still take: of the GPU, or of the machine or container, shared by its ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or none with a limit ("max")
        pass
    return max(0, free) // machine_size()
