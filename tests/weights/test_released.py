"""Weights of torchvision and timm, from caches as their own programs leave them."""

import contextlib
import hashlib
import pathlib
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision

from fasttrain.system.errors import UserError
from fasttrain.weights import released
from fasttrain.weights.fit import fit
from fasttrain.weights.released import timm_weights, torchvision_weights


@pytest.fixture
def hub(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """torch's cache of downloads, empty."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


def cached(hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> torchvision.models.ResNet:
    """A network whose weights lie where torchvision's of ResNet-18 would, under a name with their digest."""
    network = torchvision.models.resnet18()
    hub.mkdir()
    torch.save(network.state_dict(), hub / "new.pth")
    digest = hashlib.sha256((hub / "new.pth").read_bytes()).hexdigest()
    (hub / "new.pth").rename(hub / f"resnet18-{digest[:8]}.pth")
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    address = f"https://example.invalid/models/resnet18-{digest[:8]}.pth"
    monkeypatch.setattr(weights, "_value_", torchvision.models._api.Weights(address, weights.transforms, {}))
    return network


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"])
def test_torchvisions_weights_come_from_its_cache(
    name: str, hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = cached(hub, monkeypatch)
    found = torchvision_weights(name, "resnet18")
    assert found.digest.startswith(next(hub.iterdir()).stem.removeprefix("resnet18-"))
    torch.testing.assert_close(found.tensors["layer4.1.conv2.weight"], network.layer4[1].conv2.weight.detach())


def test_a_damaged_download_is_told(hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(hub, monkeypatch)
    torch.save({"w": torch.ones(1)}, next(hub.iterdir()))
    with pytest.raises(UserError, match="delete it"):
        torchvision_weights("DEFAULT", "resnet18")


def test_an_unreachable_network_is_one_line(hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_words: Any, **_named: Any) -> None:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(
        UserError, match=r"resnet50-11ad3fa6\.pth is not there, and https://.* can't be fetched: .*known"
    ):
        torchvision_weights("IMAGENET1K_V2", "resnet50")
    assert not list(hub.iterdir())


def test_a_name_that_torchvision_has_not_lists_those_it_has() -> None:
    with pytest.raises(UserError, match="torchvision has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT of resnet50"):
        torchvision_weights("IMAGENET1K_V3", "resnet50")
    with pytest.raises(UserError, match=r"no such file or folder, nor weights of that name$"):
        torchvision_weights("nosuch.pth", "small")


@contextlib.contextmanager
def without_the_hub(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    yield


def test_timms_weights_come_from_the_hubs_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18")
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    pytest.importorskip("safetensors.torch").save_file(
        network.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors"
    )
    with without_the_hub(tmp_path, monkeypatch):
        found = timm_weights("resnet18.a1_in1k")
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()  # type: ignore[assignment]
    fitted = fit(encoder, found.tensors, found.heads)
    assert fitted.whole
    encoder.load_state_dict(fitted.taken, strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = encoder.eval()(images)
        theirs = network.eval().forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_folder_of_timm_with_holes_is_refused(tmp_path: pathlib.Path) -> None:
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    network = timm.create_model("resnet18", num_classes=3)
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    assert set(timm_weights(f"local-dir:{tmp_path}").tensors) == set(network.state_dict())
    kept = {name: tensor for name, tensor in network.state_dict().items() if name != "layer1.0.conv1.weight"}
    safetensors.save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"Missing key.*layer1\.0\.conv1\.weight"):
        timm_weights(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "nosuch"])
def test_what_timm_can_not_give_is_one_line(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    with (
        without_the_hub(tmp_path, monkeypatch),
        pytest.raises(UserError, match="timm can't give its weights") as caught,
    ):
        timm_weights(name)
    assert "\n" not in str(caught.value)


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, hub: pathlib.Path) -> None:
    import socket

    waits = []

    def silent(*_words: Any, **_named: Any) -> None:
        waits.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(torch.hub, "urlopen", silent)
    with pytest.raises(UserError, match="timed out"):
        torchvision_weights("DEFAULT", "resnet18")
    assert waits == [released.PATIENCE_SECONDS]
    assert socket.getdefaulttimeout() is None
