"""timm's folder: its configuration and its tensors. transformers reads the same, as its TimmWrapperModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fasttrain.system.durable import write_json
from fasttrain.weights.exported import Loaded, Source, refused
from fasttrain.weights.names import timm_name
from fasttrain.weights.torchvision_file import recipe

CONFIG, TENSORS = "config.json", "model.safetensors"  # as timm.models.save_for_hf names them
# Of vision transformers, by width; size, patches and heads are said beside it.
_BY_WIDTH = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}


def write_timm(source: Source, path: Path) -> dict[str, Any]:
    _write(source, path, "timm")
    lines = ["import timm", f"model = timm.create_model({f'local-dir:{path.name}'!r}, pretrained=True).eval()"]
    transform = "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))"
    return {"load": lines, "features": "model(pixels)", "transform": [transform]}


def load_timm(source: Source, path: Path) -> Loaded:
    import timm

    model = timm.create_model(f"local-dir:{path}", pretrained=True)
    _check_tensors(model, path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    return Loaded(model.eval(), transform, f"timm {timm.__version__}")


def write_hf(source: Source, path: Path) -> dict[str, Any]:
    _write(source, path, "hf")
    folder = repr(path.name)
    loaded = f"model = transformers.AutoModel.from_pretrained({folder}).eval()"
    processor = f"processor = transformers.AutoImageProcessor.from_pretrained({folder})"
    return {
        "load": ["import transformers", loaded], "features": "model(pixels).pooler_output",
        "transform": [processor, "def transform(image):", "    return processor(image).pixel_values[0]"],
    }  # fmt: skip


def load_hf(source: Source, path: Path) -> Loaded:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModel.from_pretrained(path, output_loading_info=True, local_files_only=True)
    if left := sorted(name for names in report.values() for name in names):
        raise RuntimeError(f"tensors that do not fit: {', '.join(map(str, left))}")
    processor = transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)

    model.eval()
    by = f"transformers {transformers.__version__}"
    return Loaded(lambda pixels: model(pixels).pooler_output, lambda image: processor(image).pixel_values[0], by)


def _write(source: Source, path: Path, to: str) -> None:
    from safetensors.torch import save

    architecture, arguments, tensors = _as_timm(source, to)
    path.mkdir()
    each_own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    (path / TENSORS).write_bytes(save(each_own, {"format": "pt"}))
    write_json(path / CONFIG, _configuration(source, architecture, arguments))


def _as_timm(source: Source, to: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """timm's name of an encoder, its arguments, and its tensors under timm's names. Raises UserError for none."""
    encoder, tensors = source.encoder, source.encoder.state_dict()
    if source.options.arch.startswith("timm:") and not source.options.cifar_stem:
        own: Any = encoder
        return own.pretrained_cfg["architecture"], _arguments(own), tensors
    if recipe(source) is None:
        raise refused(to, source, "timm has no such network")
    if isinstance(encoder, torchvision.models.VisionTransformer):
        if encoder.hidden_dim not in _BY_WIDTH:
            raise refused(to, source, "timm has none of that width", "torchvision, safetensors and onnx")
        arguments = {
            "img_size": encoder.image_size, "patch_size": encoder.patch_size,
            "num_heads": encoder.encoder.layers[0].num_heads,
        }  # fmt: skip
        return _BY_WIDTH[encoder.hidden_dim], arguments, {timm_name(name): each for name, each in tensors.items()}
    if not isinstance(encoder, torchvision.models.ResNet) or source.options.cifar_stem:
        raise refused(to, source, "timm has no such network", "torchvision, safetensors and onnx")
    return source.options.arch, {}, tensors  # under the same names


def _arguments(model: Any) -> dict[str, Any]:  # noqa: ANN401 - timm's module
    """With which timm made a model, but for what only training has, and classes."""
    made = getattr(model, "_model_args", {})
    return {name: value for name, value in made.items() if name != "num_classes" and not name.endswith("_rate")}


def _configuration(source: Source, architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """As timm.models.save_for_hf writes it."""
    import timm

    known: Any = timm.get_pretrained_cfg(architecture)
    size, crop, mean, std = source.preprocessing
    return {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False, "input_size": [3, size, size], "fixed_input_size": known.fixed_input_size,
            "interpolation": "bilinear", "crop_pct": crop, "crop_mode": "center", "mean": mean, "std": std,
            "num_classes": 0, "pool_size": None, "first_conv": known.first_conv, "classifier": known.classifier,
        },
    }  # fmt: skip


def _check_tensors(model: nn.Module, path: Path) -> None:
    """timm loads with holes where it takes a classifier to be missing: have it loaded every tensor, and no other?"""
    from safetensors.torch import load_file

    written, own = load_file(path / TENSORS), model.state_dict()
    if set(written) != set(own) or not all(torch.equal(written[name], own[name]) for name in written):
        raise RuntimeError("timm did not take every tensor")
