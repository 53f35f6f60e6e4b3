"""What DINO's linear classifier reads of encoders."""

from typing import Any

import pytest
import torch
from torch import nn

from fasttrain.networks.class_tokens import dino_features
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions


def made(arch: str, **more: Any) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    encoder, width = make_encoder(EncoderOptions(arch=arch, **more), 16)
    return encoder.eval(), width


@pytest.mark.parametrize(
    ("arch", "more"), [("vit_tiny", {"patch_size": 4}), ("timm:vit_tiny_patch16_224", {"patch_size": 4})]
)
def test_class_tokens_of_the_last_four_blocks_stand_side_by_side(arch: str, more: dict[str, int]) -> None:
    encoder, width = made(arch, **more)
    features, about = dino_features(encoder, width)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, own = features(x), encoder(x)
    assert found.shape == (2, 4 * 192)
    assert torch.allclose(found[:, -192:], own, atol=1e-5)
    assert about == "class tokens of the last 4 blocks"
    assert not torch.allclose(found[:, :192], own, atol=1e-2)


@pytest.mark.parametrize(
    ("arch", "more"), [("vit_base", {"patch_size": 8}), ("timm:vit_base_patch16_224", {"patch_size": 8})]
)
def test_one_as_wide_as_vit_b_gives_its_class_token_and_the_mean_of_its_patches(
    arch: str, more: dict[str, int]
) -> None:
    encoder, width = made(arch, **more)
    features, about = dino_features(encoder, width)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found, own = features(x), encoder(x)
        if arch.startswith("timm:"):
            patches = encoder.forward_features(x)[:, 1:]  # type: ignore[operator]
            assert torch.allclose(found[:, 768:], patches.mean(1), atol=1e-5)
    assert found.shape == (1, 1536)
    assert torch.allclose(found[:, :768], own, atol=1e-5)
    assert about == "class token and mean of patch tokens of the last block"


def test_the_last_blocks_patch_tokens_are_those_of_torchvisions_own_block() -> None:
    """Ours computes the class token alone there, and so does not have them at hand."""
    import torchvision

    encoder, _ = made("vit_tiny", patch_size=8)
    own = torchvision.models.VisionTransformer(16, 8, 12, 3, 192, 768).eval()
    own.load_state_dict(encoder.state_dict(), strict=False)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder.last_tokens(x, 1)[0]  # type: ignore[operator]
        patches = own._process_input(x)
        expected = own.encoder(torch.cat([own.class_token, patches], 1))
    assert torch.allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("arch", ["small", "resnet18", "timm:resnet10t", "timm:vit_medium_patch16_gap_240"])
def test_encoders_without_a_class_token_give_what_they_give(arch: str) -> None:
    encoder, width = made(arch)
    assert dino_features(encoder, width) == (encoder, "encoder output")


def test_one_that_has_a_class_token_and_gives_the_mean_of_its_patches_gives_that() -> None:
    encoder, width = made("timm:eva02_tiny_patch14_224", patch_size=8)
    assert dino_features(encoder, width) == (encoder, "encoder output")
