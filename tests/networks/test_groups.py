"""Groups of split batch norm: how a batch is cut, and which cuts are refused."""

import pytest
import torch

from fasttrain.networks.groups import Groups, check_groups, check_rows, groups_of_rank
from fasttrain.system.errors import UserError


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((256, 1, 1), (8, 32)), ((256, 8, 1), (8, 32)), ((256, 4, 2), (8, 16)), ((512, 1, 1), (8, 64)),
        ((256, 16, 1), (16, 16)), ((240, 3, 1), (12, 20)), ((240, 6, 1), (12, 20)), ((100, 1, 1), (10, 10)),
        ((16, 1, 1), (4, 4)), ((16, 1, 2), (2, 4)), ((16, 2, 2), (2, 4)), ((16, 4, 1), (4, 4)), ((8, 1, 1), (2, 4)),
    ],
)  # fmt: skip
def test_a_batch_is_cut_into_equal_groups_all_over_the_ranks(batch: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert check_groups(*batch) == expected


def test_groups_on_a_rank_are_always_equal() -> None:
    for images in range(1, 200):
        for ranks in (1, 2, 3, 8, 20):
            assert images % groups_of_rank(images, 8, ranks) == 0
            assert groups_of_rank(images, 1, ranks) == 1


@pytest.mark.parametrize("groups", [(8, 32), (8, 11), (16, 16), (2, 4), (1, 30), (30, 1)])
def test_the_share_is_what_random_permutations_give(groups: tuple[int, int]) -> None:
    cut = Groups(*groups)
    number, images = groups
    generator = torch.Generator().manual_seed(0)
    of_query = torch.arange(number * images) // images
    shares = []
    for _ in range(2000):
        first = torch.randperm(number * images, generator=generator)[:images]  # the group of key first[0]
        shares.append((of_query[first] == of_query[first[0]]).float().mean())
    assert torch.stack(shares).mean().item() == pytest.approx(cut.share, abs=0.01)


@pytest.mark.parametrize(
    ("batch", "instead"),
    [
        ((256, 1, 8), "32%.*; use --accumulate 2, --batch-size 704, or"),
        ((256, 64, 1), r"26%.*; use 32 process\(es\), --batch-size 384, or"),
        ((256, 1, 1, 1), r"1 group\(s\) of 256 .* 100% .*\(at most 20%\); use --batch-norm-groups 8, or"),
        ((94, 1, 1), r"47 group\(s\) of 2 images.*; use --batch-size 96, or"),
        ((64, 1, 8), r"57%.*\(at most 33%\); use --accumulate 2, "),
        ((2, 2, 1), r"2 group\(s\) of 1 images.*100%"),
        ((4, 1, 1), r"100%.*; use --batch-size 8, or --batch-norm sync or plain, where all of them do$"),
    ],
)
def test_a_cut_by_which_a_query_could_tell_its_key_is_refused(batch: tuple[int, ...], instead: str) -> None:
    with pytest.raises(UserError, match=instead) as refused:
        check_groups(*batch)
    assert "\n" not in str(refused.value)


def test_what_is_named_instead_is_accepted() -> None:
    assert check_groups(256, 1, 2).share <= 0.2
    assert check_groups(704, 1, 8).share <= 0.2
    assert check_groups(256, 32, 1).share <= 0.2
    assert check_groups(384, 64, 1).share <= 0.2


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "kind", "rows", "instead"),
    [
        (2, 1, 1, "plain", 2, ""),
        (4, 2, 1, "plain", 2, " or --batch-norm sync, of 4"),
        (4, 2, 1, "split", 2, " or --batch-norm sync, of 4"),
        (16, 2, 4, "plain", 2, " or --batch-norm sync, of 4"),
        (16, 2, 8, "sync", 2, " or less --accumulate"),
        (22, 1, 1, "split", 2, " or --batch-norm sync, of 22"),  # 22 images are cut into 11 groups
    ],
)
def test_a_head_with_too_few_rows_is_refused(
    batch_size: int, world_size: int, accumulate: int, kind: str, rows: int, instead: str
) -> None:
    with pytest.raises(UserError, match=f"would normalise {rows} rows together.*use a larger batch{instead}$"):
        check_rows(batch_size, world_size, accumulate, kind)


def test_a_head_with_rows_enough_is_not() -> None:
    for batch in ((4, 1, 1, "plain"), (4, 2, 1, "sync"), (8, 2, 1, "split"), (16, 2, 2, "plain"), (8, 1, 1, "split")):
        check_rows(*batch)
