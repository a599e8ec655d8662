"""Experts without ranks: initial weights, the choice of experts, their outputs, the balance loss."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from megalite.model.context import Context
from megalite.model.experts import RoutedMLP
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.collectives import Split
from megalite.parallel.grid import ALONE, Grid
from megalite.parallel.layers import placed
from tests.small_models import MODELS


def stage_of(grid: Grid) -> Stage:
    return Stage(read_spec(MODELS["mixtral"]), grid).initialise(7)


def test_an_expert_starts_from_the_same_weights_on_any_rank() -> None:
    whole = {place.name: value for value, place in placed(stage_of(Grid()))}
    matrices = whole["layers.0.mlp.experts.up.weight"]
    assert not torch.equal(matrices[0], matrices[1])
    for rank in range(4):
        part = stage_of(Grid.at(rank, 1, 2, 2, expert=2))
        for value, place in placed(part):
            assert torch.equal(value, place.cut(whole[place.name])), place.name
            assert getattr(value, "allreduce", True) != place.has_own_replicas
            assert place.has_own_replicas == (".experts." in place.name)


def routed(balance: float) -> RoutedMLP:
    spec = read_spec({**MODELS["mixtral"], "router_aux_loss_coef": balance})
    assert spec.mixture is not None
    mlp = RoutedMLP(spec, spec.mixture, Split(ALONE), ALONE, ALONE)
    generator = torch.Generator().manual_seed(3)
    for value in mlp.parameters():
        value.data.normal_(0.0, 0.3, generator=generator)
    return mlp


def test_the_lower_of_equally_probable_experts_comes_first() -> None:
    mlp = routed(0.0)
    mlp.router.weight.data[2] = mlp.router.weight.data[5]
    chosen, weights = mlp.router(torch.randn(64, 32), Context())
    assert chosen.shape == weights.shape == (64, 2)
    both = [row for row in chosen.tolist() if {2, 5} & set(row)]
    assert both and all(5 not in row or row == [2, 5] for row in both)


def test_each_token_gets_what_its_experts_make() -> None:
    """Compared with the definition, token by token."""
    mlp, x = routed(0.0), torch.randn(2, 5, 32)
    made = mlp(x, Context()).flatten(0, 1)
    experts = mlp.experts
    for token, row in enumerate(x.flatten(0, 1)):
        likely = (mlp.router.weight @ row).softmax(0)
        best = likely.topk(2)
        wanted = torch.zeros(32)
        for share, number in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up, down = (m.weight[number] for m in (experts.gate, experts.up, experts.down))
            wanted += share * (down @ (nn.functional.silu(gate @ row) * (up @ row)))
        torch.testing.assert_close(made[token], wanted, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_that_of_its_formula() -> None:
    mlp, x, each = routed(0.5), torch.randn(3, 7, 32), torch.tensor([1.0, 0.0, 2.0])
    before, _ = mlp.router(x.flatten(0, 1), Context())
    mlp(x, Context(balance=each)).sum().backward()
    with_loss = mlp.router.weight.grad
    assert with_loss is not None
    tally, mlp.router.weight.grad = mlp.router.tally.clone(), None
    assert (
        tally.tolist() == torch.bincount(before.view(3, -1)[[0, 2]].flatten(), minlength=8).tolist()
    )
    loss = torch.zeros(())
    for sample, weight in zip(x, each, strict=True):
        likely = (sample @ mlp.router.weight.t()).softmax(-1)
        often = torch.bincount(likely.topk(2).indices.flatten(), minlength=8) * 8 / (2 * 7)
        loss = loss + weight * 0.5 * (often * likely.mean(0)).sum()
    (mlp(x, Context()).sum() + loss).backward()
    torch.testing.assert_close(mlp.router.weight.grad, with_loss)


@pytest.mark.parametrize(("dense", "every"), [([], 1), ([0, 2], 1), ([], 2), ([3], 2), ([], 9)])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_layers_have_experts_where_transformers_gives_them(
    family: str, dense: list[int], every: int
) -> None:
    section = {**MODELS[family], "mlp_only_layers": dense, "decoder_sparse_step": every}
    mixture = read_spec(section).mixture
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**section))
    theirs = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert theirs == ([] if mixture is None else [*mixture.layers])
