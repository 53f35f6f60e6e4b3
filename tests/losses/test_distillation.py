"""What the teacher says: centre, temperature and their schedules."""

import pytest
import torch

from fasttrain.losses.distillation import move_centre, teacher_probabilities, warmed_up


def test_probabilities_are_centred_and_sharpened() -> None:
    logits, centre = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = torch.stack([torch.softmax((row - centre) / 0.04, 0) for row in logits.flatten(0, 1)])
    found = teacher_probabilities(logits, centre, 0.04)
    assert torch.allclose(found.flatten(0, 1), expected, atol=1e-14)
    shift = torch.randn(7, dtype=torch.float64)
    assert torch.allclose(teacher_probabilities(logits + shift, centre + shift, 0.04), found, atol=1e-12)
    assert teacher_probabilities(logits.bfloat16(), centre.float(), 0.04).dtype == torch.float32


def test_the_temperature_warms_up_linearly_and_stays() -> None:
    found = [warmed_up(0.04, 0.07, epoch, 30) for epoch in (0, 10, 15.5, 30, 99)]
    assert found == pytest.approx([0.04, 0.05, 0.0555, 0.07, 0.07])
    assert warmed_up(0.04, 0.07, 0, 0) == 0.07


def test_the_centre_moves_a_tenth_of_the_way_after_a_good_step_alone() -> None:
    centre, mean = torch.tensor([1.0, 2.0]), torch.tensor([2.0, torch.nan])
    move_centre(centre, mean, torch.tensor(False))
    assert centre.tolist() == [1.0, 2.0]
    move_centre(centre, torch.tensor([2.0, 4.0]), torch.tensor(True))
    assert centre.tolist() == pytest.approx([1.1, 2.2])
