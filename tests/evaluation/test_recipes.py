"""Recipes of published protocols: their rates at every epoch, and what is printed with their figures."""

import pytest

from fasttrain.evaluation.recipes import FINETUNE_VIT, LINEAR_DINO, LINEAR_MOCO, described, recipe
from fasttrain.system.errors import UserError

IMAGENET = 1_281_167


def test_mocos_rate_falls_at_epochs_60_and_80_and_does_not_follow_the_batch() -> None:
    found = recipe("linear_moco", "resnet50", IMAGENET)
    assert found == LINEAR_MOCO
    rates = [found.peak(found.head_lr) * found.factor(epoch) for epoch in (0, 59, 59.99, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 30, 3, 3, 0.3, 0.3])
    larger = recipe("linear_moco", "resnet50", IMAGENET, batch_size=1024)
    assert larger.peak(larger.head_lr) == 30


def test_dinos_rate_follows_the_batch_and_its_cosine_the_epochs() -> None:
    found = recipe("linear_dino", "vit_small", IMAGENET, batch_size=1024)
    assert found.peak(found.head_lr) == pytest.approx(0.004)
    assert [found.factor(progress) for progress in (0, 0.9, 50, 50.9)] == pytest.approx([1, 1, 0.5, 0.5])
    assert found.factor(99) == pytest.approx(0.000247, abs=1e-6)
    assert LINEAR_DINO.frozen


def test_finetuning_falls_along_a_cosine_of_steps_and_that_of_transformers_warms_up() -> None:
    found = recipe("finetune", "resnet50", IMAGENET)
    assert [found.factor(progress) for progress in (0, 15, 30)] == pytest.approx([1, 0.5, 0])
    assert not found.frozen
    for arch in ("vit_small", "timm:deit_small_patch16_224"):
        assert recipe("finetune", arch, IMAGENET) == FINETUNE_VIT
    rates = [FINETUNE_VIT.factor(progress) for progress in (0, 2.5, 5, 17.5, 30)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize(("fraction", "rates"), [(0.01, (0.02, 5)), (0.02, (0.02, 5)), (0.1, (0.01, 0.2))])
def test_semi_takes_swavs_rates_for_a_hundredth_or_a_tenth_of_the_labels(
    fraction: float, rates: tuple[float, float]
) -> None:
    found = recipe("semi", "resnet50", round(fraction * IMAGENET), fraction)
    assert (found.encoder_lr, found.head_lr) == rates
    assert [found.factor(epoch) for epoch in (11, 12, 16)] == pytest.approx([1, 0.2, 0.04])
    assert found.weight_decay == 0


def test_other_epochs_keep_the_shape_of_the_schedule_and_are_told() -> None:
    short = recipe("linear_moco", "resnet50", IMAGENET, epochs=10)
    assert short.milestones == (6, 8)
    assert described(short, "encoder output", "cpu")["epochs"] == 10
    assert recipe("finetune", "vit_small", IMAGENET, epochs=6).warmup_epochs == 1
    assert recipe("finetune", "vit_small", IMAGENET, epochs=1).factor(0) == 1


@pytest.mark.parametrize(("images", "batch_size"), [(256, 256), (255, 128), (100, 64), (2, 2)])
def test_a_small_set_has_a_smaller_batch(images: int, batch_size: int) -> None:
    found = recipe("linear_moco", "resnet50", images)
    assert found.batch_size == batch_size == described(found, "", "cpu")["batch_size"]


def test_one_image_is_too_few() -> None:
    for images, batch_size in ((1, 0), (100, 1)):
        with pytest.raises(UserError, match="needs two images"):
            recipe("semi", "resnet50", images, batch_size=batch_size)


def test_settings_tell_what_decides_a_figure() -> None:
    told = described(recipe("linear_moco", "resnet50", IMAGENET), "encoder output", "cuda")
    assert told == {
        "epochs": 100, "batch_size": 256, "optimizer": "SGD, momentum 0.9", "lr": 30.0,
        "schedule": "×0.1 at epochs 60, 80", "weight_decay": 0.0,
        "views": "random crops of 0.08 to 1 of the area, flips", "encoder": "frozen", "features": "encoder output",
        "head_init": "normal, 0.01", "precision": "fp32",
    }  # fmt: skip
    tuned = recipe("semi", "resnet50", 128_116, 0.1)
    told = described(tuned, "encoder output", "cuda")
    assert (told["lr"], told["head_lr"], told["precision"]) == (0.01, 0.2, "bf16")
    assert told["encoder"] == "trained, batch norm over all processes"
