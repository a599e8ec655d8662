"""The most that the forwards of a rank keep for its backwards: the program determines how many micro-batches of each
chunk are held at once, chunk_tables.py the bytes of each."""

from dataclasses import dataclass

from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute
from megalite.pipeline.pipeline_plan import PipelinePlan
from megalite.plan.activations import Forward, Table, logits_bytes, total
from megalite.plan.chunk_tables import ChunkPart, chunk_table, recomputed_bytes
from megalite.plan.stacks import (
    rows_of,
    stack_chunk_table,
    stack_recomputed_bytes,
    stack_waiting_table,
)
from megalite.plan.waiting_tables import waiting_table
from megalite.programs.check import most_bytes


@dataclass(frozen=True)
class KeptChunk:
    """table: bytes of one micro-batch between F and its backward. waiting: between I and W. held, waits: how many of
    each there are when the rank keeps the most."""

    table: Table
    waiting: Table
    held: int
    waits: int


@dataclass(frozen=True)
class Kept:
    """Bytes on one rank. chunks: by number. again: what a backward recomputes at a time. logits: of a chunk of the
    loss, freed before its backward begins."""

    chunks: dict[int, KeptChunk]
    again: int
    logits: int

    @property
    def bytes(self) -> int:
        """The sum."""
        chunks = self.chunks.values()
        held = sum(
            total(chunk.table) * chunk.held + total(chunk.waiting) * chunk.waits for chunk in chunks
        )
        return held + max(self.again, self.logits)


def parts_of(plan: PipelinePlan, rank: int) -> dict[int, ChunkPart]:
    """The chunks of a rank of the pipe axis."""
    cut = plan.cut
    return {
        chunk: ChunkPart(cut.layers[chunk], first=chunk == 0, last=chunk == cut.last_chunk)
        for chunk in cut.chunks_of(rank)
    }


def kept_by(
    spec: TransformerSpec,
    plan: PipelinePlan,
    rank: int,
    recompute: Recompute,
    at: Forward,
    micro_batches: int,
) -> Kept:
    """What a rank of the pipe axis keeps in a step."""
    parts, program = parts_of(plan, rank), plan.program(micro_batches)
    table_of, waiting_of, again_of = chunk_table, waiting_table, recomputed_bytes
    if spec.stacks is not None:
        table_of, waiting_of, again_of = (
            stack_chunk_table,
            stack_waiting_table,
            stack_recomputed_bytes,
        )
    tables = {chunk: table_of(spec, part, recompute, at) for chunk, part in parts.items()}
    waiting = {chunk: waiting_of(spec, part, at) for chunk, part in parts.items()}
    most = most_bytes(program, rank, lambda c: total(tables[c]), lambda c: total(waiting[c]))
    again = max(again_of(spec, part.layers, recompute, at) for part in parts.values())
    head_rows = at if spec.stacks is None else rows_of(at, encoder=False)
    logits = logits_bytes(spec, head_rows) if any(part.last for part in parts.values()) else 0
    chunks = {
        chunk: KeptChunk(tables[chunk], waiting[chunk], *most.counts[chunk]) for chunk in parts
    }
    return Kept(chunks, again, logits)
