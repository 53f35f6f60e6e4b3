"""Weights out: what a person types to load each, in the library it is for, gives the encoder's features."""

import importlib.util
import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.encoders import photographs, relative, smooth_pictures, source, unlike_fresh

from fasttrain.networks.options import EncoderOptions, VisionTransformerOptions
from fasttrain.system.errors import UserError
from fasttrain.weights import timm_folder
from fasttrain.weights.exported import Source
from fasttrain.weights.formats import FORMATS

LEARNED = VisionTransformerOptions(vit_positions="learned", vit_heads=12)


def typed(told: dict[str, Any], folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is defined after the lines that travel with a file are typed where it lies."""
    monkeypatch.chdir(folder)
    defined: dict[str, Any] = {}
    exec("\n".join([*told["load"], *told["transform"], f"def features(pixels): return {told['features']}"]), defined)
    return defined


def need(to: str) -> None:
    for package in FORMATS[to].packages:
        pytest.importorskip(package)


@torch.no_grad()
def check(to: str, exported: Source, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write, type, compare; returns what was typed."""
    told = json.loads(json.dumps(FORMATS[to].write(exported, folder / "out")))
    defined = typed(told, folder, monkeypatch)
    for images in (3, 1):
        pixels = torch.stack([defined["transform"](image) for image in photographs(images)])
        assert relative(exported.encoder(pixels), torch.as_tensor(defined["features"](pixels))) < 1e-5
    return defined


@pytest.mark.parametrize(
    ("to", "arch", "options"),
    [
        ("torchvision", "resnet18", {}),
        ("torchvision", "resnet18", {"cifar_stem": True}),
        ("torchvision", "vit_tiny", {}),
        ("torchvision", "vit_tiny", {"vit": LEARNED}),
        ("torchvision", "shufflenet_v2_x0_5", {}),
        ("torchvision", "convnext_tiny", {}),
        ("torchvision", "mnasnet0_5", {}),
        ("timm", "resnet50", {}),
        ("timm", "vit_tiny", {}),
        ("timm", "vit_tiny", {"vit": LEARNED}),
        ("safetensors", "resnet18", {}),
        ("safetensors", "vit_tiny", {}),
        ("onnx", "small", {}),
        ("onnx", "resnet18", {"cifar_stem": True}),
        pytest.param("onnx", "vit_tiny", {}, marks=pytest.mark.slow),
        ("hf", "resnet18", {}),
        ("hf", "vit_tiny", {}),
    ],
)
def test_what_is_typed_gives_the_features(
    to: str, arch: str, options: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(to)
    check(to, source(arch, **options), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
@pytest.mark.parametrize("to", ["timm", "hf"])
def test_encoders_of_timm_go_out_as_they_are(
    to: str, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(to)
    import timm

    sized = {"img_size": 32, "patch_size": 8, "dynamic_img_size": True} if name.startswith("vit") else {}
    encoder = unlike_fresh(timm.create_model(name, num_classes=0, drop_path_rate=0.1, **sized))
    made = Source(encoder, EncoderOptions(arch=f"timm:{name}"), source("small").preprocessing)
    check(to, made, tmp_path, monkeypatch)


@pytest.mark.parametrize(("to", "levels"), [("torchvision", 1e-3), ("timm", 2.0), ("hf", 2.0)])
@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (96, 0.875)])
def test_the_preparation_that_travels_beside_it_shows_what_the_encoder_was_shown(
    to: str, levels: float, size: int, crop: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(to)
    from fasttrain.kernels.augment import augment
    from fasttrain.views.draw import center

    exported = source("resnet18", size, crop)
    prepare = check(to, exported, tmp_path, monkeypatch)["transform"]
    mean, std = exported.preprocessing.mean, exported.preprocessing.std
    for picture in smooth_pictures():
        pixels = torch.from_numpy(np.array(picture)).flatten()
        height_B, width_B = (torch.tensor([side], dtype=torch.int32) for side in (picture.height, picture.width))
        table = center(height_B, width_B, crop)
        (own,) = augment(pixels, torch.zeros(1, dtype=torch.int64), height_B, width_B, table, (size,), mean, std)
        apart = (prepare(picture) - own[0, 0]).abs() * 255 * torch.tensor(std)[:, None, None]
        assert float(apart.mean()) < levels


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_the_typed_preparation_shows_pictures_of_any_mode_as_they_were_loaded(mode: str) -> None:
    prepare, picture = source("small").preprocessing, smooth_pictures(1)[0]
    if mode == "I;16":
        picture = Image.fromarray(np.array(picture.convert("L")).astype(np.uint16) * 256)
    else:
        picture.putalpha(picture.getchannel("G"))
        picture = picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
    defined: dict[str, Any] = {}
    exec("\n".join(prepare.lines()), defined)
    torch.testing.assert_close(defined["transform"](picture), prepare.transform()(picture))


def test_safetensors_say_what_they_are(tmp_path: pathlib.Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    exported = source("small")
    FORMATS["safetensors"].write(exported, tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["arch"] == "small"
        assert json.loads(file.metadata()["preprocessing"])["mean"] == [0.47, 0.45, 0.4]
        assert set(file.keys()) == set(exported.encoder.state_dict())
    other = tmp_path / "other"
    other.touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == other.stat().st_mode, "as others may read any file"


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_detectron2_gets_mocos_pickle(arch: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported, path = source(arch), tmp_path / "out.pkl"
    told = FORMATS["detectron2"].write(exported, path)["config"]
    assert told["INPUT.FORMAT"] == "RGB"
    assert told["MODEL.PIXEL_MEAN"] == [255 * value for value in exported.preprocessing.mean]
    assert b"numpy._core" not in path.read_bytes(), "which NumPy has only since 2.0"
    content = pickle.loads(path.read_bytes())
    assert content["matching_heuristics"] is True
    assert len(content["model"]) == len(exported.encoder.state_dict())
    loaded = FORMATS["detectron2"].load(exported, path)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32)
        assert relative(exported.encoder(pixels), loaded.features(pixels)) < 1e-5
    if not importlib.util.find_spec("detectron2"):
        assert "detectron2 is not installed here" in capsys.readouterr().err
        assert loaded.by == "names mapped back, without detectron2"


@pytest.mark.parametrize("left", ["conv1.weight", "layer1.0.downsample.1.running_var", "layer4.2.bn3.bias"])
def test_a_tensor_that_is_missing_is_an_error(left: str, tmp_path: pathlib.Path) -> None:
    exported, path = source("resnet50"), tmp_path / "out.pkl"
    kept = {name: tensor for name, tensor in exported.encoder.state_dict().items() if name != left}
    exported.encoder.state_dict = lambda: kept  # type: ignore[method-assign, assignment]
    for to in ("torchvision", "detectron2"):
        FORMATS[to].write(exported, path)
        with pytest.raises(RuntimeError):
            FORMATS[to].load(exported, path)


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_timms_readers_are_held_to_every_tensor(
    to: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(to)
    exported, right = source("vit_tiny"), timm_folder.timm_name
    wrong = {"norm.bias": "norm_bias"}
    monkeypatch.setattr(timm_folder, "timm_name", lambda name: wrong.get(right(name), right(name)))
    FORMATS[to].write(exported, tmp_path / "out")
    with pytest.raises(RuntimeError):
        FORMATS[to].load(exported, tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "arch", "stem", "others"),
    [
        ("torchvision", "small", False, "safetensors and onnx can"),
        ("timm", "small", False, "safetensors and onnx can"),
        ("timm", "resnet18", True, "torchvision, safetensors and onnx can"),
        ("timm", "timm:resnet18", True, "safetensors and onnx can"),
        ("hf", "shufflenet_v2_x0_5", False, "torchvision, safetensors and onnx can"),
        ("detectron2", "resnet18", True, "safetensors and onnx can"),
        ("detectron2", "vit_tiny", False, "safetensors and onnx can"),
    ],
)
def test_an_encoder_that_a_library_lacks_is_refused_with_what_can_take_it(
    to: str, arch: str, stem: bool, others: str, tmp_path: pathlib.Path
) -> None:
    need(to)
    with pytest.raises(UserError, match=rf"--to {to} can't take --arch {arch}.*: .*; {others}$"):
        FORMATS[to].write(source(arch, cifar_stem=stem), tmp_path / "out.pkl")


def test_detectron2_knows_a_pickle_by_its_name(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"must end in \.pkl"):
        FORMATS["detectron2"].write(source("resnet18"), tmp_path / "out.pth")
