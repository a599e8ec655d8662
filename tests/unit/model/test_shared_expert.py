"""The shared expert (megalite/model/shared_expert.py), compared with its definition and with the sum of its halves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.model.families import read_spec
from megalite.model.shared_expert import SharedExpert
from megalite.parallel.collectives import Split
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.layers import initialise, name_parameters
from tests.small_models import MODELS


def expert(family: str, axis: Axis) -> SharedExpert:
    spec = read_spec(MODELS[family])
    assert spec.mixture is not None
    made = SharedExpert(spec, spec.mixture, Split(axis))
    name_parameters(made, "shared")
    for value in made.parameters():
        value.placement.std = 0.3  # type: ignore[union-attr]
    initialise(made, 3)
    return made


def rows() -> Tensor:
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(0))


def test_it_is_a_gated_mlp_weighted_by_a_sigmoid() -> None:
    made, x = expert("qwen2_moe", ALONE), rows()
    assert made.weigher is not None and made.gate.weight.shape == (28, 32)
    mlp = (F.silu(x @ made.gate.weight.t()) * (x @ made.up.weight.t())) @ made.down.weight.t()
    torch.testing.assert_close(made(x), mlp * (x @ made.weigher.weight.t()).sigmoid())


def test_it_is_not_weighted_if_the_family_does_not() -> None:
    made, x = expert("ernie4_5_moe", ALONE), rows()
    assert made.weigher is None
    mlp = (F.silu(x @ made.gate.weight.t()) * (x @ made.up.weight.t())) @ made.down.weight.t()
    torch.testing.assert_close(made(x), mlp)


def test_the_ranks_of_the_tensor_axis_add_up_to_it() -> None:
    whole = expert("qwen2_moe", ALONE)(rows())
    parts = [expert("qwen2_moe", Axis(4, rank, (0, 1, 2, 3), None))(rows()) for rank in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)
