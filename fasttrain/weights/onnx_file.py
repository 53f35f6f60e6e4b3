"""ONNX: an encoder as a graph, of any number of images of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.weights.exported import Loaded, Source

OPSET = 18
INPUT, OUTPUT = "pixels", "features"


def write(source: Source, path: Path) -> dict[str, Any]:
    size = source.preprocessing.size
    program = torch.onnx.export(
        source.encoder,
        (torch.zeros(2, 3, size, size),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None, "by its dynamo path"
    program.save(path, external_data=False)
    lines = ["import onnxruntime", f"session = onnxruntime.InferenceSession({path.name!r})"]
    run = f"session.run(None, {{{INPUT!r}: pixels.numpy()}})[0]"
    shape = ["batch", 3, size, size]
    return {
        "load": lines, "features": run, "opset": OPSET, "input": {"name": INPUT, "shape": shape, "dtype": "float32"},
        "transform": source.preprocessing.lines(),
    }  # fmt: skip


def load(source: Source, path: Path) -> Loaded:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(pixels: Tensor) -> Tensor:
        (found,) = session.run([OUTPUT], {INPUT: pixels.contiguous().numpy()})
        return torch.from_numpy(found)

    return Loaded(features, source.preprocessing.transform(), f"onnxruntime {onnxruntime.__version__}")
