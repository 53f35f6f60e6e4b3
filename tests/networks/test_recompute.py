"""Activation checkpointing changes memory and time, and nothing else."""

import pytest
import torch
from torch import nn

from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions
from fasttrain.networks.recompute import checkpoint_activations, stages
from fasttrain.system.errors import UserError


def trained_twice(
    arch: str, size: int, batch_norm: str, recompute: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], dict[str, torch.Tensor]]:
    """Loss, gradients and state of an encoder after two forward and backward passes."""
    torch.manual_seed(3)
    encoder, _ = make_encoder(EncoderOptions(arch=arch), size)
    encoder = convert_batch_norm(encoder, batch_norm)
    names = list(encoder.state_dict())
    if recompute:
        checkpoint_activations(encoder)
    assert list(encoder.state_dict()) == names
    losses = []
    for _ in range(2):
        loss = encoder(torch.randn(6, 3, size, size)).pow(2).mean()
        loss.backward()
        losses.append(loss.detach())
    return losses, [p.grad for p in encoder.parameters()], encoder.state_dict()


@pytest.mark.parametrize(
    ("arch", "size", "batch_norm"),
    [("small", 16, "split"), ("small", 16, "plain"), ("resnet18", 32, "plain"), ("efficientnet_b0", 32, "plain")],
)
def test_loss_gradients_and_statistics_are_the_same(arch: str, size: int, batch_norm: str) -> None:
    """To the bit. EfficientNet drops whole blocks at random: the second run must draw the same."""
    (losses, gradients, state), (losses2, gradients2, state2) = (
        trained_twice(arch, size, batch_norm, recompute) for recompute in (False, True)
    )
    assert losses == losses2
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))
    assert all(torch.equal(state[name], state2[name]) for name in state)


def test_less_is_kept_for_backward() -> None:
    def kept(recompute: bool) -> int:
        encoder, _ = make_encoder(EncoderOptions(arch="small"), 32)
        if recompute:
            checkpoint_activations(encoder)
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * (not isinstance(tensor, nn.Parameter))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(torch.randn(4, 3, 32, 32))
        return total

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize(
    ("arch", "fewest"),
    [("small", 4), ("resnet50", 4), ("vit_b_16", 12), ("vit_tiny", 12), ("regnet_y_400mf", 4), ("swin_t", 4)],
)
def test_stages_cover_most_of_an_encoder(arch: str, fewest: int) -> None:
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):  # names and shapes are all that counts here
        encoder, _ = make_encoder(EncoderOptions(arch=arch), 224 if arch != "small" else 32)
    found = stages(encoder)
    assert len(found) >= fewest
    inside = sum(p.numel() for stage in found for p in stage.parameters())
    assert inside > 0.9 * sum(p.numel() for p in encoder.parameters())
    assert len({id(p) for stage in found for p in stage.parameters()}) == sum(1 for s in found for _ in s.parameters())


def test_a_network_without_stages_is_an_error() -> None:
    with pytest.raises(UserError, match="no stages"):
        checkpoint_activations(nn.Sequential(nn.Flatten(), nn.ReLU()))
