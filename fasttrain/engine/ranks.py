"""The few things ranks do together. On one process each of them is the identity and costs nothing."""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fasttrain.system.cli import said
from fasttrain.system.collectives import TIMEOUT, world_size
from fasttrain.system.cores import share_of, usable_cores
from fasttrain.system.errors import EXIT_FAILURE, EXIT_USER_ERROR, DataError, RunError, UserError
from fasttrain.system.memory import keep_freed_memory, release_freed_memory
from fasttrain.system.pulse import Pulse

SIGN_OF_LIFE_SECONDS = 60.0  # between a busy rank's, well below TIMEOUT

Result = TypeVar("Result")


class Ranks:
    """This process's place among all: rank, world_size, its device, and how many of the machine's cores it may use."""

    def __init__(self, device: str, patience: datetime.timedelta = TIMEOUT) -> None:
        """Join the group torchrun describes (gloo on CPU, NCCL on GPU), or be alone.

        patience: that a rank has with the others where they exchange what is no tensor; of one that dies it hears
        within seconds. Raises UserError when `device` ("auto", "cpu", "cuda") is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is visible to PyTorch here; use --device cpu or auto")
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        self._control: Any = None
        self._pulse: Pulse | None = None
        self._pending: tuple[Any, Tensor] | None = None
        if on_gpu:
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"process {local_rank + 1} of this machine has no GPU ({torch.cuda.device_count()} visible); "
                    "start one process for each GPU"
                )
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True  # views have one size for a long time: take its fastest convolutions
        if self.world_size > 1:
            if dist.is_initialized():
                raise UserError("this process is in a group of torch.distributed, and training makes its own: leave it")
            backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
            dist.init_process_group(
                backend, store=_new_place(), rank=self.rank, world_size=self.world_size, timeout=TIMEOUT
            )
            self._control = dist.new_group(backend="gloo", timeout=patience)  # flags cross it without a GPU sync
            self._pulse = Pulse(self._take_cores())
        self.cores = usable_cores()
        if not on_gpu:
            keep_freed_memory()
            torch.set_num_threads(self.cores)  # torch's own choice leaves out hyper-threads: 1.6x slower on two of them

    def _take_cores(self) -> list[str]:
        """Keep this process, and every thread it starts from now on, on its own share of the machine's cores.

        Ranks of one machine that may use the same cores share them out; a rank that was given cores of its own (by
        torchrun's --numa-binding, a scheduler or numactl) keeps those. Returns the name of every rank's machine.
        """
        mine = socket.gethostname(), frozenset(os.sched_getaffinity(0))
        all_W: list[Any] = [None] * self.world_size
        dist.all_gather_object(all_W, mine, group=self._control)
        sharers = [rank for rank, other in enumerate(all_W) if other == mine]
        os.sched_setaffinity(0, share_of(set(mine[1]), sharers.index(self.rank), len(sharers)))
        return [host for host, _cores in all_W]

    def threads(self, workers: int | Literal["auto"]) -> int:
        """The threads that an option of that kind asks for."""
        return self.cores if workers == "auto" else workers

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, flag: int) -> int:
        """The largest `flag` any rank passed one call ago (on one process: this one's, now).

        Asynchronous: the answer to this call is read at the next, so no rank waits for another here, and all ranks
        get the same answer at the same step.
        """
        if self.world_size == 1:
            return flag
        answer = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            answer = int(value)
        value = torch.tensor(flag)
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control, async_op=True), value
        return answer

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each scalar's mean over all ranks, fp32, on the device; every rank names the same terms in the same order."""
        if self.world_size == 1:
            return terms
        values = torch.stack([term.float() for term in terms.values()])
        dist.all_reduce(values)
        return dict(zip(terms, values / self.world_size, strict=True))

    def share(self, value: Result) -> Result:
        """Rank 0's `value`, on every rank (any object that pickles)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: Result) -> list[Result]:
        """Every rank's `value`, in the order of ranks, on every rank (any object that pickles)."""
        values_W: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values_W, value, group=self._control)
        return values_W

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on this rank, once it has succeeded on every rank.

        Where it raises UserError, RunError, DataError or OSError on any, all end: rank 0 raises the first of them, the
        others SystemExit with its status, so that one line says it.
        """
        if self.world_size == 1:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except (UserError, RunError, DataError, OSError) as error:
            failure = error
        text = said(failure) if isinstance(failure, OSError) else str(failure)
        mine = (text, isinstance(failure, UserError | DataError)) if failure else None
        for rank, other in enumerate(self.gather(mine)):
            if other:
                self._end(rank, *other)
        return result

    def _end(self, rank: int, text: str, is_bad_input: bool) -> NoReturn:
        if not self.is_main:
            raise SystemExit(EXIT_USER_ERROR if is_bad_input else EXIT_FAILURE)
        text = f"process {rank}: {text}" if rank else text
        raise UserError(text) if is_bad_input else RunError(text)

    def of_first(self, work: Callable[[Callable[[], None]], Result]) -> Result:
        """What `work` returns on rank 0, which alone does it, on every rank, however long it takes.

        `work` is given a function to call every few minutes at least: those who hear nothing for TIMEOUT give up.
        """
        busy: Any = None
        if not self.is_main:
            while (answer := self.share(busy)) is None:
                pass
            return answer[0]
        told = time.monotonic()

        def still_here() -> None:
            nonlocal told
            if time.monotonic() - told > SIGN_OF_LIFE_SECONDS:
                told = time.monotonic()
                self.share(busy)

        result = work(still_here)
        self.share((result,))
        return result

    def close(self) -> None:
        """Leave the group, once all ranks do."""
        if self._pulse:
            self._pulse.close()
            dist.destroy_process_group()


_groups = itertools.count()  # that this process has joined


@functools.cache
def _meeting_point() -> dist.Store:
    return next(rendezvous("env://", timeout=TIMEOUT))[0]


def _new_place() -> dist.Store:
    """Where the ranks of the next group tell each other their addresses.

    A rank that is early for a second training must not find those of the first, nor a store that is about to go.
    """
    return dist.PrefixStore(str(next(_groups)), _meeting_point())


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """What Ranks takes in here is as before afterwards: this thread's cores, torch's threads, how memory is kept.

    Not the group: after an error, the other ranks may still be in it.
    """
    cores, threads, benchmark = os.sched_getaffinity(0), torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        release_freed_memory()


def data_parallel(module: nn.Module, static_graph: bool) -> nn.Module:
    """The module with gradients averaged over all ranks; on one process the module itself.

    Buffers (queue, running statistics) are the same or local on every rank by construction, so none is sent in a step.
    static_graph: every backward averages gradients; with some that do not, torch trips over itself (pytorch#143580).
    """
    if world_size() == 1:
        return module
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the name until 2.13
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=static_graph, **options)
