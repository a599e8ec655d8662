"""Router biases in a checkpoint's state (megalite/checkpoint/saved_bias.py)."""

import math
from typing import Any

import pytest
import torch

from megalite.checkpoint.files import ROUTER_BIAS
from megalite.checkpoint.saved_bias import bias_of, set_router_bias
from megalite.errors import CheckpointError
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from tests.small_models import MODELS

SPEC = read_spec(MODELS["qwen3_moe"])  # 8 experts in layers 0, 2 and 3
ZEROS = [0.0] * 8


@pytest.mark.parametrize(
    "values",
    [
        [ZEROS] * 2,
        [ZEROS[1:]] * 3,
        [ZEROS, ZEROS, ZEROS[1:]],
        [ZEROS, ZEROS, [math.nan, *ZEROS[1:]]],
        [ZEROS, ZEROS, [math.inf, *ZEROS[1:]]],
        [[[0.0]] * 8] * 3,
        "many",
        {"0": ZEROS},
        None,
        [[None] * 8] * 3,
        [["a"] * 8] * 3,
        [[10**400] * 8] * 3,
    ],
)
def test_values_that_are_not_the_models_biases_are_refused(values: Any) -> None:
    assert SPEC.mixture is not None
    rule = f"{ROUTER_BIAS} in the checkpoint's state: must be 3 lists of 8 finite numbers"
    with pytest.raises(CheckpointError, match=rule):
        bias_of({ROUTER_BIAS: values}, SPEC.mixture)


def test_each_layer_gets_its_own_in_fp32() -> None:
    stage = Stage(SPEC, Grid()).bfloat16()
    before = {layer: router.bias for layer, router in stage.routers.items()}
    set_router_bias(stage, {}, torch.device("cpu"))
    assert all(router.bias is before[layer] for layer, router in stage.routers.items())
    rows = [[layer + expert / 1000 for expert in range(8)] for layer in (0, 2, 3)]
    set_router_bias(stage, {ROUTER_BIAS: rows}, torch.device("cpu"))
    assert [*stage.routers] == [0, 2, 3]
    for row, router in zip(rows, stage.routers.values(), strict=True):
        assert router.bias.dtype == torch.float32 and router.bias.tolist() == pytest.approx(row)


def test_a_dense_model_takes_none() -> None:
    with torch.device("meta"):
        stage = Stage(read_spec(MODELS["llama"]), Grid())
    set_router_bias(stage, {ROUTER_BIAS: "anything"}, torch.device("cpu"))
