"""What other people's programs use: `from fasttrain import …`, typed; a run's encoder, and its preprocessing."""

import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from support.commands import ROOT
from support.launch import train

import fasttrain
from fasttrain import load_encoder, open_dataset
from fasttrain.evaluation.features import central_views
from fasttrain.formats.image import read_rgb
from fasttrain.system.errors import UserError
from fasttrain.trained import load_trained

PROGRAM = """\
from typing import Any

import torch
from fasttrain import ViewLoader, load_encoder, make_config, open_dataset, readout

store = open_dataset("shards", "val")
total: int = store.num_samples
with ViewLoader("shards", views="mocov2", size=224, batch_size=256) as loader:
    state: dict[str, Any] = loader.state_dict()
    for (x, y), labels, index in loader:
        width: int = x.shape[-1]
        if labels is not None:
            reveal_type(labels)
encoder, preprocessing = load_encoder("runs/first", best=True)
reveal_type(encoder)
reveal_type(preprocessing.size)
reveal_type(readout)
wrong: str = preprocessing.size
make_config(method="moco").optimisation.nonsense
"""


@pytest.fixture(scope="module")
def run(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(shards, folder, "--method", "moco", "--arch", "resnet18", "--size", 96, "--max-steps", 2) == 0
    return folder


def test_all_doors_open() -> None:
    assert {name: callable(getattr(fasttrain, name)) for name in fasttrain.__all__} == dict.fromkeys(
        ["ViewLoader", "load_encoder", "make_config", "open_dataset", "readout"], True
    )
    assert set(fasttrain.__all__) <= set(dir(fasttrain))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fasttrain.nonsense  # noqa: B018


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path: pathlib.Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    environment = {"PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    found = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    revealed = [line.split('"')[1] for line in found if line.startswith("note: Rev")]
    assert revealed[:3] == ["torch._tensor.Tensor", "torch.nn.modules.module.Module", "int"], done.stdout
    assert "temperature: float | torch._tensor.Tensor" in revealed[3]
    assert [line for line in found if line.startswith("error")] == [
        'error: Incompatible types in assignment (expression has type "int", variable has type "str")  [assignment]',
        'error: "OptimisationOptions" has no attribute "nonsense"  [attr-defined]',
    ], done.stdout


def test_an_encoder_of_a_run_is_the_library_s_own(run: pathlib.Path) -> None:
    encoder, preprocessing = load_encoder(str(run))
    assert isinstance(encoder, torchvision.models.ResNet)
    assert not encoder.training
    assert preprocessing.size == 96
    x = torch.randn(2, 3, 96, 96)
    plain = torchvision.models.resnet18()
    plain.fc = torch.nn.Identity()  # type: ignore[assignment]
    plain.load_state_dict(encoder.state_dict())
    assert torch.equal(plain.eval()(x), encoder(x))
    named = load_encoder(run, checkpoint=str(next((run / "checkpoints").glob("*.pt"))))[0]
    assert torch.equal(named(x), encoder(x))
    assert torch.equal(load_trained(run).encoder(x), encoder(x))


def test_a_checkpoint_that_is_not_there_is_refused(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"has no best.pt"):
        load_encoder(run, best=True)
    with pytest.raises(UserError):
        load_encoder(tmp_path)


@pytest.mark.parametrize("size", [224, 96, 32])
def test_the_transform_is_the_central_view(run: pathlib.Path, tmp_path: pathlib.Path, size: int) -> None:
    """To 1e-4 of a normalised value."""
    generator = np.random.default_rng(size)
    for number, shape in enumerate([(300, 401), (257, 256), (33, 31), (500, 90), (224, 224)]):
        noise = generator.uniform(0, 255, (*shape, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    preprocessing = load_encoder(run)[1]._replace(size=size, crop=1.0 if size == 32 else 0.875)
    transform = pickle.loads(pickle.dumps(preprocessing.transform()))
    store = open_dataset(tmp_path)
    ((_, views),) = central_views(
        store, torch.device("cpu"), size=size, mean=preprocessing.mean, std=preprocessing.std, batch_size=5, workers=1,
        max_failed_fraction=0.0,
    )  # fmt: skip
    for number, view in enumerate(views):
        image = Image.open(tmp_path / f"{number}.png")
        assert (transform(image) - view).abs().max() < 1e-4
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(transform(pixels), transform(image))
        assert torch.allclose(transform(pixels / 255), transform(pixels), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_the_transform_takes_pictures_as_the_loaders_do(run: pathlib.Path, tmp_path: pathlib.Path, mode: str) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.uniform(0, 255, (40, 60, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    name = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.fromarray(pixels, "RGBA").convert(mode).save(name, exif=exif)
    loaded = torch.from_numpy(read_rgb(name.read_bytes())).permute(2, 0, 1)
    transform = load_encoder(run)[1].transform()
    assert torch.equal(transform(Image.open(name)), transform(loaded))
