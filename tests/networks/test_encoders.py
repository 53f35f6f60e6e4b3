"""Encoders by name."""

import pytest
import torch

from fasttrain.networks.encoders import make_encoder, zero_init_residual
from fasttrain.networks.options import EncoderOptions
from fasttrain.system.errors import UserError


@pytest.mark.parametrize(
    ("arch", "size", "width"),
    [("small", 32, 256), ("resnet18", 64, 512), ("mobilenet_v3_small", 64, 576), ("vit_b_16", 224, 768)],
)
def test_encoder_gives_features_of_the_stated_width(arch: str, size: int, width: int) -> None:
    encoder, found = make_encoder(EncoderOptions(arch=arch), size)
    assert found == width
    assert encoder.training
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, width)


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder, width = make_encoder(EncoderOptions(arch="resnet18", cifar_stem=True), 32)
    assert width == 512
    assert encoder.layer1(encoder.conv1(torch.randn(1, 3, 32, 32))).shape[-1] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5", 32, False), "unknown --arch 'resnet5'.*resnet50"),
        (("fasterrcnn_resnet50_fpn", 64, False), "unknown --arch"),
        (("small", 32, True), "--cifar-stem is for ResNets .*'small'"),
        (("vit_b_16", 100, False), "can't take views of 100 px.*; 96 or 112 px would do$"),
    ],
)
def test_what_can_not_be_is_a_clear_error(arguments: tuple[str, int, bool], message: str) -> None:
    arch, size, cifar_stem = arguments
    with pytest.raises(UserError, match=message):
        make_encoder(EncoderOptions(arch=arch, cifar_stem=cifar_stem), size)


@pytest.mark.parametrize(("arch", "last", "blocks"), [("resnet18", "bn2", 8), ("resnet50", "bn3", 16)])
def test_zero_init_residual_makes_every_block_of_a_resnet_its_shortcut(arch: str, last: str, blocks: int) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch=arch), 32)
    zero_init_residual(encoder.eval())
    found = [block for block in encoder.modules() if hasattr(block, last)]
    assert len(found) == blocks
    for block in found:
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.allclose(block(x.clone()), shortcut.relu(), atol=1e-6)


@pytest.mark.parametrize("arch", ["small", "mobilenet_v3_small", "vit_tiny"])
def test_zero_init_residual_leaves_other_encoders_as_they_are(arch: str) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch=arch), 32)
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    zero_init_residual(encoder)
    assert all(torch.equal(value, start[name]) for name, value in encoder.state_dict().items())
