"""Bytes that a rank sends in a step, by axis: the formulas of docs/layouts.md. Next: search.py."""

from megalite.plan.activations import FP32
from megalite.plan.rank_memory import MemoryTable
from megalite.plan.sharing import Sharing
from megalite.plan.work import Work


def sent_bytes(work: Work, table: MemoryTable, sharing: Sharing) -> dict[str, float]:
    """Bytes sent along each axis by the pipe rank that sends the most. data: gradients and weights, over data ×
    context."""
    ranks = range(table.plan.pipe)
    layers = [_in_layers(work, table, rank) for rank in ranks]
    return {
        "pipe": max(_to_neighbours(work, table, rank) for rank in ranks),
        "data": max(_of_weights(work, table, sharing, rank) for rank in ranks),
        **{axis: max(sent[axis] for sent in layers) for axis in layers[0]},
    }


def _in_layers(work: Work, table: MemoryTable, rank: int) -> dict[str, float]:
    """Bytes sent within the forwards and backwards of a pipe rank, by axis."""
    plan, m, t = table.plan, table.config.accumulation_steps, work.tensor
    own = plan.cut.chunks_of(rank)
    layers = [layer for chunk in own for layer in plan.cut.layers[chunk]]
    routed = [work.spec.mixture_of(layer) for layer in layers]
    chosen = sum(mixture.chosen for mixture in routed if mixture is not None)
    recompute = table.config.train.activation_checkpointing
    ways = 2 if recompute in ("none", "selective") else 3  # forward, recomputed forward, backward
    hidden = work.dtype_bytes * work.tokens * work.spec.hidden_size
    ends = (0 in own) + (plan.cut.last_chunk in own)
    row = hidden * (work.expert - 1) / work.expert
    return {
        "tensor": m * 2 * hidden * (t - 1) / t * (2 * ways * len(layers) + ends),
        "context": m * len(layers) * (ways + (recompute == "selective")) * work.mixed_bytes,
        "expert": m * chosen * ways * 2 * row,
    }


def _of_weights(work: Work, table: MemoryTable, sharing: Sharing, rank: int) -> float:
    """Bytes of gradients, and of weights that ZeRO gathers."""
    m, e, held = table.config.accumulation_steps, work.dtype_bytes, table.weights[rank]
    gradients = FP32 * {0: 2, 1: 1}.get(sharing.zero, m)
    whole = {0: 0.0, 3: e * (2 * m + 1.0)}.get(sharing.zero, float(e))
    copies, own = sharing.ranks, sharing.ranks // sharing.expert
    numbers = held.shared * (copies - 1) / copies + held.routed * (own - 1) / own
    return (gradients + whole) * numbers


def _to_neighbours(work: Work, table: MemoryTable, rank: int) -> float:
    """Bytes sent to neighbouring chunks that are on another rank."""
    home, m = table.plan.cut.home, table.config.accumulation_steps
    near = [(chunk, chunk + step) for chunk in range(len(home)) for step in (-1, 1)]
    messages = sum(
        home[chunk] == rank and 0 <= other < len(home) and home[other] != rank
        for chunk, other in near
    )
    return m * work.hidden_bytes * messages
