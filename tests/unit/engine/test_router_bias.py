"""Biases that balance experts (megalite/engine/router_bias.py), compared with the paper's rule, in one process."""

import pytest
import torch

from megalite.checkpoint.files import ROUTER_BIAS
from megalite.engine import router_bias
from megalite.engine.router_bias import RouterBias
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from tests.small_models import MODELS

CPU = torch.device("cpu")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(router_bias.dist, "all_reduce", lambda counts: None)
    return Stage(read_spec(MODELS["qwen3_moe"]), Grid())  # 8 experts in layers 0, 2 and 3


def test_an_expert_below_the_mean_goes_up_and_one_above_it_down(stage: Stage) -> None:
    bias = RouterBias(stage, Grid(), CPU, rate=0.25)
    for layer, router in stage.routers.items():
        router.tally.copy_(torch.tensor([9, 0, 3, 3, 3, 3, 3, 0]) if layer == 2 else 4)
    bias.move()
    bias.move()
    # In layer 2 the mean is 3; in the other layers every expert has the mean.
    wanted = [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    assert stage.routers[2].bias.tolist() == wanted
    assert not stage.routers[0].bias.any() and not stage.routers[3].bias.any()
    assert bias.state == {ROUTER_BIAS: [[0.0] * 8, wanted, [0.0] * 8]}


def test_a_checkpoint_gives_them_back_or_takes_them_away(stage: Stage) -> None:
    bias = RouterBias(stage, Grid(), CPU, rate=0.25)
    assert bias.state == {}
    rows = [[float(8 * row + expert) for expert in range(8)] for row in range(3)]
    bias.restore({ROUTER_BIAS: rows})
    assert bias.state == {ROUTER_BIAS: rows}
    assert [router.bias.tolist() for router in stage.routers.values()] == rows
    bias.restore({})
    assert bias.state == {} and not any(router.bias.any() for router in stage.routers.values())


def test_without_a_rate_no_rank_asks_the_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = RouterBias(stage, Grid(), CPU, rate=0.0)
    monkeypatch.setattr(router_bias.dist, "all_reduce", lambda counts: pytest.fail("asked"))
    stage.routers[0].tally[0] = 5
    bias.move()
    assert bias.state == {}


def test_ranks_of_the_tensor_axis_have_counted_the_same(stage: Stage) -> None:
    grid = Grid.at(0, 1, 1, 2)
    for router in stage.routers.values():
        router.tally.fill_(6)
    assert (router_bias.expert_counts(stage, grid, CPU) == 3).all()
