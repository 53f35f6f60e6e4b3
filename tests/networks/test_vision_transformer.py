"""Vision transformers: torchvision's function under torchvision's names, for views of several sizes."""

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fasttrain.engine.optim import make_optimizer
from fasttrain.engine.options import OptimisationOptions
from fasttrain.networks.encoders import feature_width, make_encoder
from fasttrain.networks.momentum import ema_update, momentum_copy
from fasttrain.networks.options import EncoderOptions, VisionTransformerOptions, is_vision_transformer
from fasttrain.networks.recompute import checkpoint_activations
from fasttrain.networks.vision_transformer import (
    drop_paths,
    fixed_positions,
    freeze_patches,
)
from fasttrain.system.errors import UserError


def options_of(arch: str, patch_size: int = 0, **options: Any) -> EncoderOptions:
    return EncoderOptions(arch=arch, patch_size=patch_size, vit=VisionTransformerOptions(**options))


def tiny(size: int = 32, **options: Any) -> Any:
    torch.manual_seed(0)
    return make_encoder(options_of("vit_tiny", **options), size)[0]


def views(size: int = 32, count: int = 4) -> Tensor:
    values = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return values.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "heads", "patch"),
    [({}, 3, 4), ({"vit_positions": "learned"}, 3, 4), ({"vit_heads": 12, "patch_size": 8}, 12, 8)],
)
def test_values_gradients_and_state_names_are_those_of_torchvision_s_network(
    options: dict[str, Any], heads: int, patch: int
) -> None:
    ours = tiny(**options).double()
    theirs = torchvision.models.VisionTransformer(32, patch, 12, heads, 192, 768).double()
    theirs.heads = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    outputs = [network(views().double()) for network in (ours, theirs)]
    assert outputs[0].shape == (4, 192)
    assert torch.allclose(*outputs, rtol=1e-10)
    for output in outputs:
        (output * torch.linspace(-1, 1, 192)).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-12), name
    assert torch.allclose(ours.eval()(views().double()), outputs[1], rtol=1e-10)


def test_they_have_as_many_parameters_as_the_published_ones() -> None:
    """torchvision's ViT-B/16 less its classifier; 21.6 M of ViT-S."""
    counts = {}
    for arch, positions in (("vit_base", "learned"), ("vit_small", "fixed")):
        with torch.device("meta"):
            encoder, width = make_encoder(options_of(arch, vit_positions=positions), 224)
        counts[arch] = width, sum(p.numel() for p in encoder.parameters())
    published = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta["num_params"]
    assert counts == {"vit_base": (768, published - 769 * 1000), "vit_small": (384, 21_590_016)}


@pytest.mark.parametrize(("size", "patch"), [(28, 4), (32, 4), (64, 8), (96, 16), (224, 16)])
def test_patches_go_by_the_size(size: int, patch: int) -> None:
    assert tiny(size).patch_size == patch


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_views_of_other_sizes_give_features(positions: str) -> None:
    encoder = tiny(56, vit_positions=positions)
    assert feature_width(encoder, "vit_tiny", 24) == 192
    assert feature_width(encoder, "vit_tiny", 64) == 192
    assert encoder(torch.randn(2, 3, 24, 40)).shape == (2, 192)
    with pytest.raises(UserError, match=r"^--arch vit_tiny can't take views of 42 px: .* patches of 8 px [^\n]*$"):
        feature_width(encoder, "vit_tiny", 42)


@pytest.mark.parametrize(
    ("arch", "size", "options", "message"),
    [
        ("vit_tiny", 97, {}, "^--arch vit_tiny .* 97 px: its patches of 16 px don't divide .*; 96 or 112 px would do$"),
        ("vit_tiny", 2, {}, "can't take views of 2 px.*; 4 px would do"),
        ("vit_tiny", 32, {"vit_heads": 5}, "--vit-heads 5 does not divide the width of --arch vit_tiny, 192"),
        ("resnet18", 32, {"vit_heads": 6}, "--vit-heads 6 is not for --arch resnet18: encoders"),
        ("vit_b_16", 224, {"vit_heads": 12, "patch_size": 8}, "--patch-size 8 is not for --arch vit_b_16: encoders"),
        ("vit_smal", 32, {}, "unknown --arch 'vit_smal': .*vit_small"),
    ],
)
def test_what_can_not_be_is_a_clear_error(arch: str, size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_encoder(options_of(arch, **options), size)


def test_vision_transformers_are_told_by_name() -> None:
    names = ["vit_tiny", "vit_small", "vit_base", "vit_b_16", "vit_h_14"]
    assert all(map(is_vision_transformer, names))
    assert not any(map(is_vision_transformer, ["small", "resnet50", "swin_t", "convnext_tiny"]))


def test_fixed_positions_are_sines_and_cosines_of_column_and_row() -> None:
    found = fixed_positions(8, (2, 2), 2)[0]
    wave = {0: [0, 0, 1, 1], 1: [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]}  # 10000^0, 10000^(-1/2)
    expected = [[0.0] * 8, *([*wave[column], *wave[row]] for row in (0, 1) for column in (0, 1))]
    assert torch.allclose(found, torch.tensor(expected))
    large = fixed_positions(192, (14, 14), 14)[0]
    assert torch.equal(large[0], torch.zeros(192))
    sin_w, cos_w, sin_h, cos_h = large[1:].chunk(4, 1)
    for sin, cos in ((sin_w, cos_w), (sin_h, cos_h)):
        assert torch.allclose(sin**2 + cos**2, torch.ones(196, 48))


def test_fixed_positions_of_another_size_cover_the_same_field() -> None:
    """As bilinear interpolation of the coordinates, wherever that does not leave the grid's middle points."""
    found = fixed_positions(8, (6, 4), 14)[0, 1:]
    for places, channel, count in ((found.view(6, 4, 8)[:, 0], 4, 6), (found.view(6, 4, 8)[0], 0, 4)):
        coordinates = F.interpolate(torch.arange(14.0)[None, None], count, mode="linear")[0, 0]
        assert torch.allclose(places[:, channel], coordinates.sin(), atol=1e-5)
        assert torch.allclose(places[:, channel + 1], (0.01 * coordinates).sin(), atol=1e-5)


def test_fixed_positions_take_no_gradient_and_learned_ones_do_at_every_size() -> None:
    assert "encoder.pos_embedding" not in dict(tiny().named_parameters())
    encoder = tiny(vit_positions="learned")
    encoder(views(16)).square().sum().backward()
    assert (encoder.encoder.pos_embedding.grad.abs().sum(2) > 0).all()


def test_learned_positions_of_another_size_are_interpolated() -> None:
    encoder = tiny(vit_positions="learned")
    positions = encoder.encoder.pos_embedding.data
    assert torch.equal(encoder._positions(8, 8), positions)
    ramp = torch.arange(8.0)
    positions[0, 1:] = (100 * ramp[:, None] + ramp).reshape(64, 1)
    found = encoder._positions(4, 4)[0, 1:, 0].view(4, 4)
    place = 2 * torch.arange(4.0) + 0.5
    middle = slice(1, 3)  # bicubic is exact for a ramp, away from its ends
    assert torch.allclose(found[middle, middle], (100 * place[:, None] + place)[middle, middle])
    assert torch.equal(encoder._positions(4, 4)[0, 0], positions[0, 0])


def test_weights_are_drawn_as_in_moco_v3() -> None:
    encoder = tiny(224, vit_positions="learned")
    block = encoder.encoder.layers[3]
    drawn = {
        math.sqrt(6 / (3 * 16**2 + 192)): [encoder.conv_proj.weight],
        math.sqrt(6 / (192 + 192)): [
            *block.self_attention.in_proj_weight.chunk(3),
            block.self_attention.out_proj.weight,
        ],
        math.sqrt(6 / (192 + 768)): [block.mlp[0].weight, block.mlp[3].weight],
    }
    for bound, weights in drawn.items():
        for weight in weights:
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    biases = [p for name, p in encoder.named_parameters() if name.endswith("bias")]
    assert len(biases) == 12 * 6 + 2
    assert not any(bias.any() for bias in biases)
    assert 0 < encoder.class_token.abs().max() < 1e-5
    assert encoder.encoder.pos_embedding.std().item() == pytest.approx(0.02, rel=0.02)


def test_frozen_patches_are_moved_neither_by_the_optimizer_nor_by_momentum() -> None:
    encoder = tiny()
    freeze_patches(encoder)
    average = momentum_copy(encoder)
    drawn = [p.clone() for p in encoder.conv_proj.parameters()]
    before = encoder.class_token.clone()
    optimizer = make_optimizer(OptimisationOptions(optimizer="adamw", lr=0.1, weight_decay=0.1, decay="all"), encoder)
    encoder(views()).square().sum().backward()
    optimizer.step()
    ema_update(average, encoder, 0.5)
    for network in (encoder, average):
        assert all(torch.equal(a, b) for a, b in zip(network.conv_proj.parameters(), drawn, strict=True))
        assert not torch.equal(network.class_token, before)
    other, _ = make_encoder(EncoderOptions(arch="small"), 32)
    freeze_patches(other)
    assert all(p.requires_grad for p in other.parameters())


def test_paths_are_dropped_in_training_alone_and_never_in_momentum_copies() -> None:
    encoder = tiny()
    names = list(encoder.state_dict())
    copied_before = momentum_copy(encoder)
    expected = encoder(views())
    drop_paths(encoder, 0.5)
    copied_after = momentum_copy(encoder)
    drop_paths(copied_after, 0.0)
    assert list(encoder.state_dict()) == names
    assert not torch.allclose(encoder(views()), expected, atol=1e-3)
    for network in (copied_before, copied_after, encoder.eval()):
        assert torch.equal(network(views()), expected)


def test_chances_grow_linearly_over_the_blocks_and_whole_branches_are_dropped() -> None:
    encoder = tiny()
    drop_paths(encoder, 0.22)
    blocks = list(encoder.encoder.layers)
    assert [block.dropout.p for block in blocks] == pytest.approx([0.02 * i for i in range(12)])
    drop_paths(encoder, 1.0)
    x = torch.randn(2, 5, 192)
    assert torch.equal(blocks[11](x), x[:, :1])
    assert not torch.allclose(blocks[0](x), x)


def test_paths_that_a_network_drops_of_itself_take_the_rate() -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="efficientnet_b0"), 32)
    drop_paths(encoder, 0.3)
    rates = [module.p for module in encoder.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)])


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_recomputed_activations_give_the_same_gradients(positions: str) -> None:
    """To the bit, with dropped paths, and for two sizes in one step."""
    found = []
    for recompute in (False, True):
        encoder = tiny(vit_positions=positions)
        drop_paths(encoder, 0.3)
        if recompute:
            checkpoint_activations(encoder)
        torch.manual_seed(2)
        (encoder(views()).sum() + encoder(views(16)).square().sum()).backward()
        found.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_in_training_is_torch_s_fused_one_in_the_precision_of_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, seen = F.scaled_dot_product_attention, []

    def recorded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query.dtype, query.shape[2], key.shape[2]))
        return fused(query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny()(views())
    assert seen[-12:] == [(torch.bfloat16, 65, 65)] * 11 + [(torch.bfloat16, 1, 65)]
    assert out.dtype == torch.float32
    assert torch.allclose(out, tiny()(views()), atol=0.2)


@pytest.mark.parametrize("positions", ["fixed", "learned"])
def test_it_is_one_graph_for_a_compiler_at_each_size(positions: str) -> None:
    encoder = tiny(vit_positions=positions)
    drop_paths(encoder, 0.3)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend="eager")
    for size in (32, 16):
        found = []
        for network in (encoder, compiled):
            torch.manual_seed(2)
            found.append(network(views(size)))
        assert torch.equal(*found)
