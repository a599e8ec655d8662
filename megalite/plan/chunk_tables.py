"""What a chunk keeps of one micro-batch between its forward and its backward, and how much it recomputes, computed from
the tables of activations.py. Next: waiting_tables.py, for the time between the two halves of a backward.

Recomputing every n layers keeps only the input e·r of each group of n layers, and backward recomputes one group at a
time; `selective` keeps nothing of the core of attention. tests/distributed/test_activations.py compares each table with
what autograd saves.
"""

from dataclasses import dataclass

from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute
from megalite.plan.activations import (
    FP32,
    Forward,
    Table,
    angles_table,
    embedding_table,
    head_table,
    layer_table,
    total,
)


@dataclass(frozen=True)
class ChunkPart:
    """The part of a model that a chunk holds. first: it has the embedding; last: it has the head."""

    layers: range
    first: bool
    last: bool


def chunk_table(spec: TransformerSpec, part: ChunkPart, recompute: Recompute, at: Forward) -> Table:
    """What a chunk keeps of one micro-batch between its forward and its backward, in bytes by layer or part."""
    selective = recompute == "selective"
    every = 0 if selective else int(recompute)
    hidden = at.hidden(spec)
    table: Table = {}
    if part.first:
        table["embedding"] = total(embedding_table(spec, at))
    elif not (every and part.layers) and not _keeps_its_input(spec, part, at):
        table["from the chunk before"] = hidden
    for group in groups(part.layers, every):
        table[f"input of layers {group[0]} to {group[-1]}"] = hidden
    if not every:
        for layer in part.layers:
            table[f"layer {layer}"] = total(layer_table(spec, layer, at, selective))
    if part.layers:
        table["angles"] = total(angles_table(spec, part.layers, at))
    if part.last:
        table["final norm, head, loss"] = total(head_table(spec, at)) + FP32
    return table


def groups(layers: range, every: int) -> list[range]:
    """The groups of `every` layers that are recomputed together; none if it is 0."""
    if every == 0:
        return []
    return [layers[i : i + every] for i in range(0, len(layers), every)]


def recomputed_bytes(
    spec: TransformerSpec, layers: range, recompute: Recompute, at: Forward
) -> int:
    """The most bytes of activations that the backward of a chunk recomputes at a time."""
    whole = {layer: total(layer_table(spec, layer, at)) for layer in layers}
    if recompute == "selective":
        kept = {layer: total(layer_table(spec, layer, at, selective=True)) for layer in layers}
        return max((whole[layer] - kept[layer] for layer in layers), default=0)
    sums = (sum(whole[layer] for layer in group) for group in groups(layers, int(recompute)))
    return max(sums, default=0)


def _keeps_its_input(spec: TransformerSpec, part: ChunkPart, at: Forward) -> bool:
    """Whether the table of the first layer, or of the head alone, includes the hidden states that the chunk gets."""
    return not (part.layers and spec.norm_position in ("after", "sum") and at.split.divides)
