"""Activations and the gate (megalite/model/activation.py), compared with torch and autograd."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from megalite.model.activation import _product, _slopes, activate, gated
from megalite.model.spec import Activation

THEIRS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def test_every_activation_is_known() -> None:
    assert set(get_args(Activation)) == set(THEIRS)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_the_gates_own_gradients_are_autograds(activation: Activation) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, slope = (
        torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    gate.requires_grad_(), up.requires_grad_()
    torch.testing.assert_close(activate(gate, activation), THEIRS[activation](gate))
    made = gated(gate, up, activation)
    torch.testing.assert_close(made, THEIRS[activation](gate) * up)
    wanted = torch.autograd.grad(_product(gate, up, activation), (gate, up), slope)
    found = _slopes(slope, gate.detach(), up.detach(), activation)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
