"""Predicts the time of a step: it plays the schedule's program with the seconds of each chunk's actions (work.py,
sharing.py). Only messages of the pipe axis overlap with computing. Next: rank_memory.py.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megalite.pipeline.lengths import KINDS, Lengths
from megalite.pipeline.pipeline_plan import PipelinePlan
from megalite.plan.sharing import Held, Sharing
from megalite.plan.work import PARTS, Work

# Micro-batches per stage that are played; each further one takes the busiest rank's time.
PLAYED = 4


@dataclass(frozen=True)
class StepTime:
    """seconds: of a step. parts: its seconds by what they are spent on (PARTS, `update`, `bubble`), averaged over the
    pipe axis. bubble: the bubble's share of the step."""

    seconds: float
    parts: dict[str, float]
    bubble: float


def hop_seconds(work: Work, pipe: int, copies: int) -> float:
    """Seconds of a message between neighbours on the pipe axis. copies: ranks that hold a weight."""
    if pipe == 1:
        return 0.0
    near = copies * work.tensor < work.device.node_ranks
    link = work.device.node if near else work.device.network
    return link.seconds + link.send * work.hidden_bytes / link.bytes_per_second


@lru_cache(maxsize=256)
def lengths_of(plan: PipelinePlan, micro_batches: int) -> Lengths:
    """The plan's program, ready to be played with seconds for its actions."""
    return Lengths(plan.program(micro_batches))


def played_micro_batches(plan: PipelinePlan, micro_batches: int) -> int:
    """Number of micro-batches of a step that are played; with more of them a rank holds no more."""
    return min(micro_batches, PLAYED * plan.pipe)


def step_time(
    work: Work, plan: PipelinePlan, sharing: Sharing, micro_batches: int, weights: list[Held]
) -> StepTime:
    """The predicted time of a step. weights: elements of each pipe rank."""
    chunks = [
        chunk_seconds(work, plan, chunk, sharing, weights, micro_batches > 1)
        for chunk in range(len(plan.cut.home))
    ]
    if plan.pipe > 1:
        chunks = [chunk / work.device.pipe_share for chunk in chunks]
    played = played_micro_batches(plan, micro_batches)
    lengths = lengths_of(plan, played)
    length = _played_seconds(lengths, chunks, hop_seconds(work, plan.pipe, sharing.ranks))
    # Seconds of one micro-batch, by rank and part.
    busy = np.zeros((plan.pipe, len(PARTS)))
    for chunk, home in enumerate(plan.cut.home):
        busy[home] += (lengths.counts[:, chunk, None] * chunks[chunk]).sum(axis=0) / played
    length += (micro_batches - played) * float(busy.sum(axis=1).max())
    # Ranks that share cores use each other's idle time: a step takes at least all their work divided by the cores.
    ranks = plan.pipe * sharing.ranks * work.tensor
    shared = work.device.ranks_a_core(ranks)
    spent = busy.mean(axis=0) * micro_batches * shared
    length = max(length, float(spent.sum()))
    parts: dict[str, float] = dict(zip(PARTS, spent.tolist(), strict=True))
    parts["bubble"] = max(0.0, length - sum(parts.values()))  # rounding gives -1e-16 on one rank
    ends = [sharing.end(work, held, ranks) for held in dict.fromkeys(weights)]
    longest = max(ends, key=lambda end: sum(end.values()))
    end = {part: shared * seconds for part, seconds in longest.items()}
    for part in ("data", "engine"):
        parts[part] += end[part]
    parts["update"] = end["update"]
    seconds = length + sum(end.values())
    return StepTime(seconds, parts, parts["bubble"] / seconds)


def _played_seconds(lengths: Lengths, chunks: list[np.ndarray], hop: float) -> float:
    """Seconds of a program. chunks: [kind, part] of each chunk; hop: of a message between stages."""
    totals = [chunk.sum(axis=1) for chunk in chunks]
    return lengths.of(lambda kind, chunk: float(totals[chunk][KINDS.index(kind)]), hop)


def chunk_seconds(
    work: Work,
    plan: PipelinePlan,
    chunk: int,
    sharing: Sharing,
    weights: list[Held],
    several: bool,
) -> np.ndarray:
    """[kind, part]: seconds of a chunk's actions. several: as in Sharing.micro."""
    layers, home = plan.cut.layers[chunk], plan.cut.home[chunk]
    result = work.layers[layers.stop] - work.layers[layers.start]
    if chunk == 0:
        result = result + work.embedding
    if chunk == plan.cut.last_chunk:
        result = result + work.head
    own = weights[home].part(plan.cut.home.count(home))
    return result + sharing.micro(work, own, several)
