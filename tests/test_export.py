"""export.py: nothing lies under the file's name unless another library has read the run's encoder from it."""

import json
import pathlib
import shutil
import sys
from typing import Any

import pytest
import torch
from support.commands import one_line_of
from support.encoders import relative
from support.launch import train

from fasttrain.export import main
from fasttrain.jobs.export import some_images
from fasttrain.networks.encoders import make_encoder
from fasttrain.run.checkpoint import load_checkpoint, saved_checkpoints
from fasttrain.train import main as train_command
from fasttrain.trained import Trained, load_trained
from fasttrain.weights import detectron2_file
from fasttrain.weights.exported import Source
from fasttrain.weights.formats import FORMATS


@pytest.fixture(scope="module")
def run(shards: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One step of a ResNet."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train(shards, path, "--arch", "resnet18", "--size", 32, "--max-steps", 1) == 0
    return path


def export(run: pathlib.Path, file: pathlib.Path, to: str, *more: object) -> int:
    return main([str(run), "--to", to, str(file), *map(str, more)])


@torch.no_grad()
def features(trained: Trained, model: Any) -> float:
    """How far a model's features of real images are from the encoder's."""
    views, _ = some_images(trained, "")
    return relative(trained.encoder(views), model(views))


def test_torchvision_reads_the_runs_encoder(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision

    assert export(run, tmp_path / "encoder.pth", "torchvision") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["to"] == "torchvision"
    assert (told["step"], told["tensors"], told["images"]) == (1, 120, 16)
    assert 0 <= told["difference"] < 1e-5
    assert told["preprocessing_levels"] < 1e-3
    assert told["checked_by"] == f"torchvision {torchvision.__version__}"
    model = torchvision.models.get_model("resnet18")
    model.fc = torch.nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True))
    trained = load_trained(run)
    assert features(trained, model.eval()) < 1e-5
    beside = json.loads((tmp_path / "encoder.pth.json").read_text())
    assert beside["checkpoint"] == trained.digest
    assert beside["preprocessing"]["mean"] == list(trained.preprocessing.mean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.pth", "encoder.pth.json"]


def test_timm_and_transformers_read_the_same_folder(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    assert export(run, tmp_path / "folder", "timm") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}
    trained = load_trained(run)
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert features(trained, model) < 1e-5
    wrapped = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    assert features(trained, lambda views: wrapped(views).pooler_output) < 1e-5
    prepared = timm.data.resolve_data_config({}, model=model)
    assert tuple(prepared["mean"]) == trained.preprocessing.mean
    assert (*prepared["input_size"], prepared["crop_pct"], prepared["interpolation"]) == (3, 32, 32, 1.0, "bilinear")


def test_a_wrong_map_is_found_and_leaves_no_file(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two convolutions in each other's place: every name is there, and every shape is right."""
    right, swapped = detectron2_file.detectron2_name, {"res2.0.conv1.weight": "res2.0.conv2.weight"}
    swapped |= {there: here for here, there in swapped.items()}
    monkeypatch.setattr(detectron2_file, "detectron2_name", lambda name: swapped.get(right(name), right(name)))
    assert export(run, tmp_path / "encoder.pkl", "detectron2") == 1
    assert "encoder.pkl is not written: features by" in one_line_of(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["torchvision", "timm", "safetensors"])
def test_a_lossy_file_is_found(
    to: str, run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in FORMATS[to].packages:
        pytest.importorskip(package)
    right = FORMATS[to].write

    def write(source: Source, path: pathlib.Path) -> dict[str, Any]:
        state = {
            name: t.half().float() if t.is_floating_point() else t for name, t in source.encoder.state_dict().items()
        }
        encoder, _ = make_encoder(source.options, source.preprocessing.size)
        encoder.load_state_dict(state)
        return right(source._replace(encoder=encoder), path)

    monkeypatch.setitem(FORMATS, to, FORMATS[to]._replace(write=write))
    assert export(run, tmp_path / "out", to) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_nothing_else_is(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("a letter")
    assert export(run, tmp_path / "mine", "torchvision") == 2
    assert "mine exists, and is no earlier export" in one_line_of(capsys.readouterr().err)
    assert (tmp_path / "mine").read_text() == "a letter"
    (tmp_path / "other.json").write_text("[]")
    assert export(run, tmp_path / "other", "torchvision") == 2
    assert not (tmp_path / "other").exists()
    assert export(run, run, "timm") == 2

    assert export(run, tmp_path / "encoder.pth", "torchvision") == 0
    before = (tmp_path / "encoder.pth").stat().st_ino
    assert export(run, tmp_path / "encoder.pth", "torchvision") == 0
    assert (tmp_path / "encoder.pth").stat().st_ino != before


def test_a_folder_is_replaced_but_for_what_others_have_put_there(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("timm")
    assert export(run, tmp_path / "folder", "timm") == 0
    (tmp_path / "folder" / "README.md").write_text("a model card")
    (tmp_path / "folder" / "config.json").unlink()
    assert export(run, tmp_path / "folder", "timm") == 0
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "preprocessing.json"}


def test_images_that_have_moved_are_found_where_it_is_said(
    shards: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(shards, tmp_path / "data")
    assert train(data, tmp_path / "run", "--max-steps", 1) == 0
    data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert export(tmp_path / "run", tmp_path / "x", "safetensors") == 2
    assert "--data tells where" in one_line_of(capsys.readouterr().err)
    pytest.importorskip("safetensors")
    assert export(tmp_path / "run", tmp_path / "x", "safetensors", "--data", tmp_path / "moved") == 0


def test_of_dino_the_teacher_goes_out_of_the_newest_checkpoint_or_the_best(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    words = f"--data {shards} --run {run} --method dino --arch small --size 16 --batch-size 16 --lr 0.1 --max-steps 6"
    words += " --knn-every 1 --prototypes 32 --hidden 16 --dim 16"
    assert train_command(words.split()) == 0
    for more, checkpoint in (((), saved_checkpoints(checkpoints)[0]), (("--best",), checkpoints / "best.pt")):
        assert export(run, tmp_path / "x", "safetensors", *more) == 0
        written, state = safetensors.load_file(tmp_path / "x"), load_checkpoint(checkpoint).state["method"]
        assert all(torch.equal(tensor, state[f"momentum_encoder.{name}"]) for name, tensor in written.items())


@pytest.mark.parametrize(("to", "missing"), [("onnx", "onnxruntime"), ("hf", "transformers"), ("timm", "timm")])
def test_a_package_that_is_missing_is_one_line(
    to: str, missing: str, run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, missing, None)
    assert export(run, tmp_path / "x", to) == 2
    line = one_line_of(capsys.readouterr().err)
    assert "the package" in line
    assert "pip install '.[export]'" in line


def test_what_is_no_run_or_has_no_checkpoint_is_one_line(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, tmp_path / "x", "torchvision") == 2
    assert "is not a run folder" in one_line_of(capsys.readouterr().err)
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    assert export(copy, tmp_path / "x", "torchvision") == 2
    assert "has no checkpoint yet" in one_line_of(capsys.readouterr().err)
    assert not (tmp_path / "x").exists()
    assert export(tmp_path / "x", run, "torchvision") == 2  # the one in the other's place
    assert "x is not a run folder" in one_line_of(capsys.readouterr().err)


def test_what_a_library_finds_wrong_is_one_line(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def write(source: Source, path: pathlib.Path) -> dict[str, Any]:
        path.write_bytes(b"not what it should be")
        return {}

    monkeypatch.setitem(FORMATS, "torchvision", FORMATS["torchvision"]._replace(write=write))
    assert export(run, tmp_path / "x", "torchvision") == 1
    assert "--to torchvision: " in one_line_of(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
