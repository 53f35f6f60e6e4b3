"""What ranks send each other in a step is what the formulas of docs/scale.md say, to the byte."""

import json
import os
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.forks import on_ranks, succeed
from support.sockets import kernel_counts, sent
from support.steps import build, sample, small, take

from benchmarks.messages import FLOAT, Messages, messages
from fasttrain.engine.ranks import Ranks
from fasttrain.engine.step import TrainStep
from fasttrain.networks.shuffle import deal
from fasttrain.system.collectives import common_generator

# gloo asks for each message, announces it and puts a header before it: 48 bytes each. Of a sum over the ranks every
# W-th part is cut in two, or into pieces of a MiB; of what is gathered every rank's part is cut in two.
AROUND = 3 * 48
PIECE = 2**20
MACHINE = 2  # ranks
WARM, STEPS, IMAGES = 3, 2, 8  # DDP puts its buckets in order at first
CASES: dict[str, dict[str, Any]] = {
    "moco": {"batch_norm": "split", "batch_norm_groups": 4},
    "moco symmetric, sync": {"symmetric": True, "batch_norm": "sync"},
    "simclr": {},
    "simclr, machine": {"batch_norm": "machine"},
    "swav": {"queue_size": 0},
    "swav, queue": {"queue_epoch": 0.0},
}


def config_of(case: str, ranks: int) -> Any:
    return small(case.split()[0].strip(","), batch_size=IMAGES * ranks, **CASES[case])


def steps(folder: pathlib.Path, case: str) -> None:
    """Take steps on this rank, and write what its connections have sent in them."""
    os.environ.update(LOCAL_WORLD_SIZE=str(MACHINE), LOCAL_RANK=str(int(os.environ["RANK"]) % MACHINE))
    before: list[set[str]] = []
    new_group = dist.new_group

    def noting(*arguments: Any, **named: Any) -> Any:
        before.append(set(sent()))
        return new_group(*arguments, **named)

    dist.new_group = noting
    ranks = Ranks("cpu")
    dist.new_group = new_group
    data, control = before[0], before[1] - before[0]  # of the group that all collectives use, and of that for flags
    others = set(sent())
    config = config_of(case, ranks.world_size)
    method = build(config)
    data |= set(sent()) - others  # with those of a machine
    meeting = dist.new_group(backend="gloo")

    def settled() -> dict[str, int]:
        assert ranks._pending  # the flag of the step before, which no rank waits for
        ranks._pending[0].wait()
        dist.barrier(group=meeting)
        return sent()

    trainer = TrainStep(method, config.optimisation, ranks.device)
    own = sample(IMAGES, ranks.rank, config)
    counted: dict[str, int] = {}
    for number in range(WARM + STEPS):
        if number == WARM:
            counted = settled()
        common_generator.manual_seed(number)
        ranks.mean(take(trainer, own, number, 0.01))
        ranks.agree(0)
    after = settled()
    found = {name: sum(after[c] - counted[c] for c in group) for name, group in (("data", data), ("control", control))}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()


def by_gloo(each: Messages, ranks: int) -> float:
    """Bytes that all ranks together send for them."""
    if each.kind == "all-to-all":
        return ranks * (each.sent + len(each.sizes) * (each.ranks - 1) * AROUND)
    if each.kind == "all-gather":
        return ranks * (each.sent + len(each.sizes) * 2 * (each.ranks - 1) * AROUND)
    # It has no reduce-scatter: all rows are summed, and most dropped.
    one = sum(2 * (each.ranks - 1) * (size + _pieces(size, each.ranks) * AROUND) for size in each.sizes)
    return ranks // each.ranks * one


def _pieces(size: float, ranks: int, element: int = 4) -> int:
    pieces = max(-(-int(size) // PIECE), 2 * ranks)
    pieces += -pieces % ranks
    length = -(-int(size) // pieces)
    length += -length % element
    return -(-int(size) // length)


def images_kept(ranks: int) -> float:
    """Of a step: images that were dealt to the rank that has them, beyond the 1/W that is expected."""
    kept = 0
    for number in range(WARM, WARM + STEPS):
        order_M = torch.randperm(ranks * IMAGES, generator=torch.Generator().manual_seed(number))
        kept += sum(deal(order_M, rank, ranks).send_W[rank] for rank in range(ranks))
    return kept / STEPS - IMAGES


@pytest.mark.skipif(not kernel_counts(), reason="this kernel does not count a connection's bytes (Linux 4.19 does)")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_the_formulas_say(case: str, ranks: int, tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, ranks, steps, tmp_path, case))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    config = config_of(case, ranks)
    parts = {each.part: by_gloo(each, ranks) for each in messages(config, build(config), ranks, MACHINE)}
    if "images" in parts:
        parts["images"] -= images_kept(ranks) * FLOAT * 3 * 16**2
    assert sum(rank["data"] for rank in found) / STEPS == sum(parts.values()), parts
    flag = 2 * (ranks - 1) * (8 + AROUND)  # so small that it stays in one piece
    assert sum(rank["control"] for rank in found) / STEPS == flag
