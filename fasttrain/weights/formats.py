"""The formats that weights go out in, by name."""

from __future__ import annotations

from fasttrain.weights import detectron2_file, onnx_file, safetensors_file, timm_folder, torchvision_file
from fasttrain.weights.exported import Format

FORMATS = {
    "torchvision": Format((), False, torchvision_file.write, torchvision_file.load),
    "timm": Format(("timm", "safetensors"), True, timm_folder.write_timm, timm_folder.load_timm),
    "safetensors": Format(("safetensors",), False, safetensors_file.write, safetensors_file.load),
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), False, onnx_file.write, onnx_file.load),
    "detectron2": Format((), False, detectron2_file.write, detectron2_file.load),
    "hf": Format(("transformers", "timm", "safetensors"), True, timm_folder.write_hf, timm_folder.load_hf),
}
