"""Checkpoints in the layouts of the projects that write them: an encoder initialised from one gives equal features."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions, VisionTransformerOptions
from fasttrain.system.errors import UserError
from fasttrain.weights.fit import Fit, fit
from fasttrain.weights.read import read_file

SIZE = 32


def random(network: nn.Module) -> nn.Module:
    """With weights and statistics that no constructor gives."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("pos_embed"):
                spread = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(spread + 0.5 if "var" in name or tensor.dim() == 1 else (spread - 0.5) / 5)
    return network.eval()


def resnet(fc: nn.Module | None = None) -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = fc or nn.Linear(512, 128)  # type: ignore[assignment]
    return random(network)


def prefixed(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def others(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    """Of the same network with other weights, such as an average's."""
    return {name: tensor + 1 for name, tensor in prefixed(prefix, network).items()}


def mlp() -> nn.Sequential:
    """MoCo v3's and SimSiam's heads in the place of a classifier."""
    return nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32, bias=False))


def training(epoch: int, network: dict[str, Tensor], name: str = "state_dict") -> dict[str, Any]:
    """What a training script saves beside the network."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return {"epoch": epoch, "arch": "resnet18", name: network, "optimizer": optimizer.state_dict()}


def moco(version: int) -> dict[str, Any]:
    heads = [
        nn.Linear(512, 128) if version == 1 else nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    ]
    query, key = resnet(heads[0]), resnet(heads[0])
    queue = {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return training(200, {**prefixed("module.encoder_q.", query), **others("module.encoder_k.", key), **queue})


def mocov3() -> dict[str, Any]:
    both = {**prefixed("module.base_encoder.", resnet(mlp())), **others("module.momentum_encoder.", resnet(mlp()))}
    return {**training(300, {**both, **prefixed("module.predictor.", mlp())}), "scaler": {"scale": 65536.0}}


def swav() -> dict[str, Any]:
    network = resnet(nn.Identity())
    head = {"module.projection_head.0.weight": torch.randn(4, 512), "module.prototypes.weight": torch.randn(9, 4)}
    return {**training(800, {**prefixed("module.", network), **head}), "amp": {"loss_scaler0": {"loss_scale": 1.0}}}


def simsiam() -> dict[str, Any]:
    return training(100, {**prefixed("module.encoder.", resnet(mlp())), **prefixed("module.predictor.", mlp())})


def dino() -> dict[str, Any]:
    def wrapped(network: nn.Module) -> dict[str, Tensor]:
        return {**prefixed("module.backbone.", network), "module.head.last_layer.weight_g": torch.ones(9, 1)}

    student = {name: tensor + 1 for name, tensor in wrapped(resnet(nn.Identity())).items()}
    args = argparse.Namespace(arch="resnet18", lr=0.03, output_dir="out", use_fp16=True)
    loss = {"center": torch.zeros(1, 9)}
    return {
        **training(5, student, "student"),
        "teacher": wrapped(resnet(nn.Identity())),
        "args": args,
        "dino_loss": loss,
    }


def solo_learn() -> dict[str, Any]:
    both = {**prefixed("backbone.", resnet(nn.Identity())), **others("momentum_backbone.", resnet(nn.Linear(512, 3)))}
    return {"state_dict": {**both, "classifier.weight": torch.ones(10, 512)}, "global_step": 3, "loops": {}}


def lightly() -> dict[str, Any]:
    children = nn.Sequential(*list(resnet().children())[:-1])
    heads = prefixed("projection_head.layers.", mlp())
    return {"state_dict": {**prefixed("backbone.", children), **heads}}


def compiled() -> dict[str, Any]:
    return {"model": prefixed("_orig_mod.module.", resnet()), "best": np.float64(71.3), "step": np.int64(9)}


def with_averages() -> dict[str, Any]:
    """As timm's script saves: the averages are what it evaluates."""
    trained = {name: tensor + 1 for name, tensor in resnet().state_dict().items()}
    return {**training(9, trained), "state_dict_ema": resnet().state_dict()}


def old() -> dict[str, Tensor]:
    """A file from before batch norm counted its batches."""
    return {name: tensor for name, tensor in resnet().state_dict().items() if not name.endswith("num_batches_tracked")}


RESNETS: dict[str, Callable[[], dict[str, Any]]] = {
    "MoCo v1": lambda: moco(1), "MoCo v2": lambda: moco(2), "MoCo v3": mocov3, "SwAV": swav,
    "SwAV, released": lambda: prefixed("module.", resnet()), "SimSiam": simsiam, "DINO": dino,
    "DINO, backbone only": lambda: resnet(nn.Identity()).state_dict(), "solo-learn": solo_learn,
    "solo-learn, older": lambda: {"state_dict": prefixed("encoder.", resnet())}, "lightly": lightly,
    "torchvision": lambda: resnet(nn.Linear(512, 1000)).state_dict(), "compiled": compiled, "timm": with_averages,
    "old": old,
}  # fmt: skip


def from_file(folder: pathlib.Path, content: object, encoder: nn.Module, **options: Any) -> Fit:
    """The encoder initialised with what fits of a file that holds the content."""
    torch.save(content, folder / "weights.pth", **options)
    fitted = fit(encoder, read_file(folder / "weights.pth").tensors)
    encoder.load_state_dict(fitted.taken, strict=False)
    encoder.eval()
    return fitted


def same_features(one: nn.Module, other: nn.Module, size: int = SIZE) -> None:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(one(images), other(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize("name", RESNETS)
def test_an_encoder_from_a_checkpoint_of_a_project_gives_the_features_of_the_network_there(
    name: str, legacy: bool, tmp_path: pathlib.Path
) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    fitted = from_file(tmp_path, RESNETS[name](), encoder, _use_new_zipfile_serialization=not legacy)
    assert fitted.whole, fitted.line(name)
    assert len(fitted.taken) == fitted.of == 100
    same_features(encoder, resnet(nn.Identity()))


def timm_vit(heads: int, size: int = SIZE, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm.VisionTransformer(
        img_size=size, patch_size=16, embed_dim=384, depth=12, num_heads=heads, num_classes=0, **options
    )


def our_vit(heads: int, size: int = SIZE, positions: str = "learned") -> nn.Module:
    vit = VisionTransformerOptions(vit_heads=heads, vit_positions=positions)  # type: ignore[arg-type]
    return make_encoder(EncoderOptions(arch="vit_small", patch_size=16, vit=vit), size)[0]


VITS: dict[str, tuple[int, Callable[[nn.Module], Any]]] = {
    "MoCo v3": (
        12,
        lambda network: {
            "state_dict": {
                **prefixed("module.base_encoder.", network), **others("module.momentum_encoder.", network),
                "module.base_encoder.head.0.weight": torch.ones(8, 384),
            }
        },
    ),
    "DINO": (6, lambda network: {"student": others("module.backbone.", network),
                                 "teacher": prefixed("backbone.", network)}),
    "DINO, backbone only": (6, lambda network: network.state_dict()),
    "solo-learn": (6, lambda network: {"state_dict": prefixed("backbone.", network)}),
}  # fmt: skip


@pytest.mark.parametrize("name", VITS)
def test_a_vision_transformer_in_timms_names_gives_its_features_under_torchvisions(
    name: str, tmp_path: pathlib.Path
) -> None:
    heads, layout = VITS[name]
    network = random(timm_vit(heads))
    with torch.no_grad():
        network.pos_embed.normal_()  # type: ignore[union-attr,operator]
    encoder = our_vit(heads)
    assert from_file(tmp_path, layout(network), encoder).whole
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), network(images), rtol=1e-4, atol=1e-5)


def test_our_vision_transformer_gives_its_features_in_timms_network(tmp_path: pathlib.Path) -> None:
    ours, network = random(our_vit(6)), timm_vit(6)
    assert from_file(tmp_path, ours.state_dict(), network).whole
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(network(images), ours(images), rtol=1e-4, atol=1e-5)


def test_moco_v3s_transformer_with_other_heads_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"12 heads, this encoder's 6 \(see --vit-heads\)"):
        from_file(tmp_path, VITS["MoCo v3"][1](timm_vit(12)), our_vit(6))


def test_positions_of_another_size_are_interpolated_as_for_views_of_that_size(tmp_path: pathlib.Path) -> None:
    source, encoder = random(our_vit(6, 64)), our_vit(6, 96)
    fitted = from_file(tmp_path, source.state_dict(), encoder)
    assert fitted.whole
    assert "positions of 17 tokens interpolated to 37" in fitted.line("f")
    same_features(encoder, source, 96)


def test_fixed_positions_are_taken_only_where_they_are_the_same_formula(tmp_path: pathlib.Path) -> None:
    encoder = our_vit(6, 64, "fixed")
    assert from_file(
        tmp_path,
        random(our_vit(6, 96, "fixed")).state_dict()
        | {"encoder.pos_embedding": our_vit(6, 96, "fixed").state_dict()["encoder.pos_embedding"]},
        encoder,
    ).whole
    fitted = from_file(tmp_path, our_vit(6, 64, "learned").state_dict(), encoder)
    assert list(fitted.not_taken) == ["encoder.pos_embedding"]
    assert "--vit-positions learned" in fitted.line("f")


def test_dinov2s_official_names_go_through_timms_own_conversion(tmp_path: pathlib.Path) -> None:
    timm = pytest.importorskip("timm")
    source = random(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56))
    released = {**source.state_dict(), "mask_token": torch.zeros(1, 384)}
    encoder = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56)
    assert from_file(tmp_path, released, encoder).whole
    same_features(encoder, source, 56)
    smaller = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28)
    fitted = from_file(tmp_path, released, smaller)
    assert fitted.whole
    assert "positions of 17 tokens interpolated to 5" in fitted.line("F")


def test_patches_that_timm_resizes_are_told(tmp_path: pathlib.Path) -> None:
    timm = pytest.importorskip("timm")
    released, encoder = (
        timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, patch_size=side) for side in (16, 8)
    )
    fitted = from_file(tmp_path, random(released).state_dict(), encoder)
    assert fitted.whole
    assert "patch_embed.proj.weight converted by timm from 192×3×16×16 to 192×3×8×8" in fitted.line("F")


def test_a_transformer_with_more_in_its_blocks_is_another_one(tmp_path: pathlib.Path) -> None:
    fitted = from_file(tmp_path, random(timm_vit(6, init_values=1.0)).state_dict(), our_vit(6))
    assert not fitted.not_taken
    assert not fitted.whole
    assert "the network there is another one, with more: blocks.0.ls1.gamma" in fitted.line("f")


def test_a_deeper_network_of_the_same_family_is_another_one(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet50"), SIZE)
    fitted = from_file(tmp_path, torchvision.models.resnet101().state_dict(), encoder)
    assert len(fitted.taken) == fitted.of
    assert not fitted.whole
    assert "layer3.6.conv1.weight" in fitted.line("f")


def test_what_does_not_fit_is_named_with_its_shapes_and_what_is_left_over_is_named(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18", cifar_stem=True), SIZE)
    fitted = from_file(tmp_path, resnet().state_dict(), encoder)
    assert fitted.line("F") == (
        "--init F: 99 of 100 tensors of the encoder taken; not taken: conv1.weight (64×3×7×7 there, 64×3×3×3 here); "
        "left over there: fc.weight, fc.bias"
    )


def test_long_lists_are_cut_with_their_count(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    part = {name: tensor for name, tensor in resnet().state_dict().items() if name.startswith(("conv1", "layer1"))}
    line = from_file(tmp_path, part, encoder).line("F")
    assert "21 of 100" in line
    assert "… (79 in all)" in line


def test_values_that_are_not_finite_are_not_taken(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    state = resnet().state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    assert from_file(tmp_path, state, encoder).not_taken == {"layer1.0.conv1.weight": "not finite there"}


def test_half_precision_is_taken_and_numbers_of_a_byte_are_not(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    state = {n: t.half() if t.is_floating_point() else t for n, t in resnet(nn.Identity()).state_dict().items()}
    state["conv1.weight"] = (state["conv1.weight"] * 100).to(torch.int8)
    state["bn1.weight"] = state["bn1.weight"].to(torch.float8_e4m3fn)
    assert from_file(tmp_path, state, encoder).not_taken == {
        "conv1.weight": "int8 there", "bn1.weight": "float8_e4m3fn there"
    }  # fmt: skip


def test_a_file_of_something_else_says_what_is_in_it(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    with pytest.raises(UserError, match=r"none of the encoder's 100 tensors, such as conv1.weight.*it has a.b, c"):
        from_file(tmp_path, {"a": {"b": torch.ones(3)}, "c": torch.ones(1)}, encoder)
    with pytest.raises(UserError, match="no tensors"):
        from_file(tmp_path, {"epoch": 3}, encoder)


def test_of_several_networks_that_fit_alike_none_is_guessed(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    one = resnet().state_dict()
    other = {name: tensor + 1 for name, tensor in one.items()}
    with pytest.raises(UserError, match=r"several networks that fit alike: left\., right\."):
        from_file(tmp_path, {"left": one, "right": other}, encoder)
    assert from_file(
        tmp_path, {"left": one, "right": {name: tensor.clone() for name, tensor in one.items()}}, encoder
    ).whole


def test_densenets_old_names_are_known(tmp_path: pathlib.Path) -> None:
    import re

    network = random(torchvision.models.densenet121(num_classes=3))
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", n): t for n, t in network.state_dict().items()}
    assert any("norm.1.weight" in name for name in old)
    encoder, _ = make_encoder(EncoderOptions(arch="densenet121"), SIZE)
    assert from_file(tmp_path, old, encoder).whole


def test_the_line_tells_which_network_was_taken(tmp_path: pathlib.Path) -> None:
    encoder, _ = make_encoder(EncoderOptions(arch="resnet18"), SIZE)
    line = from_file(tmp_path, moco(1), encoder).line("F")
    assert line == (
        "--init F: 100 of 100 tensors of the encoder taken; left over there: fc.weight, fc.bias; "
        "124 more tensors there outside of state_dict.module.encoder_q"
    )
