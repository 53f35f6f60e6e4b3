"""How many processes a machine has, which of its cores each of them uses, and how many that is worth."""

from __future__ import annotations

import math
import os
import pathlib

TOPOLOGY = pathlib.Path("/sys/devices/system/cpu")
CPU_LIMIT = pathlib.Path("/sys/fs/cgroup/cpu.max")


def machine_size() -> int:
    """How many ranks this machine has, as their launcher says; 1 where it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores(limit: pathlib.Path = CPU_LIMIT) -> int:
    """How many threads of this process can run at once: its cores, or fewer where a container has a share of them.

    A container that may use all cores for a part of the time (docker --cpus, Kubernetes' limits) is stopped for the
    rest of it when it runs more threads than that part is worth. limit: the file of Linux' control groups that says so.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = limit.read_text(encoding="utf-8").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups of version 2, or no limit ("max")
        return cores


def share_of(cpus: set[int], place: int, sharers: int, topology: pathlib.Path = TOPOLOGY) -> set[int]:
    """The cpus (numbers of hardware threads) of one process out of `sharers` that may all use `cpus`; place from 0.

    Neighbouring places get neighbouring cores, so a process stays on one socket where it can. Hyper-threads of a core
    stay together while there are cores enough; with more processes than hardware threads, several get the same one.
    """
    units = _cores(cpus, topology)
    if sharers > len(units):
        units = [[cpu] for core in units for cpu in core]
    if sharers > len(units):
        return set(units[place % len(units)])
    first, end = (len(units) * edge // sharers for edge in (place, place + 1))
    return {cpu for unit in units[first:end] for cpu in unit}


def _cores(cpus: set[int], topology: pathlib.Path) -> list[list[int]]:
    """`cpus` grouped by physical core, in the order of sockets and cores; where /sys does not tell, each is a core."""
    cores: dict[tuple[int, bytes], list[int]] = {}
    for cpu in sorted(cpus):
        folder = topology / f"cpu{cpu}" / "topology"
        try:
            core = int((folder / "physical_package_id").read_bytes()), (folder / "thread_siblings_list").read_bytes()
        except (OSError, ValueError):
            core = 0, b"%d" % cpu
        cores.setdefault(core, []).append(cpu)
    return [cores[core] for core in sorted(cores, key=lambda core: (core[0], cores[core][0]))]
