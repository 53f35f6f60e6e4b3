"""Shuffled keys on 1 to 8 ranks: who met whom in a group, and every key back in its place."""

import multiprocessing
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from fasttrain.jobs.train import seed_step
from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.networks.groups import check_groups
from fasttrain.networks.shuffle import Shuffled, deal
from fasttrain.system.collectives import common_generator, rank, world_size

RANKS = [1, 2, 4, 8]
IMAGES = 128  # of a micro-batch over all ranks
MICRO_BATCHES = 4
BATCHES = [(images, dtype) for images in (16, 64) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


class Meetings(nn.Module):
    """Row i of what it returns is zero but for the images that were in the group of its i-th image.

    In an image's one-hot code's column, a group without that image has no variance, and so comes out as zero.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(images)

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        return self.norm(F.one_hot(view[:, 0, 0, 0].long(), len(self.norm.weight)).float())


def own(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a batch."""
    return x.chunk(world_size())[rank()]


def numbered(images: int, side: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images (N, 3, S, S), channels-last, that carry their number."""
    return (
        torch.arange(images, dtype=dtype).view(-1, 1, 1, 1).expand(-1, side, side, 3).contiguous().permute(0, 3, 1, 2)
    )


def measured_share() -> torch.Tensor:
    """Of the images in each key's group, those that were in its query's: the mean over a batch."""
    network = convert_batch_norm(nn.Sequential(Meetings(IMAGES)), "split")
    view = own(numbered(IMAGES))
    with_query, with_key = network(view) != 0, own(Shuffled(view).encoded(network)) != 0
    assert with_query.sum(1).eq(IMAGES // 8).all()
    assert with_key.sum(1).eq(IMAGES // 8).all()
    return ((with_query & with_key).sum(1) / with_key.sum(1)).mean()


def places(images: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple[torch.dtype, tuple[int, ...], bool]]]:
    """The numbers that the keys of a batch carry, and how the images came to the network."""

    def encode(view: torch.Tensor) -> torch.Tensor:
        seen.append((view.dtype, tuple(view.shape), view.is_contiguous(memory_format=torch.channels_last)))
        return view.float().mean((2, 3))

    seen = []
    return Shuffled(own(numbered(images, 5, dtype))).encoded(encode)[:, 0], seen


def keys() -> torch.Tensor:
    """Of real images through a small network."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5), nn.BatchNorm1d(5)
    network = convert_batch_norm(nn.Sequential(*layers), "split")
    return Shuffled(own(torch.randn(64, 3, 5, 5).to(memory_format=torch.channels_last))).encoded(network)


@torch.no_grad()
def _measure(number: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    for ranks in RANKS:
        if number >= ranks:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=number, world_size=ranks)
        seed_step(0, 7, number)
        found = {
            "keys": keys(),
            "share": torch.stack([measured_share() for _ in range(MICRO_BATCHES)]),
            "places": [places(*batch) for batch in BATCHES],
        }
        torch.save(found, folder / f"{ranks}-{number}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each number of ranks found: found[ranks][rank]."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(
        ["torch", "pytest", "fasttrain.jobs.train"]
    )  # so that eight import torch once
    mp.start_processes(_measure, (folder,), nprocs=max(RANKS), start_method="forkserver")
    return {n: [torch.load(folder / f"{n}-{number}.pt") for number in range(n)] for n in RANKS}


@pytest.mark.parametrize("ranks", RANKS)
def test_a_key_shares_few_images_with_its_query_on_any_number_of_ranks(
    found: dict[int, list[dict[str, Any]]], ranks: int
) -> None:
    shares_RA = torch.stack([one["share"] for one in found[ranks]])
    shares_A = shares_RA.mean(0)  # of each micro-batch
    expected = check_groups(IMAGES * MICRO_BATCHES, ranks, MICRO_BATCHES).share
    assert shares_A.max() <= 0.2, shares_A
    assert shares_A.mean().item() == pytest.approx(expected, abs=0.02)
    assert len(set(shares_A.tolist())) > 1  # every micro-batch has a permutation of its own


@pytest.mark.parametrize("ranks", RANKS)
def test_keys_come_back_in_their_places_and_images_stay_as_they_are(
    found: dict[int, list[dict[str, Any]]], ranks: int
) -> None:
    for one in found[ranks]:
        for (images, dtype), (numbers, seen) in zip(BATCHES, one["places"], strict=True):
            assert numbers.tolist() == list(range(images))
            assert seen == [(dtype, (images // ranks, 3, 5, 5), True)]


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_the_keys_that_one_process_computes(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    """Eight groups are the same eight groups wherever they are computed."""
    for one in found[ranks]:
        assert torch.equal(one["keys"], found[ranks][0]["keys"])
        assert torch.allclose(one["keys"], found[1][0]["keys"], atol=1e-5)


def test_a_deal_sends_every_image_where_the_permutation_says() -> None:
    images, ranks = 6, 4
    order = torch.randperm(images * ranks, generator=torch.Generator().manual_seed(0))
    dealt = [deal(order, number, ranks) for number in range(ranks)]
    sent = [(number * images + one.sent_N).split(one.send_W) for number, one in enumerate(dealt)]
    for number, one in enumerate(dealt):
        received = torch.cat([from_other[number] for from_other in sent])
        assert one.receive_W == [len(from_other[number]) for from_other in sent]
        assert torch.equal(received[one.place_N], order.view(ranks, -1)[number])
        assert torch.equal(order[one.back_M], torch.arange(images * ranks))


def test_what_ranks_draw_alike_depends_on_seed_and_step_alone() -> None:
    drawn = {}
    for seed, step, number in [(0, 5, 0), (0, 5, 3), (0, 6, 0), (1, 5, 0)]:
        seed_step(seed, step, number)
        drawn[seed, step, number] = torch.randperm(64, generator=common_generator).tolist()
    assert drawn[0, 5, 0] == drawn[0, 5, 3]
    assert drawn[0, 5, 0] != drawn[0, 6, 0] != drawn[1, 5, 0] != drawn[0, 5, 0]
