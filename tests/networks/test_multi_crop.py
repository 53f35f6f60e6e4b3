"""Views of several sizes through one encoder."""

import torch
from support.steps import sample, small
from torch import Tensor, nn

from fasttrain.networks.multi_crop import encode_crops


class _Recorder(nn.Module):
    """The mean of each channel; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        return x.mean((2, 3))


def test_each_size_is_one_pass_without_a_copy_and_rows_are_view_by_view() -> None:
    groups = sample(4, config=small("swav")).views
    encoder = _Recorder()
    rows = encode_crops(encoder, groups)
    assert [x.shape[0] for x in encoder.given] == [2 * 4, 6 * 4]
    for x, group in zip(encoder.given, groups, strict=True):
        assert x.data_ptr() == group.data_ptr()
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rows, torch.cat([view.mean((2, 3)) for group in groups for view in group]))
