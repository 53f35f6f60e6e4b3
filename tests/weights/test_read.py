"""Files of weights that are damaged, of something else, or hold more: one line, and nothing in them runs."""

import argparse
import collections
import fractions
import os
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fasttrain.system.errors import UserError
from fasttrain.weights.read import MAX_BYTES, digest_of, read_file


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "weights.pth"


def refused(path: pathlib.Path) -> str:
    """The one line in which reading it ends."""
    with pytest.raises(UserError) as caught:
        read_file(path)
    line = str(caught.value)
    assert line.startswith(f"{path} can't be read as weights: ")
    assert "\n" not in line
    assert "weights_only" not in line
    assert len(line) < 400 + len(str(path))
    return line.removeprefix(f"{path} can't be read as weights: ")


def test_dicts_within_dicts_are_one_of_dotted_names(path: pathlib.Path) -> None:
    torch.save({"a": {"b": {"w": torch.ones(2)}}, "_orig_mod.c": torch.zeros(1), 3: torch.ones(1), "n": 5}, path)
    assert {name: tuple(tensor.shape) for name, tensor in read_file(path).tensors.items()} == {"a.b.w": (2,), "c": (1,)}


def test_the_digest_is_the_files(path: pathlib.Path) -> None:
    import hashlib

    torch.save({"w": torch.ones(300_000)}, path)
    assert read_file(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_are_read(path: pathlib.Path) -> None:
    pytest.importorskip("safetensors.torch").save_file({"w": torch.ones(3)}, path)
    assert read_file(path).tensors["w"].tolist() == [1, 1, 1]
    path.write_bytes(path.read_bytes()[:-4])
    assert "SafetensorError" in refused(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before zip"])
def test_what_official_checkpoints_hold_beside_weights_is_harmless(path: pathlib.Path, legacy: bool) -> None:
    args = argparse.Namespace(arch="vit_small", lr=0.1, gpus=[0, 1], deeper=argparse.Namespace(x=None))
    numbers = {"best": np.float64(3.5), "half": np.float32(1), "step": np.int64(7), "curve": np.arange(3.0)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"w": torch.ones(2), "args": args, **numbers, "optimizer": optimizer}
    torch.save(
        {**content, "o": collections.OrderedDict(a=torch.ones(1))}, path, _use_new_zipfile_serialization=not legacy
    )
    assert {"w", "o.a"} <= read_file(path).tensors.keys()


def test_names_of_numpy_1_are_known(path: pathlib.Path) -> None:
    torch.save({"w": torch.ones(2), "best": np.float64(3.5)}, path)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    torch.save({"w": torch.ones(2), "best": np.float64(3.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    path.write_bytes(content)
    assert "w" in read_file(path).tensors


def test_what_could_run_code_is_named_and_not_run(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"w": torch.ones(2), "bomb": Bomb()}, path)
    assert "posix.mkdir" in refused(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"w": torch.ones(2), "part": fractions.Fraction(1, 3)}, path)
    assert refused(path) == "it holds fractions.Fraction, which could run code: save the state dict alone"


def test_a_whole_network_is_refused(path: pathlib.Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)
    assert "it holds torch.nn.modules.linear.Linear" in refused(path)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "its end": lambda whole: whole[:-30],
    "its beginning": lambda whole: whole[30:],
    "zeros": lambda whole: bytes(5000),
    "a page": lambda whole: b"<!doctype html><html>Not found</html>",
    "a pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a pickle's first byte": lambda whole: b"\x80",
    "an archive's first bytes": lambda whole: b"PK\x03\x04",
    "a long header": lambda whole: (10**6).to_bytes(8, "little") + b"{" + bytes(10**6),
    "a pickle of text": lambda whole: b"\x80\x02X\x03\x00\x00\x00abcq\x00.",
    "changed": lambda whole: whole[:60] + bytes(b ^ 0x5A for b in whole[60:400]) + whole[400:],
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_one_line(path: pathlib.Path, damage: str, legacy: bool) -> None:
    torch.save({"state_dict": {"w": torch.randn(500)}}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    refused(path)


def test_what_is_no_file_is_never_waited_for(path: pathlib.Path) -> None:
    os.mkfifo(path)
    assert refused(path) == "not a regular file"


def test_a_file_without_end_is_not_read(path: pathlib.Path) -> None:
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(MAX_BYTES + 1)
    assert refused(path) == "it is larger than 32 GiB"


def test_an_archive_that_grows_is_not_unpacked(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", bytes(10**7))
    assert "compressed" in refused(path)


def test_a_dict_that_holds_itself_is_read_once(path: pathlib.Path) -> None:
    content: dict = {"w": torch.ones(1)}
    content |= {f"again{number}": content for number in range(9)}
    torch.save(content, path)
    assert list(read_file(path).tensors) == ["w"]


def test_a_digest_of_tensors_depends_on_names_shapes_and_values() -> None:
    one = torch.arange(6.0)
    states = [{"a": one}, {"b": one}, {"a": one.view(2, 3)}, {"a": one + 1}, {"a": one.double()}, {"a": one, "b": one}]
    assert len({digest_of(state) for state in states}) == len(states)
    assert digest_of({"a": one, "b": one * 2}) == digest_of({"b": one * 2, "a": one.clone()})


def test_a_tensor_without_values_is_not_there(path: pathlib.Path) -> None:
    torch.save({"w": torch.ones(3), "empty": torch.ones(3, device="meta")}, path)
    assert list(read_file(path).tensors) == ["w"]
