"""Weights from a source into a module on the meta device (megalite/checkpoint/weights.py)."""

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.weights import load_module, load_onto
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from tests.families import FAMILY_CONFIGS

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])  # tied; with routers, which have buffers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_on_meta_gets_what_a_whole_one_gets(family: str, dtype: torch.dtype) -> None:
    spec = read_spec(FAMILY_CONFIGS[family])
    drawn = Stage(spec, Grid()).initialise(seed=3)
    values = {placement.name: value.detach() for value, placement in placed(drawn)}
    reads = []

    def read(name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        reads.append(name)
        return values[name]

    whole = Stage(spec, Grid())
    load_module(read, whole)
    whole = whole.to(dtype)
    with torch.device("meta"):
        stage = Stage(spec, Grid())
    before = [*stage.parameters()]
    reads.clear()
    load_onto(read, stage, dtype, CPU)
    assert sorted(reads) == sorted(values), "each tensor is read once"
    assert [*map(id, stage.parameters())] == [*map(id, before)], "ties are kept"
    for one, two in zip(stage.parameters(), whole.parameters(), strict=True):
        assert one.dtype == dtype and one.equal(two)
    assert all(not buffer.is_meta for buffer in stage.buffers())
    for _, placement in placed(stage):
        assert placement.name in values
