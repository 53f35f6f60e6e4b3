"""Names in other libraries: each tensor has one of its own there."""

import pytest
import torchvision

from fasttrain.weights.names import detectron2_name, from_detectron2, timm_name


def test_timm_has_every_tensor_of_a_vision_transformer_under_its_name_and_shape() -> None:
    timm = pytest.importorskip("timm")
    ours = torchvision.models.VisionTransformer(32, 4, 12, 3, 192, 768).state_dict()
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4).state_dict()
    named = {timm_name(name): tensor.shape for name, tensor in ours.items() if not name.startswith("heads.")}
    assert named == {name: tensor.shape for name, tensor in theirs.items() if not name.startswith("head.")}


@pytest.mark.parametrize(
    ("torchvisions", "detectron2s"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv2.weight", "res2.0.conv2.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.running_var", "res3.0.shortcut.norm.running_var"),
    ],
)
def test_detectron2_names_are_those_of_mocos_script(torchvisions: str, detectron2s: str) -> None:
    assert detectron2_name(torchvisions) == detectron2s


def test_detectron2_names_lead_back() -> None:
    names = list(torchvision.models.resnet50().state_dict())
    there = [detectron2_name(name) for name in names]
    assert len({*there}) == len(names)
    assert [from_detectron2(name) for name in there] == names
