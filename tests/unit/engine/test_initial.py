"""Initial weights of a stage that was built without memory (megalite/engine/initial.py), in one process."""

import pytest
import torch

from megalite.engine.initial import _turns, make_whole
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed, zero_buffers
from tests.small_models import MODELS

CPU = torch.device("cpu")


def on_meta(model: str) -> Stage:
    with torch.device("meta"):
        return Stage(read_spec(MODELS[model]), Grid())


@pytest.mark.parametrize("model", ["mixtral", "gpt2"])
def test_values_are_those_of_a_stage_with_memory(model: str) -> None:
    stage, whole = on_meta(model), Stage(read_spec(MODELS[model]), Grid()).initialise(7)
    parameters = list(stage.parameters())
    make_whole(stage, Grid(), torch.float32, CPU, seed=7)
    zero_buffers(stage, CPU)
    # The optimizer's groups hold these objects.
    assert all(one is other for one, other in zip(stage.parameters(), parameters, strict=True))
    pairs = zip(placed(stage), placed(whole), strict=True)
    for (value, place), (wanted, wanted_place) in pairs:
        assert place == wanted_place and torch.equal(value, wanted), place.name
    for name, buffer in stage.named_buffers():
        assert buffer.device == CPU and not buffer.any(), name


def test_without_a_seed_nothing_is_drawn() -> None:
    stage = on_meta("llama")
    make_whole(stage, Grid(), torch.bfloat16, CPU, seed=None)
    for value, place in placed(stage):
        wanted = place.fill if place.std is None else 0.0
        assert value.dtype == torch.bfloat16 and (value == wanted).all(), place.name


def test_in_each_turn_every_rank_draws_one() -> None:
    assert [list(turn) for turn in _turns("abcdefg", 3)] == [
        ["a", "b", "c"],
        ["d", "e", "f"],
        ["g"],
    ]
