"""Methods: losses over the global batch, keys in their places, what a step changes."""

import dataclasses

import pytest
import torch
from support.ranks import on_ranks, succeed
from torch.nn import functional as F

from fasttrain.config import TrainConfig
from fasttrain.engine.ranks import Ranks
from fasttrain.kernels import similarity
from fasttrain.methods import make_method
from fasttrain.methods.xmoco import XMoCo
from fasttrain.system.collectives import gather_rows, sum_over_ranks
from fasttrain.system.errors import UserError

SMALL = TrainConfig(data="", arch="small", size=16, queue_size=40, dim=8, batch_size=8, precision="fp32")


def views(count, seed=0):
    return torch.randn(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["moco", "xmoco"])
def test_a_step_moves_query_then_key_encoder_and_queue(method):
    model = make_method(dataclasses.replace(SMALL, method=method, ema=0.5))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    loss, terms = model(views(8))
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("key_"))
    assert not any(term.requires_grad for term in terms.values())
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1.0)
    model.after_step()
    weight = "encoder.0.0.weight"
    moved = model.state_dict()["key_" + weight]
    assert torch.allclose(moved, 0.5 * start["key_" + weight] + 0.5 * model.state_dict()[weight])
    assert int(model.queue.pointer) == 8
    assert not torch.equal(model.queue.keys_KD[:8], start["queue.keys_KD"][:8])
    assert torch.equal(model.queue.keys_KD[8:], start["queue.keys_KD"][8:])
    assert torch.allclose(model.queue.keys_KD.norm(dim=1), torch.ones(40), atol=1e-5)


def test_shuffled_keys_come_back_in_their_places():
    """In evaluation mode batch norm does not mix images, so the shuffle must not show."""
    plain, split = (make_method(dataclasses.replace(SMALL, batch_norm=kind)).eval() for kind in ("plain", "split"))
    image = views(8)[:, 1]
    assert torch.allclose(plain._keys(image), split._keys(image), atol=1e-5)


def test_keys_and_queries_of_an_image_are_normalised_in_different_groups():
    torch.manual_seed(0)
    model = make_method(dataclasses.replace(SMALL, batch_norm="split"))
    same = views(64)
    same[:, 1] = same[:, 0]
    q = model._embed(model.projector(model.encoder(same[:, 0])))
    k = model._keys(same[:, 1])
    assert (q - k).abs().max() > 1e-3  # the weights are equal, the views are equal: only the groups differ


@pytest.mark.parametrize("method", ["moco", "xmoco"])
def test_decoupled_changes_the_contrast_alone(method):
    q, k = F.normalize(torch.randn(2, 8, 8), dim=2)
    losses = []
    for decoupled in (False, True):
        config = dataclasses.replace(SMALL, method=method, decoupled=decoupled, cross_weight=0, uniform_weight=0)
        model = make_method(config)
        losses.append(model.loss(q, k, k)[0])
    queue = model.queue.keys_KD
    assert torch.allclose(losses[0], similarity.info_nce(q, k, queue, SMALL.temperature))
    assert torch.allclose(losses[1], similarity.decoupled(q, k, queue, SMALL.temperature))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("cross", ["batch", "queue", "none"])
@pytest.mark.parametrize("uniform", ["batch", "queue", "none"])
def test_xmoco_is_the_weighted_sum_of_its_terms(cross, uniform):
    config = dataclasses.replace(
        SMALL, method="xmoco", cross=cross, uniform=uniform, cross_weight=3.0, uniform_weight=0.5,
        temperature=0.1, cross_temperature=0.2, uniform_temperature=0.4,
    )  # fmt: skip
    model = make_method(config)
    q, k = F.normalize(torch.randn(2, 8, 8), dim=2)
    loss, terms = model.loss(q, k, k)
    queue = model.queue.keys_KD
    expected = similarity.info_nce(q, k, queue, 0.1)
    expected = (
        expected
        + {
            "batch": lambda: 3 * similarity.batch_consistency(q, k),
            "queue": lambda: 3 * similarity.queue_consistency(q, k, queue, 0.2),
            "none": lambda: 0,
        }[cross]()
    )
    expected = (
        expected
        + {
            "batch": lambda: 0.5 * similarity.batch_uniformity(q, k, 0, 0.4),
            "queue": lambda: 0.5 * similarity.queue_uniformity(q, queue, 0.4),
            "none": lambda: 0,
        }[uniform]()
    )
    assert torch.allclose(loss, expected, atol=1e-6)
    assert set(terms) == {"info_nce"} | {n for n, v in (("cross", cross), ("uniform", uniform)) if v != "none"}


def test_unknown_method_names_the_choices():
    with pytest.raises(UserError, match="choose from: moco, xmoco"):
        make_method(dataclasses.replace(SMALL, method="simclr"))


def _global_batch(folder, readings):
    """One rank's share of a loss over the global batch: its gradient, averaged over ranks as DDP does."""
    ranks = Ranks("cpu")
    rank, world_size = ranks.rank, ranks.world_size
    q_MD, k_MD, queue = torch.load(folder / "inputs.pt")
    config = dataclasses.replace(SMALL, method="xmoco", cross=readings, uniform=readings, cross_weight=2.0)
    model = XMoCo(torch.nn.Identity(), 8, config)
    model.queue.keys_KD.copy_(queue)
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    q_ND = q_MD[rows].clone().requires_grad_()
    keys_MD = gather_rows(k_MD[rows])
    assert torch.equal(keys_MD, k_MD)
    assert torch.allclose(sum_over_ranks(q_ND.sum(0)), q_MD.sum(0))
    loss, _ = model.loss(q_ND, k_MD[rows], keys_MD)
    loss.backward()
    torch.save((loss.detach(), q_ND.grad / world_size), folder / f"rank{rank}.pt")
    assert ranks.agree(rank) == 0
    assert ranks.agree(0) == world_size - 1
    assert ranks.share({"from": rank}) == {"from": 0}
    assert ranks.together(lambda: rank) == rank
    ranks.close()


@pytest.mark.parametrize("readings", ["batch", "queue"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_and_gradient_over_ranks_equal_one_process(tmp_path, world_size, readings):
    generator = torch.Generator().manual_seed(1)
    q, k, queue = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (12, 12, 40))
    torch.save((q, k, queue), tmp_path / "inputs.pt")
    succeed(on_ranks(tmp_path, world_size, _global_batch, tmp_path, readings))
    config = dataclasses.replace(SMALL, method="xmoco", cross=readings, uniform=readings, cross_weight=2.0)
    model = XMoCo(torch.nn.Identity(), 8, config)
    model.queue.keys_KD.copy_(queue)
    whole = q.clone().requires_grad_()
    loss, _ = model.loss(whole, k, k)
    loss.backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(), loss, atol=1e-6)
    assert torch.allclose(torch.cat([part[1] for part in parts]), whole.grad, atol=1e-6)
