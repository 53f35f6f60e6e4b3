"""Weights that torchvision and timm release, from their caches, or fetched where the network is reachable."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import socket
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torchvision
from torch import Tensor

from fasttrain.formats.boundary import one_line
from fasttrain.networks.options import TIMM
from fasttrain.system.errors import UserError, note
from fasttrain.weights.foreign import heads_of
from fasttrain.weights.read import digest_of, read_file

PATIENCE_SECONDS = 30.0  # for a server's next bytes
_HASH = re.compile(r"-([0-9a-f]{8,})\.")  # how a SHA-256 begins, in the names of torchvision's files


class Released(NamedTuple):
    """tensors by name. digest: SHA-256 of the file, or of the tensors. heads: numbers of attention heads, if known.
    arch: timm's name of the network, if known."""

    tensors: dict[str, Tensor]
    digest: str
    heads: frozenset[int] = frozenset()
    arch: str = ""


def torchvision_weights(name: str, arch: str) -> Released:
    """By their name: ResNet50_Weights.IMAGENET1K_V2, or, of arch, IMAGENET1K_V2 or DEFAULT. Raises UserError."""
    known = torchvision.models.get_model_weights(arch) if arch in torchvision.models.list_models() else None
    try:
        found = torchvision.models.get_weight(name) if "." in name or known is None else known[name]
    except (KeyError, ValueError, AttributeError):
        own = f"; torchvision has {', '.join(known.__members__)} of {arch}" if known else ""
        raise UserError(f"there is no such file or folder, nor weights of that name{own}") from None
    path = (
        pathlib.Path(torch.hub.get_dir())
        / "checkpoints"
        / pathlib.PurePosixPath(urllib.parse.urlparse(found.url).path).name
    )
    expected = _HASH.search(path.name)
    if not path.exists():
        _fetch(found.url, path, expected[1] if expected else None)
    read = read_file(path)
    if expected and not read.digest.startswith(expected[1]):
        raise UserError(f"{path} is not what torchvision released under that name: delete it, and it is fetched anew")
    return Released(read.tensors, read.digest)


def _fetch(url: str, path: pathlib.Path, expected: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    note(f"fetching {url}")
    try:
        with _patience():
            torch.hub.download_url_to_file(url, str(path), expected, progress=False)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{path} is not there, and {url} can't be fetched: {one_line(reason, 200)}") from None


def timm_weights(name: str) -> Released:
    """timm's pretrained weights of a model, as its own network of that name has them. Raises UserError."""
    try:
        import timm
    except ImportError:
        raise UserError("the package timm is missing here: pip install timm") from None
    try:
        with _patience(), _quiet():
            try:
                with _cached():
                    model = timm.create_model(name, pretrained=True)  # its classes too: with others, timm takes holes
            except FileNotFoundError:
                note(f"fetching {TIMM}{name}")
                model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm's, the hub's, safetensors' and the network's errors have no base in common
        raise UserError(f"timm can't give its weights: {one_line(f'{type(error).__name__}: {error}', 300)}") from None
    tensors, known = model.state_dict(), cast(dict[str, Any], model.pretrained_cfg)
    return Released(tensors, digest_of(tensors), heads_of(model), known["architecture"])


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A server that says nothing is not waited for any longer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _cached() -> Iterator[None]:
    """What the hub's cache has is enough: the hub is not asked for newer files."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what timm and the hub say on the way: one line says how it ended."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
