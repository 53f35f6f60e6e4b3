"""ViewLoader gives other people's loops what training has: the same batches and views, at any step, on any ranks."""

import gc
import io
import pathlib
import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.forks import on_ranks, succeed
from support.launch import train
from support.loading import Numbers
from torch import Tensor

from fasttrain import ViewLoader, open_dataset
from fasttrain.engine.step import TrainStep
from fasttrain.engine.views import ViewMemory
from fasttrain.evaluation.features import central_views
from fasttrain.input import LoaderError, Order
from fasttrain.methods import Sample
from fasttrain.system.errors import DataError, UserError
from fasttrain.view_loader import ViewBatch
from fasttrain.views.spec import ViewSpec

SMALL: dict[str, Any] = {"size": 16, "batch_size": 24, "workers": 1, "device": "cpu"}
MIXED = (ViewSpec(), ViewSpec(size=0.5, count=2), ViewSpec(scale=(0.5, 1.0)))

Rows = dict[tuple[int, int], Tensor]  # by epoch and sample: all views of an image, in one row


def rows(epoch: int, batches: Iterable[ViewBatch]) -> Rows:
    return {
        (epoch, sample): torch.cat([view[place].flatten() for view in views])
        for views, _, index_B in batches
        for place, sample in enumerate(index_B.tolist())
    }


def equal(one: Rows, other: Rows) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def test_views_are_those_of_training(
    shards: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    forward_backward = TrainStep.forward_backward

    def spied(self: TrainStep, sample: Sample) -> dict[str, Tensor]:
        seen.append((sample.views[0].clone(), sample.index_B))
        return forward_backward(self, sample)

    monkeypatch.setattr(TrainStep, "forward_backward", spied)
    assert train(shards, tmp_path / "run", "--method", "moco", "--seed", 3, "--max-steps", 6) == 0
    with ViewLoader(shards, "mocov2", 16, 16, seed=3, dtype=seen[0][0].dtype, device="cpu") as loader:
        batches = [batch for _ in range(2) for batch in loader]
    assert len(loader) == 4
    for (pair, asked_B), (views, _, index_B) in zip(seen, batches[:6], strict=True):
        assert torch.equal(index_B, asked_B)
        assert torch.equal(torch.stack(views), pair)


def test_each_view_is_a_batch_of_its_own_in_the_recipe_s_order(shards: pathlib.Path) -> None:
    with ViewLoader(shards, MIXED, **SMALL) as loader:
        (large, small, other, last), label_B, index_B = next(iter(loader))
    assert [view.shape for view in (large, small, other, last)] == [(24, 3, s, s) for s in (16, 8, 8, 16)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in (large, small, other, last))
    assert index_B.dtype == torch.int64
    assert label_B is not None
    assert label_B.tolist() == open_dataset(shards).labels(index_B.numpy()).tolist()
    with ViewLoader(shards, MIXED[:2], **SMALL) as loader:  # a view is drawn by its place
        (first, second, third), _, _ = next(iter(loader))
    assert all(torch.equal(*pair) for pair in ((first, large), (second, small), (third, other)))


def test_batches_stay_as_they_are(shards: pathlib.Path) -> None:
    """Memory is used again only once no tensor refers to it, not even a part of another's memory."""
    with ViewLoader(shards, MIXED, **SMALL) as loader:
        kept = [batch for _ in range(4) for batch in loader]
        before = [view.clone() for batch in kept for view in batch.views]
        tails = [batch.views[1][5:, 0] for batch in kept]
        copies = [tail.clone() for tail in tails]
        after = [view for batch in kept for view in batch.views]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        del kept, after
        for _ in range(3):
            for _batch in loader:
                pass
        assert all(torch.equal(*pair) for pair in zip(tails, copies, strict=True))


def test_memory_of_views_is_used_again() -> None:
    memory = ViewMemory()
    sides_V, images = (224, 96, 224), 40  # more than malloc keeps
    first = memory.borrow(sides_V, images, torch.float32)
    assert [group.shape for group in first] == [(2, images, 3, 224, 224), (1, images, 3, 96, 96)]
    for group in first:
        group.fill_(7)
    part = first[0][1, 3]
    del first, group
    (other, _) = memory.borrow(sides_V, images, torch.float32)
    assert other.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()
    del part, other
    kinds = [(torch.float32, sides_V), (torch.float32, sides_V), (torch.bfloat16, (224,))]
    held = [memory.borrow(sides, images, dtype) for dtype, sides in kinds]
    assert sum(bool((groups[0] == 7).all()) for groups in held[:2]) == 1
    assert held[2][0].shape == (1, images, 3, 224, 224)


@pytest.mark.parametrize("kind", ["auto", "resident"])
def test_a_position_is_exact_at_any_step(shards: pathlib.Path, kind: str) -> None:
    """Inside a loop, behind one that was left early, and at the ends of passes."""
    with ViewLoader(shards, **SMALL, loader=kind) as whole:
        wanted = [(epoch, batch) for epoch in range(3) for batch in whole]
    assert len(wanted) == 9
    for stop in range(1, 9):
        with ViewLoader(shards, **SMALL, loader=kind) as loader:
            taken, state = [], {}
            while len(taken) < stop:
                for batch in loader:
                    taken.append(batch)
                    state = loader.state_dict()
                    if len(taken) == stop:
                        break
            assert loader.state_dict() == state
            assert (state["epoch"], state["step"]) == divmod(stop, 3)
        with ViewLoader(shards, **SMALL, loader=kind) as again:
            again.load_state_dict(through_a_file(state))
            assert again.epoch == stop // 3
            rest = [(epoch, batch) for epoch in range(again.epoch, 3) for batch in again]
        assert len(rest) == 9 - stop
        for (epoch, one), (other_epoch, other) in zip(wanted[stop:], rest, strict=True):
            assert equal(rows(epoch, [one]), rows(other_epoch, [other]))


def test_a_loop_that_was_left_is_taken_up(shards: pathlib.Path) -> None:
    with ViewLoader(shards, **SMALL) as loader, ViewLoader(shards, **SMALL) as whole:
        first = next(iter(loader))
        rest = list(loader)
        assert equal(rows(0, whole), rows(0, [first, *rest]))


def test_shards_are_mixed_some_at_a_time_where_that_is_asked_for_and_a_position_keeps_it(
    shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ViewLoader(shards, **SMALL, shuffle="block", shuffle_window=1) as loader:
        batches = [index_B for _, _, index_B in loader]
        order = Order(72, 24, lanes=1, block_S=open_dataset(shards).block_S)  # type: ignore[attr-defined]
        assert [index_B.tolist() for index_B in batches] == [order.step(0, step).tolist() for step in range(3)]
        next(iter(loader))
        state = loader.state_dict()
        rest = [index_B.tolist() for _, _, index_B in loader]
    with ViewLoader(shards, **SMALL, shuffle="global") as elsewhere:
        elsewhere.load_state_dict(through_a_file(state))
        assert [index_B.tolist() for _, _, index_B in elsewhere] == rest
    with ViewLoader(shards, **SMALL) as loader:
        assert loader.state_dict()["lanes"] == 0
        assert capsys.readouterr().err == ""
        loader.load_state_dict({name: value for name, value in state.items() if name != "lanes"})
    assert "an earlier version was at this position" in capsys.readouterr().err
    monkeypatch.setattr("fasttrain.input.shuffle.network_file_system", lambda path: "nfs4")
    with ViewLoader(shards, **SMALL) as loader:
        assert loader.state_dict()["lanes"] == 3
    assert f"block, 3 shards at once: {shards} is on a file system of the network (nfs4)" in capsys.readouterr().err


def test_without_shuffle_each_loop_begins_with_the_first_image(shards: pathlib.Path) -> None:
    with ViewLoader(shards, "center", **{**SMALL, "batch_size": 20}, shuffle=False) as loader:
        assert len(loader) == 4
        left = iter(loader)
        next(left)
        state = loader.state_dict()
        again = [index_B.tolist() for _, _, index_B in loader]
        assert [sample for batch in again for sample in batch] == list(range(72))
        loader.load_state_dict(state)
        assert [index_B.tolist() for _, _, index_B in loader] == again[1:]
        assert [index_B.tolist() for _, _, index_B in loader] == again


def test_central_views_are_those_of_evaluation(shards: pathlib.Path) -> None:
    with ViewLoader(shards, "center", **SMALL, split="val", shuffle=False) as loader:
        ((view,), label_B, _) = next(iter(loader))
        numbers = {"mean": loader.mean, "std": loader.std, "batch_size": 24, "workers": 1, "max_failed_fraction": 0.0}
    ((batch, wanted),) = central_views(
        open_dataset(shards, "val"), torch.device("cpu"), size=16, labels=True, **numbers
    )
    assert torch.equal(view, wanted)
    assert label_B is not None
    assert batch.label_B is not None
    assert torch.equal(label_B, batch.label_B)


def test_a_second_loop_ends_the_first_and_the_first_says_so(shards: pathlib.Path) -> None:
    with ViewLoader(shards, **SMALL) as loader:
        first = iter(loader)
        next(first)
        assert len(list(loader)) == 2
        with pytest.raises(UserError, match="this loop has ended"):
            next(first)
        assert loader.epoch == 1
        assert len(list(loader)) == 3


def test_ranks_share_each_batch_and_any_number_of_them_goes_on(shards: pathlib.Path) -> None:
    with ViewLoader(shards, **SMALL) as whole:
        wanted = [rows(0, [batch]) for batch in whole]
        position = whole.state_dict()
    shares = [ViewLoader(shards, **SMALL, rank=rank, world_size=2) for rank in range(2)]
    joined = [rows(0, pair) for pair in zip(*shares, strict=True)]
    assert [len(batch) for batch in joined] == [24, 24, 24]
    assert all(equal(one, other) for one, other in zip(wanted, joined, strict=True))
    assert all(share.state_dict() == position for share in shares)
    with ViewLoader(shards, **SMALL, rank=2, world_size=3) as third:
        third.load_state_dict({**position, "epoch": 0, "step": 2})
        ((_, _, index_B),) = third
    assert index_B.tolist() == [sample for _, sample in wanted[2]][16:]


def _place_of_torch_distributed(shards: pathlib.Path, out: pathlib.Path) -> None:
    torch.distributed.init_process_group("gloo")
    with ViewLoader(shards, **SMALL) as loader:
        torch.save([(loader.rank, loader.world_size), [index_B for *_, index_B in loader]], out / f"{loader.rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_place_among_ranks_is_that_of_torch_distributed(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    succeed(on_ranks(tmp_path, 2, _place_of_torch_distributed, shards, tmp_path))
    (first, mine), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [tuple(first), tuple(second)] == [(0, 2), (1, 2)]
    assert sorted(torch.cat([*mine, *other]).tolist()) == list(range(72))


def test_torchrun_s_variables_tell_the_place_before_the_group_is_made(
    shards: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ViewLoader(shards, **SMALL).rank == 1
    assert ViewLoader(shards, **SMALL, rank=0, world_size=1).world_size == 1


def test_labels_are_read_where_there_are_some(shards: pathlib.Path, image_folder: pathlib.Path) -> None:
    def labels_of(*arguments: Any, **options: Any) -> Tensor | None:
        with ViewLoader(*arguments, **{**SMALL, **options}) as loader:
            return next(iter(loader)).label_B

    assert labels_of(shards) is not None
    assert labels_of(shards, labels=False) is None
    flat = image_folder / "train/class0"
    assert labels_of(flat, batch_size=8) is None
    forced = labels_of(flat, batch_size=8, labels=True)
    assert forced is not None
    assert forced.tolist() == [-1] * 8


def test_an_opened_data_set_may_be_given(image_folder: pathlib.Path) -> None:
    store = open_dataset(str(image_folder / "train"), val_fraction=0.25, view_size=16)
    with ViewLoader(store, **SMALL) as loader:
        assert loader.num_samples == store.num_samples < 72
        assert len(list(loader)) == len(loader)


def test_other_statistics_and_dtypes(shards: pathlib.Path) -> None:
    plain: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    with ViewLoader(shards, **SMALL) as ours, ViewLoader(shards, **SMALL, **plain, dtype=torch.bfloat16) as other:
        (x, _), _, _ = next(iter(ours))
        (y, _), _, _ = next(iter(other))
        mean, std = (torch.tensor(values)[:, None, None] for values in (ours.mean, ours.std))
    assert y.dtype == torch.bfloat16
    assert torch.allclose(x * std + mean, y.float(), atol=2**-8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": "mocov9"}, "'mocov9': choose one of mocov1, mocov2"),
        ({"views": ()}, "one ViewSpec"),
        ({"batch_size": 100}, "batch_size 100 is larger than the data set (72 images)"),
        ({"batch_size": 0}, "batch_size 0: give a whole number above 0"),
        ({"batch_size": 25, "rank": 0, "world_size": 2}, "no multiple"),
        ({"rank": 1}, "give both"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside 0…1"),
        ({"batch_size": 62, "rank": 0, "world_size": 4, "shuffle": False}, "no multiple"),
        ({"batch_size": 70, "rank": 0, "world_size": 5, "shuffle": False}, "last batch of 2 images"),
        ({"size": 1.5}, "size 1.5"),
        ({"workers": 0}, "workers 0"),
        ({"shuffle": "blocks"}, "shuffle 'blocks': choose one of True, False, global, block"),
        ({"shuffle_window": 0}, "shuffle_window 0"),
        ({"seed": -1}, "seed -1"),
        ({"loader": "fast"}, "'fast': choose one of auto"),
        ({"dtype": torch.float64}, "choose one of torch.float32"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"std": (1, 0, 1)}, "above 0"),
        ({"mean": (0.5,)}, "give three numbers"),
    ],
)
def test_values_that_can_t_be_are_refused_in_one_line(shards: pathlib.Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        ViewLoader(shards, **{**SMALL, **options})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_data_that_is_not_there_is_refused(shards: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        ViewLoader(tmp_path / "nowhere", **SMALL)
    with pytest.raises(DataError, match="no 'test' split"):
        ViewLoader(shards, **SMALL, split="test")


def test_a_position_among_other_batches_is_refused(shards: pathlib.Path, tar_shards: pathlib.Path) -> None:
    with ViewLoader(shards, **SMALL) as loader:
        for other in ({"seed": 1}, {"batch_size": 12}):
            with (
                ViewLoader(shards, **{**SMALL, **other}) as elsewhere,
                pytest.raises(UserError, match="is one in batches"),
            ):
                loader.load_state_dict(elsewhere.state_dict())
        with pytest.raises(UserError, match="another data"):
            loader.load_state_dict({**loader.state_dict(), "data": "other"})
        for odd in ({"epoch": -1}, {"step": "2"}, {"lanes": None}):
            with pytest.raises(UserError, match="no position"):
                loader.load_state_dict({**loader.state_dict(), **odd})
        for none in ({}, {"epoch": 1, "step": 2}):
            with pytest.raises(UserError, match="no position"):
                loader.load_state_dict(none)


def test_too_many_damaged_images_end_the_loop() -> None:
    store = Numbers(60, broken=range(40))
    store.fingerprint = "numbers"  # type: ignore[attr-defined]
    loader = ViewLoader(store, **SMALL, labels=False)  # type: ignore[arg-type]
    with pytest.raises(LoaderError, match="can't be decoded"):
        list(loader)
    loader.close()


def test_decoding_ends_with_a_loop_that_is_left(shards: pathlib.Path) -> None:
    with ViewLoader(shards, **{**SMALL, "batch_size": 2}) as loader:
        before = set(threading.enumerate())
        batches = iter(loader)
        next(batches)
        decoding = [thread for thread in threading.enumerate() if thread not in before and "augment" not in thread.name]
        assert decoding
        del batches
        assert not any(thread.is_alive() for thread in decoding)


def test_nothing_is_left_of_a_closed_loader_or_one_that_is_forgotten(shards: pathlib.Path) -> None:
    before = set(threading.enumerate())
    loader = ViewLoader(shards, **{**SMALL, "workers": 3})
    left = iter(loader)
    next(left)
    forgotten = ViewLoader(shards, **{**SMALL, "workers": 3})
    next(iter(forgotten))
    started = {thread for thread in threading.enumerate() if "augment" not in thread.name} - before  # the kernel's stay
    assert len(started) >= 6
    loader.close()
    loader.close()
    with pytest.raises(UserError, match="closed"):
        iter(loader)
    del forgotten
    gc.collect()
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
