"""Every family against transformers' own model: logits and gradients on one rank and on pipe × tensor grids."""

from typing import Any

import pytest
import torch

from megalite.model.families import FAMILIES, read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import inference_cut
from tests.families import (
    COPIED,
    FAMILY_CONFIGS,
    FEW_KV_HEADS,
    Result,
    batch,
    forward_backward,
    full_gradients,
    hf_gradients,
    hf_model,
    load_hf,
)
from tests.ranks import run_ranks


def on_a_grid(
    rank: int, world_size: int, pipe: int, tensor: int, configs: list[dict[str, Any]]
) -> list[Result]:
    grid = Grid.build(pipe, tensor)
    results = []
    for config in configs:
        spec = read_spec(config)
        stage = load_hf(Stage(spec, grid, inference_cut(spec, pipe)), hf_model(config))
        results.append(forward_backward(stage, *batch()))
    return results


def check(results: list[Result], config: dict[str, Any]) -> None:
    """Compares the ranks of a grid with transformers."""
    logits, loss, gradients = hf_gradients(config)
    ours = torch.cat([part for part, _, _ in results if part is not None], dim=-1)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert max(value for _, value, _ in results) == pytest.approx(loss, rel=1e-5)
    tied = read_spec(config).tied
    sums = full_gradients(results)
    assert sums.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(
            sums[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
        )
    for _, _, held in results:  # a copy that does not count is equal to the one that does
        for name, (place, value) in held.items():
            if name not in COPIED or (name == "embedding.tokens.weight" and not tied):
                torch.testing.assert_close(value, place.cut(sums[name]), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_family_equals_transformers_on_one_rank(name: str) -> None:
    config = FAMILY_CONFIGS[name]
    stage = load_hf(Stage(read_spec(config), Grid()), hf_model(config))
    check([forward_backward(stage, *batch())], config)
    assert stage.spec.num_parameters == sum(
        value.numel() for value in hf_model(config).parameters() if value.requires_grad
    )


def test_every_family_has_a_small_config() -> None:
    assert {config["model_type"] for config in FAMILY_CONFIGS.values()} == set(FAMILIES)


def test_families_equal_transformers_on_pipe_2_tensor_2() -> None:
    configs = list(FAMILY_CONFIGS.values())
    results = run_ranks(4, on_a_grid, 2, 2, configs)
    for number, config in enumerate(configs):
        check([result[number] for result in results], config)


def test_fewer_key_value_heads_than_ranks_are_copies() -> None:
    """Tensor 4 and one or two key/value heads: copies are bitwise equal, with one process's gradient."""
    results = run_ranks(4, on_a_grid, 1, 4, FEW_KV_HEADS)
    for number, config in enumerate(FEW_KV_HEADS):
        check([result[number] for result in results], config)
        keys = [result[number][2]["layers.0.attention.key.weight"][0] for result in results]
        heads = config["num_key_value_heads"]
        assert [place.counted for place in keys] == [rank % (4 // heads) == 0 for rank in range(4)]
