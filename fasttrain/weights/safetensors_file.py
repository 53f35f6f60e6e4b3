"""safetensors: an encoder's tensors under its own names, with what is to know of it in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttrain.networks.encoders import make_encoder
from fasttrain.weights.exported import Loaded, Source
from fasttrain.weights.torchvision_file import recipe


def write(source: Source, path: Path) -> dict[str, Any]:
    from safetensors.torch import save

    # Each on its own: the format has no tensors that share memory.
    tensors = {name: tensor.contiguous().clone() for name, tensor in source.encoder.state_dict().items()}
    about = {"arch": source.options.arch, "preprocessing": json.dumps(source.preprocessing.as_json())}
    path.write_bytes(save(tensors, {"format": "pt", **about}))  # its own files are for their owner alone
    read = ["import safetensors.torch", f"tensors = safetensors.torch.load_file({path.name!r})"]
    told: dict[str, Any] = {}
    if made := recipe(source):
        read += ["import torch, torchvision", *made.lines(), "model.load_state_dict(tensors)", "model.eval()"]
        told["features"] = "model(pixels)"
    return {"load": read, **told, "transform": source.preprocessing.lines()}


def load(source: Source, path: Path) -> Loaded:
    import safetensors
    from safetensors.torch import load_file

    encoder, _ = make_encoder(source.options, source.preprocessing.size)
    encoder.load_state_dict(load_file(path))
    by = f"safetensors {safetensors.__version__}"
    return Loaded(encoder.eval(), source.preprocessing.transform(), by)
