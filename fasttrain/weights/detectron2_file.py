"""detectron2's pickle of a ResNet, as MoCo's detection/convert-pretrain-to-detectron2.py writes it."""

from __future__ import annotations

import importlib.util
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from fasttrain.system.errors import UserError, note
from fasttrain.weights.exported import Loaded, Source, refused
from fasttrain.weights.names import detectron2_name, from_detectron2
from fasttrain.weights.torchvision_file import recipe


class _Pickler(pickle.Pickler):
    """Arrays in words that every version of NumPy reads: those it would write itself name modules that moved in 2.0."""

    def reducer_override(self, each: object) -> Any:  # noqa: ANN401 - as pickle has it
        if isinstance(each, np.ndarray):
            return np.ndarray, (each.shape, each.dtype.str, bytearray(each.tobytes()))
        return NotImplemented


def write(source: Source, path: Path) -> dict[str, Any]:
    if not isinstance(source.encoder, torchvision.models.ResNet) or source.options.cifar_stem or not recipe(source):
        raise refused("detectron2", source, "it reads torchvision's ResNets")
    if path.suffix != ".pkl":
        raise UserError(f"--to detectron2: {path.name} must end in .pkl, by which detectron2 knows such a file")
    tensors = {detectron2_name(name): each.numpy() for name, each in source.encoder.state_dict().items()}
    with open(path, "wb") as file:
        _Pickler(file).dump({"model": tensors, "__author__": "fasttrain", "matching_heuristics": True})
    return {"config": {"MODEL.WEIGHTS": path.name, **settings(source)}}


def settings(source: Source) -> dict[str, Any]:
    """What detectron2's configuration has to say of it. Its images are B, G, R and 0 to 255 unless it is told."""
    encoder, found = source.encoder, re.search(r"\d+", source.options.arch)
    assert isinstance(encoder, torchvision.models.ResNet)
    assert found, "every ResNet's name tells its depth"
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [255 * value for value in source.preprocessing.mean],
        "MODEL.PIXEL_STD": [255 * value for value in source.preprocessing.std],
        "MODEL.RESNETS.DEPTH": int(found[0]),
        "MODEL.RESNETS.NUM_GROUPS": encoder.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": encoder.base_width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": encoder.inplanes // 8,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }


def load(source: Source, path: Path) -> Loaded:
    if importlib.util.find_spec("detectron2"):
        return _by_detectron2(source, path)
    note("detectron2 is not installed here: its own reader is not asked, the names are mapped back to torchvision's")
    made = recipe(source)
    assert made is not None, "it was written"
    model = made.made()
    model.load_state_dict({from_detectron2(name): torch.as_tensor(each) for name, each in _tensors(path).items()})
    return Loaded(model.eval(), None, "names mapped back, without detectron2")


def _by_detectron2(source: Source, path: Path) -> Loaded:
    import detectron2
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    config = get_cfg()
    config.merge_from_list([part for setting in settings(source).items() for part in setting])
    config.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.NORM", "BN"])
    model: nn.Module = build_resnet_backbone(config, ShapeSpec(channels=3))
    DetectionCheckpointer(model).load(str(path))
    written, own = _tensors(path), model.state_dict()
    if set(written) != set(own) or not all(torch.equal(torch.as_tensor(written[name]), own[name]) for name in own):
        raise RuntimeError("detectron2 did not take every tensor")

    model.eval()
    by = f"detectron2 {detectron2.__version__}"
    return Loaded(lambda pixels: model(pixels)["res5"].mean((2, 3)), None, by)


def _tensors(path: Path) -> dict[str, Any]:
    return pickle.loads(path.read_bytes())["model"]
