"""A sign of life between all ranks every few seconds, so that one that vanishes is missed within a minute.

A process that dies closes its connections, and those who wait for it learn of it. A machine without power or cable says
nothing, nor does a process that is stopped; gloo and NCCL would wait ten minutes for it, and a rank that waits for
its GPU can't be called back at all. So a thread of every rank meets those of the others, and ends its process when one
of them stays away.
"""

from __future__ import annotations

import atexit
import datetime
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fasttrain.system.cli import fail
from fasttrain.system.errors import EXIT_FAILURE

EVERY = 5.0  # seconds between two meetings
QUIET = 35.0  # seconds the first rank waits there for another
LONGER = 10.0  # seconds the others wait longer for the first, which may be waiting for one of them
GRACE = 2.0  # seconds that the rank itself is given to tell of a broken connection


class Pulse:
    """Meets all other ranks from now until close(). A process that misses one ends with a line and EXIT_FAILURE."""

    def __init__(self, host_W: Sequence[str]) -> None:
        """host_W: the machine of each rank, for the line. All ranks must make one at the same time."""
        self._host_W, self._rank, self._with = host_W, dist.get_rank(), 0
        self._group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=QUIET + LONGER))
        self._closing, self._left = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def close(self) -> None:
        """Wait until all ranks have called it, for as long as they show signs of life."""
        self._closing.set()
        self._thread.join()
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """The process ends by itself: have the thread out of torch's code before that is taken down."""
        self._left = True
        self._closing.set()
        self._thread.join(GRACE)

    def _beat(self) -> None:
        try:
            while not self._left and not self._meet():
                self._closing.wait(EVERY)
        except RuntimeError as error:
            time.sleep(GRACE)
            if not self._left:
                fail(self._line(str(error)))
                os._exit(EXIT_FAILURE)

    def _meet(self) -> bool:
        """Meet the others once, by way of the first rank, which so knows who is missing; are all of them closing?"""
        closing = torch.tensor(int(self._closing.is_set()))
        if self._rank:
            dist.send(closing, 0, group=self._group)
            dist.recv(closing, 0, group=self._group)
            return bool(closing)
        others = range(1, len(self._host_W))
        theirs = torch.zeros_like(closing)
        for self._with in others:
            arriving = dist.irecv(theirs, self._with, group=self._group)
            assert arriving is not None
            arriving.wait(datetime.timedelta(seconds=QUIET))
            closing &= theirs
        for self._with in others:
            dist.send(closing, self._with, group=self._group)
        return bool(closing)

    def _line(self, error: str) -> str:
        # The others' connection to the first rank breaks as well when that ends because of a third one.
        named = self._rank == 0 or "Timed out" in error
        who = f"process {self._with}, on {self._host_W[self._with]}," if named else "another process of this job"
        return (
            f"{who} shows no sign of life: it is dead, stopped or cut off; this process ends, and the same command "
            "continues from the newest checkpoint"
        )
