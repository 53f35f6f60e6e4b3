"""Cores: shares of ranks on a machine keep hyper-threads together, and a container's limit counts."""

import os
import pathlib

import pytest

from fasttrain.system.cores import share_of, usable_cores


def machine(folder: pathlib.Path, packages: int, cores: int, threads: int) -> set[int]:
    """A /sys tree of a machine whose hyper-threads are numbered as Linux does: first all cores, then their siblings."""
    total = packages * cores
    for cpu in range(total * threads):
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        core = cpu % total
        (topology / "physical_package_id").write_text(f"{core // cores}\n")
        siblings = ",".join(str(core + total * thread) for thread in range(threads))
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    return set(range(total * threads))


def test_ranks_share_the_cores_and_keep_hyper_threads_together(tmp_path: pathlib.Path) -> None:
    cpus = machine(tmp_path, 2, 4, 2)
    assert [share_of(cpus, rank, 4, tmp_path) for rank in range(4)] == [
        {0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}, {6, 7, 14, 15},
    ]  # fmt: skip
    assert share_of(cpus, 0, 1, tmp_path) == cpus
    assert share_of({2, 3, 10, 11}, 1, 2, tmp_path) == {3, 11}  # a container that may use some of them


@pytest.mark.parametrize("sharers", [1, 3, 5, 8, 9, 16, 20])
def test_every_core_is_used_and_nobody_is_without(tmp_path: pathlib.Path, sharers: int) -> None:
    cpus = machine(tmp_path, 2, 4, 2)
    shares = [share_of(cpus, rank, sharers, tmp_path) for rank in range(sharers)]
    assert all(shares)
    assert set().union(*shares) == cpus
    if sharers <= len(cpus):
        assert sum(map(len, shares)) == len(cpus)


def test_cores_are_shared_where_the_machine_does_not_tell_its_topology(tmp_path: pathlib.Path) -> None:
    assert [share_of({1, 4, 6, 7}, rank, 2, tmp_path) for rank in range(2)] == [{1, 4}, {6, 7}]


def test_a_containers_part_of_the_cores_counts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {2, 3, 5})
    limit = tmp_path / "cpu.max"
    assert usable_cores(limit) == 3  # no such file
    for text, expected in (
        ("max 100000", 3), ("100000 100000", 1), ("110000 100000", 2), ("20000 100000", 1), ("500000 100000", 3)
    ):  # fmt: skip
        limit.write_text(text + "\n")
        assert usable_cores(limit) == expected
