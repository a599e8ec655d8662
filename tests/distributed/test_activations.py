"""Compares plan/activations.py with autograd: what each part of a model saves for backward. Storages count once,
parameters do not count."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.model.chunks import Cut
from megalite.model.context import Context
from megalite.model.dropout import Randomness
from megalite.model.families import read_spec
from megalite.model.head import Head
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute, Stage
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Grid
from megalite.parallel.loss import IN_CACHE
from megalite.plan.activations import (
    Forward,
    Table,
    angles_table,
    embedding_table,
    head_table,
    layer_table,
    logits_bytes,
    total,
)
from megalite.plan.chunk_tables import ChunkPart, chunk_table
from megalite.plan.stacks import stack_chunk_table
from tests.allocations import peak_bytes
from tests.families import FAMILY_CONFIGS, VOCABULARY
from tests.ranks import run_ranks

BATCH, LENGTH, SOURCE = 3, 14, 8  # the length is even for sequence parallelism over 2
WITHIN = 0.02  # equal to the byte on the CPU; other attention kernels keep a little more or less
DROPPING = {
    "gpt2": {**FAMILY_CONFIGS["gpt2"], "resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1},
    "llama": {**FAMILY_CONFIGS["llama"], "attention_dropout": 0.2},
    "bert": {
        **FAMILY_CONFIGS["bert"],
        "hidden_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.1,
    },
    "modernbert": {**FAMILY_CONFIGS["modernbert"], "attention_dropout": 0.1},
}
Case = tuple[str, dict[str, Any], torch.dtype, Recompute, bool]
"""A name, a model, its type, its recompute choice and whether samples are packed documents."""


def cases(alone: bool, sequence: bool) -> list[Case]:
    every: list[Recompute] = [0, "selective", 2, 1] if alone or sequence else [0]
    result: list[Case] = []
    names = ("llama", "gpt2", "phi", "bert", "modernbert", "qwen2_moe", "qwen3_moe")
    for name, dtype, recompute in product(names, (torch.float32, torch.bfloat16), every):
        result.append((name, FAMILY_CONFIGS[name], dtype, recompute, False))
    for (name, config), recompute in product(DROPPING.items(), every):
        result.append((f"{name} dropout", config, torch.bfloat16, recompute, True))
    result.append(("bert dropout", DROPPING["bert"], torch.float32, 0, False))
    if alone:
        for name, config in FAMILY_CONFIGS.items():
            if config["model_type"] == "t5":  # below
                continue
            result.append((name, config, torch.float16, 0, False))
            result.append((name, config, torch.bfloat16, "selective", True))
    return result


def saved(parameters: set[int], forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of the storages that autograd keeps of a forward pass, and its result."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


def measured(
    config: dict[str, Any],
    grid: Grid,
    dtype: torch.dtype,
    recompute: Recompute,
    packed: bool,
    sequence: bool,
) -> tuple[list[int], int]:
    """Bytes of embedding, each layer and head by themselves; and of the whole stage."""
    spec = read_spec(config)
    stage = Stage(spec, grid, None, recompute, sequence).initialise(1).to(dtype)
    parameters = {value.untyped_storage().data_ptr() for value in stage.parameters()}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    documents = (
        (torch.rand(BATCH, LENGTH, generator=generator) < 0.3).long().cumsum(1) if packed else None
    )
    balance = torch.ones(BATCH)
    parameters.add(balance.untyped_storage().data_ptr())  # of the batch
    samples = Randomness(1, 1, torch.arange(BATCH))
    context = Context(randomness=samples, documents=documents, balance=balance)
    whole, _ = saved(parameters, lambda: stage(ids, ids, context))
    (chunk,) = stage.chunks.values()
    if chunk.recompute_every:  # whole layers: by themselves they keep everything
        return [], whole
    assert stage.embedding is not None and stage.head is not None
    first, hidden = saved(parameters, lambda: stage.embedding(ids, context))  # type: ignore[misc]
    blocks = [saved(parameters, lambda b=b: b(hidden, context))[0] for b in chunk.blocks.values()]  # type: ignore[union-attr]
    last, _ = saved(parameters, lambda: stage.head(hidden, ids))  # type: ignore[misc]
    return [first, *blocks, last], whole


def predicted(
    spec: TransformerSpec,
    grid: Grid,
    dtype: torch.dtype,
    recompute: Recompute,
    packed: bool,
    sequence: bool,
    compiled: bool = False,
) -> tuple[list[Table], int]:
    split = Split(grid.tensor, sequence)
    at = Forward(BATCH, LENGTH, dtype, split, packed, compiled=compiled)
    layers = [  # each layer by itself saves its angles
        layer_table(spec, i, at, recompute == "selective") | angles_table(spec, [i], at)
        for i in range(spec.num_layers)
    ]
    kept = chunk_table(
        spec, ChunkPart(range(spec.num_layers), first=True, last=True), recompute, at
    )
    if recompute not in (0, "selective"):
        # Kept by the context with which backward calls the layers again: no hook sees them.
        del kept["angles"]
    return [embedding_table(spec, at), *layers, head_table(spec, at)], total(kept)


def of_stacks(rank: int, world_size: int, every: int) -> list[str]:
    """Chunks of encoder-decoders that are not within bounds: all layers, and parts of a pipeline. every: the
    stride through the combinations of choices; with 3 any two choices still meet."""
    grid, wrong, configs = Grid.build(1, world_size) if world_size > 1 else Grid(), [], {}
    for name in ("t5", "t5 original"):
        configs[name] = FAMILY_CONFIGS[name]
        configs[f"{name} dropout"] = {**FAMILY_CONFIGS[name], "dropout_rate": 0.2}
    dtypes, recomputes = (torch.float32, torch.bfloat16), (0, "selective", 2, 1)
    choices = list(product(configs.items(), dtypes, recomputes, (False, True)))
    for (name, config), dtype, recompute, filled in choices[::every]:
        spec = read_spec(config)
        count, first = spec.num_layers, spec.encoder_layers
        at = Forward(BATCH, LENGTH, dtype, Split(grid.tensor), filled, source=SOURCE)
        for part in (
            ChunkPart(range(count), True, True),
            ChunkPart(range(first), True, False),
            ChunkPart(range(first, count), False, True),
            ChunkPart(range(count, count), False, True),
        ):
            held = saved_of_part(spec, grid, part, recompute, at)
            table = stack_chunk_table(spec, part, recompute, at)
            table.pop("angles", None)  # kept by the context: no hook sees them
            if held != pytest.approx(total(table), rel=WITHIN):
                label = f"{name} {dtype} {recompute} {part} filled {filled} of {world_size}"
                wrong.append(f"{label}: saved {held}, predicted {total(table)}: {table}")
    return wrong


def saved_of_part(
    spec: TransformerSpec, grid: Grid, part: ChunkPart, recompute: Recompute, at: Forward
) -> int:
    """Bytes that autograd keeps of a chunk's forward."""
    rest = range(part.layers.stop, spec.num_layers) if part.first else range(part.layers.start)
    layers = [part.layers, rest] if part.first else [rest, part.layers]
    layers = layers[:1] if part.first and part.last else layers
    cut = Cut((0,) * len(layers), tuple(layers))
    stage = Stage(spec, grid, cut, recompute).initialise(1).to(at.dtype)
    context, ids = source_context(at.documents)
    hidden = torch.randn(BATCH, LENGTH, spec.hidden_size, dtype=at.dtype, requires_grad=True)
    own = {value.untyped_storage().data_ptr() for value in stage.parameters()}
    x, labels = ids if part.first else hidden, ids if part.last else None
    return saved(own, lambda: stage(x, labels, context, 0 if part.first else 1))[0]


def source_context(filled: bool) -> tuple[Context, Tensor]:
    """A pass over sources of SOURCE tokens, some of them padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    documents = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    documents[1, SOURCE - 3 : SOURCE] = 1
    samples = Randomness(1, 1, torch.arange(BATCH))
    found = documents if filled else None
    return Context(randomness=samples, documents=found, source=SOURCE), ids


def on_ranks(rank: int, world_size: int, sequences: tuple[bool, ...]) -> list[str]:
    """The parts that are not within bounds, as text."""
    grid, wrong = Grid.build(1, world_size) if world_size > 1 else Grid(), []
    chosen = [
        (sequence, case) for sequence in sequences for case in cases(world_size == 1, sequence)
    ]
    for sequence, (name, config, dtype, recompute, packed) in chosen:
        spec = read_spec(config)
        parts, whole = measured(config, grid, dtype, recompute, packed, sequence)
        tables, stage = predicted(spec, grid, dtype, recompute, packed, sequence)
        label = f"{name} {dtype} {recompute} documents {packed} sequence {sequence} rank {rank} of {world_size}"
        for number, (size, table) in enumerate(zip(parts, tables, strict=bool(parts))):
            if size != pytest.approx(total(table), rel=WITHIN):
                wrong.append(
                    f"{label}, part {number}: saved {size}, predicted {total(table)}: {table}"
                )
        if whole != pytest.approx(stage, rel=WITHIN):
            wrong.append(f"{label}: saved {whole}, predicted {stage}")
    return wrong


@pytest.mark.parametrize("rows", [13, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_logits_of_a_chunk(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's peak in forward is what it keeps plus a chunk's logits."""
    monkeypatch.setattr("megalite.parallel.loss.LEAST_ROWS", rows)
    spec = replace(read_spec(FAMILY_CONFIGS["llama"]), vocabulary_size=20_000, hidden_size=4)
    at = Forward(1, 200, dtype, Split(Grid().tensor))
    head = Head(spec, at.split, None, 0.0).to(dtype)
    hidden, labels = torch.randn(1, 200, 4, dtype=dtype), torch.randint(0, 20_000, (1, 200))
    kept: list[Tensor] = []
    peak = peak_bytes(lambda: kept.append(head(hidden, labels)))
    predicted = total(head_table(spec, at)) + logits_bytes(spec, at)
    block = 4 * IN_CACHE if dtype == torch.bfloat16 else 0
    weight = 4 * 20_000 * 4 if dtype == torch.float16 else 0
    assert peak == pytest.approx(predicted + block + weight, rel=0.1)


def test_one_rank() -> None:
    assert not on_ranks(0, 1, (False,))


def test_encoder_decoders_on_one_rank() -> None:
    assert not of_stacks(0, 1, every=1)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_encoder_decoders_on_tensor_2(every: int) -> None:
    wrong = [line for lines in run_ranks(2, of_stacks, every) for line in lines]
    assert not wrong, "\n".join(wrong)


def test_tensor_2_with_and_without_sequence_parallelism() -> None:
    wrong = [line for lines in run_ranks(2, on_ranks, (True, False)) for line in lines]
    assert not wrong, "\n".join(wrong)
