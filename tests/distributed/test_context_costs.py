"""Costs of a sample divided over ranks: bytes kept for backward and bytes sent, compared with the predictions."""

from itertools import product
from typing import Any

import pytest
import torch

from megalite.model.context import Context
from megalite.model.dropout import Randomness
from megalite.model.families import read_spec
from megalite.model.transformer import Recompute, Stage
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Grid
from megalite.parallel.rows import Rows
from megalite.parallel.traffic import Traffic
from megalite.plan.activations import Forward, total
from megalite.plan.chunk_tables import ChunkPart, chunk_table
from tests.distributed.test_activations import DROPPING, WITHIN, saved
from tests.families import FAMILY_CONFIGS, VOCABULARY
from tests.ranks import run_ranks

BATCH, LENGTH = 3, 16
CONTEXT = 2
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40_000,
}
WINDOW = {**LLAMA, "model_type": "mistral", "sliding_window": 9}
Case = tuple[dict[str, Any], torch.dtype, Recompute, bool, bool, bool]
"""A model, its type, its recompute choice, whether heads are exchanged, whether samples are packed documents, and
sequence parallelism."""
CASES: list[Case] = [
    *product([LLAMA], [torch.float32, torch.bfloat16], [0, "selective"], [False, True], [False], [False, True]),
    *product([LLAMA], [torch.float32], [0, "selective"], [False, True], [True], [False]),
    *product([WINDOW], [torch.bfloat16], [0], [False, True], [False], [False]),
    *product([DROPPING["gpt2"]], [torch.bfloat16], [0, "selective"], [False, True], [True], [False]),
    *product([DROPPING["llama"]], [torch.float32], [0], [False, True], [False], [False]),
    *product([FAMILY_CONFIGS["bert"]], [torch.float32], [0], [False, True], [False], [False]),
]  # fmt: skip


def kept(case: Case, grid: Grid, batch: int, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward, and the prediction."""
    config, dtype, recompute, by_heads, packed, sequence = case
    spec, rows = read_spec(config), Rows.along(grid.context, length, by_heads)
    stage = Stage(spec, grid, None, recompute, sequence).initialise(1).to(dtype)
    parameters = {value.untyped_storage().data_ptr() for value in stage.parameters()}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    begins = torch.rand(batch, length, generator=generator) < 0.3
    documents = begins.long().cumsum(1) if packed else None
    randomness = Randomness(1, 1, torch.arange(batch))
    context = Context(documents=documents, randomness=randomness, rows=rows)
    own = ids if rows is None else rows.cut(ids, 1)
    found, loss = saved(parameters, lambda: stage(own, own, context))
    loss.backward()
    split, size = Split(grid.tensor, sequence), grid.context.size
    at = Forward(batch, length // size, dtype, split, packed, "cpu", size, by_heads)
    part = ChunkPart(range(spec.num_layers), first=True, last=True)
    return found, total(chunk_table(spec, part, recompute, at))


def kept_by_cases(rank: int, world_size: int) -> list[str]:
    grid, wrong = Grid.build(1, world_size // CONTEXT, CONTEXT), []
    for case in CASES:
        config, *others, by_heads, _, sequence = case
        heads = read_spec(config).num_heads // grid.tensor.size
        if (sequence and grid.tensor.size == 1) or (by_heads and heads % CONTEXT):
            continue
        found, predicted = kept(case, grid, BATCH, LENGTH)
        if found != pytest.approx(predicted, rel=WITHIN):
            wrong.append(f"{config['model_type']} {others} {case[3:]}: {found}, not {predicted}")
    return wrong


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_a_rank_keeps_of_divided_samples(world_size: int) -> None:
    wrong = [line for lines in run_ranks(world_size, kept_by_cases) for line in lines]
    assert not wrong, "\n".join(wrong)


def sent(rank: int, world_size: int, by_heads: bool) -> int:
    """Bytes that a forward and a backward send over the context axis."""
    spec, grid = read_spec(LLAMA), Grid.build(1, 1, world_size)
    rows = Rows(grid.context, LENGTH, by_heads)
    stage, own = Stage(spec, grid).initialise(1), torch.zeros(BATCH, rows.count, dtype=torch.long)
    with Traffic(grid) as traffic:
        stage(
            own, own, Context(rows=rows, randomness=Randomness(1, 1, torch.arange(BATCH)))
        ).backward()
    return traffic.bytes["context"]


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_sent_are_those_of_the_table(size: int) -> None:
    """docs/layouts.md. With 4 ranks and 2 KV heads, `heads` sends copies of them."""
    n, k, h = 4, 2, 12
    unit = 4 * 4 * 3 * BATCH * LENGTH * h  # 4 passes, fp32, 3 layers
    gather = unit * k * (size - 1) // size
    heads = unit * (n + max(k, size)) * (size - 1) // size**2
    assert run_ranks(size, sent, False) == [gather] * size
    assert run_ranks(size, sent, True) == [heads] * size


def kept_of_one_sample(rank: int, world_size: int, length: int) -> tuple[int, int]:
    grid = Grid.build(1, 1, world_size) if world_size > 1 else Grid()
    one_layer = {**LLAMA, "num_hidden_layers": 1}
    case: Case = (one_layer, torch.bfloat16, "selective", False, False, False)
    return kept(case, grid, 1, length)


@pytest.mark.parametrize("length", [4096, pytest.param(32_768, marks=pytest.mark.long)])
def test_a_long_sample_on_4_ranks_keeps_a_quarter(length: int) -> None:
    """Forward and backward of one sample; the gradient of the head's weight, which does not depend on its length, is in
    both."""
    ((whole, _),) = run_ranks(1, kept_of_one_sample, length, timeout_seconds=280)
    for part, predicted in run_ranks(4, kept_of_one_sample, length, timeout_seconds=280):
        print(f"{length} tokens: {whole} bytes on one rank, {part} on each of 4")
        assert part == pytest.approx(predicted, rel=WITHIN)
        assert part == pytest.approx(whole / 4, rel=0.02)
