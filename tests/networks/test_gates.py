"""Gates of pairs of classes."""

import torch
from torch import nn

from fasttrain.networks.gates import PairGates

ONE, OTHER = torch.tensor([0, 3, 3, 7]), torch.tensor([3, 0, 3, 1])


def test_a_gate_is_of_the_pair_in_either_order() -> None:
    gates = PairGates(8, 5)
    found = gates(ONE, OTHER)
    assert found.shape == (4, 5)
    assert ((found > 0) & (found < 1)).all()
    assert torch.allclose(gates(OTHER, ONE), found, atol=1e-6)
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_it_is_a_sigmoid_of_the_mean_of_both_embeddings() -> None:
    gates = PairGates(8, 5).eval()
    table = gates.classes.weight
    expected = gates.mlp((table[ONE] + table[OTHER]) / 2).sigmoid()
    assert torch.allclose(gates(ONE, OTHER), expected, atol=1e-6)
    assert [type(layer) for layer in gates.mlp] == 2 * [nn.ReLU, nn.BatchNorm1d, nn.Linear]


def test_classes_beyond_the_table_share_its_rows() -> None:
    gates = PairGates(4, 5).eval()
    assert torch.equal(gates(ONE + 400, OTHER - 2**62), gates(ONE, OTHER))


def test_it_is_as_exact_under_autocast_as_its_last_layer() -> None:
    """A sigmoid in bf16 could not come nearer to 1 than 0.4 %."""
    gates = PairGates(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert gates(ONE, OTHER).dtype == torch.float32
