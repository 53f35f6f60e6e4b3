"""Classifiers trained on images: what they learn, what they leave alone, how they go on, and on several ranks."""

import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from support.forks import on_ranks, succeed
from support.launch import equal
from torch import Tensor, nn

from fasttrain.engine.ranks import Ranks
from fasttrain.engine.views import make_views
from fasttrain.evaluation import supervised, unfinished_classifier
from fasttrain.evaluation.classifier import Classifier, make_optimizer, set_rates
from fasttrain.evaluation.features import Preparation
from fasttrain.evaluation.recipes import OverImages, Supervised, recipe
from fasttrain.evaluation.supervised import ranked, settings_of, train_classifier
from fasttrain.evaluation.unfinished_classifier import Unfinished
from fasttrain.input import LoaderError, open_dataset
from fasttrain.networks.batch_norm import convert_batch_norm
from fasttrain.networks.encoders import make_encoder
from fasttrain.networks.options import EncoderOptions
from fasttrain.system import pulse
from fasttrain.system.cli import finish
from fasttrain.system.errors import RunError, UserError
from fasttrain.system.signals import Stopped

PREPARATION = Preparation(16, (0.5,) * 3, (0.25,) * 3, 4, 1, 0.5)
COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (210, 30, 20)}
BOTH: list[OverImages] = ["linear_moco", "finetune"]


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """16 training and 5 validation images of each of three colours, some noise on them."""
    root, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for name, colour in COLOURS.items():
            (folder := root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + generator.integers(-20, 20, (20, 24, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return root


def encoder_of(seed: int = 0, arch: str = "small") -> nn.Module:
    torch.manual_seed(seed)
    encoder, _ = make_encoder(EncoderOptions(arch=arch), 16)
    encoder(torch.randn(8, 3, 16, 16))  # running statistics that are not those of the start
    return encoder


def short(protocol: OverImages, epochs: int = 3) -> Supervised:
    """Three steps of 16 images an epoch."""
    return recipe(protocol, "small", 48, 0.1, epochs=epochs, batch_size=16)


def trained(
    data: pathlib.Path, work: pathlib.Path, chosen: Supervised, encoder: nn.Module | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ranked classes and labels."""
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    return train_classifier(encoder or encoder_of(), chosen, train, val, PREPARATION, work, Ranks("cpu"), seed)


@pytest.fixture
def classifiers(monkeypatch: pytest.MonkeyPatch) -> list[Classifier]:
    """Takes what is trained in a test."""
    found: list[Classifier] = []
    real = supervised.ranked
    monkeypatch.setattr(supervised, "ranked", lambda *words: (found.append(words[0]), real(*words))[1])
    return found


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> list[int]:
    """Do something before a step, counted from this call on; returns a list that grows with every step."""
    done: list[int] = []

    def made(*words: Any, **names: Any) -> Any:
        if len(done) == step:
            act()
        done.append(1)
        return make_views(*words, **names)

    monkeypatch.setattr(supervised, "make_views", made)
    return done


class Killed(Exception):
    """Ends the process, as it were: nothing is saved on the way out."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("protocol", [*BOTH, "semi"])
def test_what_is_separable_is_learned_to_the_last_image(
    protocol: OverImages, colours: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranked_Nr, label_N = trained(colours, tmp_path / "work", short(protocol, 10))
    assert ranked_Nr[:, 0].tolist() == label_N.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert ranked_Nr.sort(1).values.tolist() == [[0, 1, 2]] * 15
    assert f"{protocol}, epoch 10 of 10: loss 0.0" in capsys.readouterr().err


def test_a_frozen_encoder_keeps_its_weights_and_running_statistics(
    colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier]
) -> None:
    encoder = encoder_of().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random_state = torch.get_rng_state()
    trained(colours, tmp_path, short("linear_moco", 1), encoder)
    for after in (encoder, classifiers[0].encoder):
        assert equal(before, dict(after.state_dict())) == []
    assert torch.equal(random_state, torch.get_rng_state())
    assert classifiers[0].head.weight.abs().max() > 0.1


def test_fine_tuning_changes_a_copy(
    colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier]
) -> None:
    encoder = encoder_of().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    trained(colours, tmp_path, short("finetune", 1), encoder)
    assert equal(before, dict(encoder.state_dict())) == []
    changed = set(equal(before, dict(classifiers[0].encoder.state_dict())))
    assert changed == {f"/{name}" for name in before}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("protocol", BOTH)
def test_a_killed_one_goes_on_inside_the_epoch_and_ends_with_the_same_bits(
    protocol: OverImages, colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = trained(colours, tmp_path / "whole", short(protocol))
    monkeypatch.setattr(unfinished_classifier, "SAVE_SECONDS", 0.0)
    at_step(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        trained(colours, tmp_path / "killed", short(protocol))
    left = at_step(monkeypatch, -1, kill)
    assert equal(trained(colours, tmp_path / "killed", short(protocol)), whole) == []
    assert len(left) == 9 - 5
    assert equal(*(dict(classifier.state_dict()) for classifier in classifiers)) == []


def test_one_that_is_done_is_not_trained_again_until_its_folder_is_gone(
    colours: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come while later protocols are under way."""
    first = trained(colours, tmp_path, short("finetune", 1))
    at_step(monkeypatch, 0, kill)
    assert equal(trained(colours, tmp_path, short("finetune", 1)), first) == []


def test_a_signal_ends_it_with_a_checkpoint_and_the_same_command_goes_on(
    colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trained(colours, tmp_path / "whole", short("linear_moco"))
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        trained(colours, tmp_path / "stopped", short("linear_moco"))
    assert stopped.value.number == signal.SIGTERM
    assert "linear_moco stopped by SIGTERM after 5 steps; the same command continues" in capsys.readouterr().err
    left = at_step(monkeypatch, -1, kill)
    trained(colours, tmp_path / "stopped", short("linear_moco"))
    assert len(left) == 4
    assert equal(*(dict(classifier.state_dict()) for classifier in classifiers)) == []


def test_what_is_left_of_another_classifier_is_not_taken(
    colours: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished_classifier, "SAVE_SECONDS", 0.0)
    at_step(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        trained(colours, tmp_path, short("linear_moco"))
    others: list[tuple[Any, ...]] = [
        (short("linear_moco", 2),), (short("linear_moco"), encoder_of(1)), (short("linear_moco"), None, 1)
    ]  # fmt: skip
    for other in others:
        done = at_step(monkeypatch, -1, kill)
        trained(colours, tmp_path, *other)
        assert len(done) == 3 * other[0].epochs
    left = at_step(monkeypatch, -1, kill)
    trained(colours, tmp_path, short("linear_moco"))
    assert len(left) == 4


def test_a_damaged_state_is_told_and_begun_anew(
    colours: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unfinished_classifier, "SAVE_SECONDS", 0.0)
    at_step(monkeypatch, 2, kill)
    with pytest.raises(Killed):
        trained(colours, tmp_path, short("linear_moco", 1))
    (state,) = tmp_path.glob("*/step-*.pt")
    state.write_bytes(state.read_bytes()[:-100])
    done = at_step(monkeypatch, -1, kill)
    trained(colours, tmp_path, short("linear_moco", 1))
    assert len(done) == 3
    assert "can be read: the classifier is trained anew" in capsys.readouterr().err


def on_rank(data: pathlib.Path, out: pathlib.Path, protocol: OverImages) -> None:
    real = supervised.ranked

    def kept(classifier: Classifier, *words: Any) -> tuple[Tensor, Tensor]:
        found = real(classifier, *words)
        torch.save(
            {"ranked": found[0], "labels": found[1], **classifier.state_dict()}, out / f"{os.environ['RANK']}.pt"
        )
        return found

    supervised.ranked = kept
    trained(data, out / "work", short(protocol, 2))


@pytest.mark.parametrize("protocol", BOTH)
def test_two_ranks_train_the_classifier_of_one(
    protocol: OverImages, colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier]
) -> None:
    ranked_Nr, label_N = trained(colours, tmp_path / "one", short(protocol, 2))
    done = on_ranks(tmp_path, 2, on_rank, colours, tmp_path, protocol)
    succeed(done)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert equal(*both) == []
    assert equal([both[0]["ranked"], both[0]["labels"]], [ranked_Nr, label_N]) == []
    for name, tensor in classifiers[0].state_dict().items():
        if "num_batches" not in name:  # which synchronised batch norm does not count
            assert torch.allclose(both[0][name], tensor, rtol=1e-3, atol=1e-3), name
    assert [f"{protocol}, epoch 2 of 2" in one.stderr for one in done] == [True, False]


def stopped_on_rank(data: pathlib.Path, out: pathlib.Path) -> int:
    """The first rank takes longer to write its state than others give one that has ended."""
    pulse.EVERY = pulse.GRACE = 0.1
    real = Unfinished.save

    def slow(unfinished: Unfinished, state: dict[str, Any]) -> None:
        time.sleep(1.5)
        real(unfinished, state)

    Unfinished.save = slow  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return finish(lambda: len(trained(data, out, short("linear_moco"))))


def test_two_ranks_that_are_stopped_both_end_once_the_state_is_written(
    colours: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = on_ranks(tmp_path, 2, stopped_on_rank, colours, tmp_path / "work")
    assert [one.returncode for one in done] == [128 + signal.SIGTERM] * 2, done
    assert len(list((tmp_path / "work").glob("*/step-*.pt"))) == 1


def stopped_at_the_end(data: pathlib.Path, out: pathlib.Path) -> int:
    """The first rank is sent a signal while it writes the last state."""
    real = Unfinished.save

    def signalled(unfinished: Unfinished, state: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(unfinished, state)

    Unfinished.save = signalled  # type: ignore[method-assign]
    return finish(lambda: len(trained(data, out, short("linear_moco", 1))))


def test_a_signal_to_one_rank_after_the_last_step_ends_all(colours: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = on_ranks(tmp_path, 2, stopped_at_the_end, colours, tmp_path / "work")
    assert [one.returncode for one in done] == [128 + signal.SIGTERM] * 2, done


def test_of_classes_that_are_as_likely_the_lower_ones_come_first(
    colours: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the protocols over features."""
    val = open_dataset(colours, "val")
    monkeypatch.setattr(val, "classes", tuple(map(str, range(40))))
    alike = SimpleNamespace(eval=lambda: lambda x: torch.zeros(len(x), 40))
    ranked_Nr, _ = ranked(cast("Classifier", alike), val, PREPARATION, Ranks("cpu"))
    assert ranked_Nr.tolist() == [[0, 1, 2, 3, 4]] * 15


def test_images_that_cannot_be_read_are_left_out_unless_there_are_too_many(
    colours: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = shutil.copytree(colours, tmp_path / "data")
    for image in data.rglob("03.png"):
        image.write_bytes(image.read_bytes()[:60])
    ranked_Nr, label_N = trained(data, tmp_path / "work", short("linear_moco", 10))
    assert ranked_Nr[:, 0].tolist() == label_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for image in (data / "val").rglob("*.png"):
        if image.stem != "00":
            image.write_bytes(image.read_bytes()[:60])
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    strict = PREPARATION._replace(max_failed_fraction=0.1)  # of 15, but ten always may be
    with pytest.raises(LoaderError, match="12 images can't be read, more than --max-failed-fraction"):
        train_classifier(encoder_of(), short("linear_moco", 10), train, val, strict, tmp_path / "work", Ranks("cpu"), 0)


def test_dinos_classifier_says_what_it_sees(
    colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier]
) -> None:
    encoder, cpu = encoder_of(arch="vit_tiny"), torch.device("cpu")
    told = settings_of(encoder, short("linear_dino"), 16, cpu)
    assert told["features"] == "class tokens of the last 4 blocks"
    trained(colours, tmp_path, short("linear_dino", 1), encoder)
    assert classifiers[0].head.in_features == 4 * 192
    assert settings_of(encoder_of(), short("linear_dino"), 16, cpu)["features"] == "encoder output"


def test_a_transformer_is_fine_tuned_by_adamw_without_decay_of_vectors(
    colours: pathlib.Path, tmp_path: pathlib.Path, classifiers: list[Classifier]
) -> None:
    encoder = encoder_of(arch="vit_tiny")
    chosen = recipe("finetune", "vit_tiny", 48, epochs=1, batch_size=16)
    before = encoder.state_dict()
    trained(colours, tmp_path, chosen, encoder)
    after = classifiers[0].encoder.state_dict()
    assert not torch.equal(before["encoder.layers.encoder_layer_0.mlp.0.weight"],
                           after["encoder.layers.encoder_layer_0.mlp.0.weight"])  # fmt: skip
    optimizer = make_optimizer(classifiers[0], chosen)
    decays = {p.dim() > 1: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {True: 0.05, False: 0.0}
    set_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 * 2.5e-4 * 16 / 256}


def test_paths_that_a_trained_encoder_drops_are_told() -> None:
    cpu = torch.device("cpu")
    for arch in ("vit_tiny", "timm:vit_tiny_patch16_224"):
        encoder, _ = make_encoder(EncoderOptions(arch=arch, patch_size=8, drop_path=0.25), 16)
        assert settings_of(encoder, short("finetune"), 16, cpu)["drop_path"] == 0.25
        assert "drop_path" not in settings_of(encoder, short("linear_dino"), 16, cpu)
    assert settings_of(encoder_of(), short("finetune"), 16, cpu)["drop_path"] == 0.0


def test_what_can_not_be_trained_is_one_line(
    colours: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ranks = open_dataset(colours, "train"), cast("Ranks", SimpleNamespace(world_size=3))
    with pytest.raises(UserError, match="linear_moco: a batch of 16 images can't be shared by 3 processes"):
        train_classifier(encoder_of(), short("linear_moco"), store, store, PREPARATION, tmp_path, ranks, 0)
    broken = encoder_of()
    torch.nn.init.constant_(next(broken.parameters()), float("nan"))
    with pytest.raises(RunError, match="linear_moco: the loss of epoch 1 is no number"):
        trained(colours, tmp_path, short("linear_moco"), broken)
    split = convert_batch_norm(encoder_of(), "split", 2)
    with pytest.raises(ValueError, match="plain batch norm"):
        trained(colours, tmp_path, short("finetune"), split)

    monkeypatch.setattr(store, "labels", lambda index_N: np.where(index_N == 20, -1, 0))
    with pytest.raises(UserError, match="images without labels"):
        train_classifier(encoder_of(), short("linear_moco"), store, store, PREPARATION, tmp_path, Ranks("cpu"), 0)
