"""How many groups split batch norm takes, and how much of its own answer a query may see through them.

The M images of a (micro-)batch, over all ranks, are normalised in G groups of S: queries in order, keys shuffled. Of
the S images in a key's group, the one itself was in its query's group, too, and each other with a chance of
(S - 1) / (M - 1): an expected share of (G + S - 2) / (M - 1). That is 0.149 for MoCo's 8 groups of 32, 1 for one group,
and never below 2 / (√M + 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fasttrain.system.errors import UserError

GROUPS = 8  # MoCo's on ImageNet (256 images on 8 GPUs) and on CIFAR-10 (512 images)
LEAST_IMAGES = 4  # in a group, for a variance to mean something; a batch too small for it has fewer groups
MAX_SHARE = 0.2
SLACK = 1.5  # a batch too small for MAX_SHARE (below 81 images: a test's) may have so many times its own least,
MAX_SLACK_SHARE = 0.9  # but never all


class Groups(NamedTuple):
    """How a (micro-)batch is cut for batch norm."""

    number: int  # over all ranks
    images: int  # in each

    @property
    def share(self) -> float:
        """Of the images that normalise a key: the part that also normalised its query, expected."""
        return (self.number + self.images - 2) / max(1, self.number * self.images - 1)


def groups_of_rank(images: int, groups: int, world_size: int) -> int:
    """How many groups of equal size a rank cuts its images into, so that all ranks together have `groups` or more.

    Fewer where they would have less than LEAST_IMAGES each, more where no such number divides `images`.
    """
    number = max(1, min(-(-groups // world_size), images // LEAST_IMAGES))
    while images % number:
        number += 1
    return number


def check_groups(batch_size: int, world_size: int, accumulate: int, groups: int = GROUPS) -> Groups:
    """How each micro-batch is cut: into `groups` over all ranks, or the next number that makes them equal.

    batch_size: images a step over all ranks, a multiple of world_size · accumulate.
    Raises UserError, naming what to use instead, where the share would be above MAX_SHARE. A batch of less than 81
    images can't have that: it is refused only where the share is above SLACK times the least such a batch can have.
    """
    cut = _cut(batch_size, world_size, accumulate, groups)
    if _fits(batch_size, world_size, accumulate, groups):
        return cut
    instead = "".join(f"{option}, " for option in _instead(batch_size, world_size, accumulate, groups))
    raise UserError(
        f"--batch-norm split: a micro-batch on {world_size} process(es) is {cut.number} group(s) of {cut.images} "
        f"images, and {cut.share:.0%} of those that normalise a key would also normalise its query, which could tell "
        f"it by them (at most {_limit(batch_size):.0%}); use {instead}or --batch-norm sync or plain, where all of "
        "them do"
    )


def check_rows(
    batch_size: int, world_size: int, accumulate: int, kind: str, groups: int = GROUPS, machine_size: int = 1
) -> None:
    """Raises UserError where a head's batch norm would take its statistics over less than LEAST_IMAGES rows.

    Arguments as of check_groups; kind: of batch norm, "split", "sync", "machine" or "plain"; machine_size: ranks of
    a machine.
    """
    share = batch_size // (world_size * accumulate)
    rows = {
        "split": share // groups_of_rank(share, groups, world_size), "sync": share * world_size,
        "machine": share * machine_size, "plain": share,
    }  # fmt: skip
    if rows[kind] < LEAST_IMAGES:
        less = " or less --accumulate" if accumulate > 1 else ""
        instead = f" or --batch-norm sync, of {rows['sync']}" if rows["sync"] >= LEAST_IMAGES else less
        raise UserError(
            f"--batch-size {batch_size}: the head's batch norm would normalise {rows[kind]} rows together, too few for "
            f"a variance; it needs {LEAST_IMAGES}: use a larger batch{instead}"
        )


def _cut(batch_size: int, world_size: int, accumulate: int, groups: int) -> Groups:
    images = batch_size // (world_size * accumulate)
    number = groups_of_rank(images, groups, world_size)
    return Groups(world_size * number, images // number)


def _fits(batch_size: int, world_size: int, accumulate: int, groups: int) -> bool:
    cut = _cut(batch_size, world_size, accumulate, groups)
    return batch_size % (world_size * accumulate) == 0 and cut.share <= _limit(batch_size)


def _limit(batch_size: int) -> float:
    least = 2 / (batch_size**0.5 + 1)
    return MAX_SHARE if least <= MAX_SHARE else min(SLACK * least, MAX_SLACK_SHARE)


def _instead(batch_size: int, world_size: int, accumulate: int, groups: int) -> Iterator[str]:
    """The nearest value of each option that would do by itself."""
    exact = world_size * accumulate * -(-groups // world_size)  # of whose multiples the groups are as many as wanted
    larger = range(batch_size // exact * exact + exact, 64 * batch_size, exact)
    tried: dict[str, Iterable[int]] = {
        "--accumulate {}": (n for n in range(accumulate - 1, 0, -1) if _fits(batch_size, world_size, n, groups)),
        "{} process(es)": (n for n in range(world_size - 1, 0, -1) if _fits(batch_size, n, accumulate, groups)),
        "--batch-norm-groups {}": (n for n in (GROUPS,) if _fits(batch_size, world_size, accumulate, n)),
        "--batch-size {}": (n for n in larger if _fits(n, world_size, accumulate, groups)),
    }
    for option, values in tried.items():
        yield from map(option.format, itertools.islice(values, 1))
