"""A dry run's first two levels: every kind of rank of the world in one process, without memory for weights.

Ranks: the stage of each pipe rank on torch's meta device, which has shapes and no data, forward and backward, over fake
process groups; what it sends is counted as in a real run (parallel/traffic.py). Schedule: the program of the real
number of micro-batches, and the order of its messages under NCCL's rules (pipeline/). The third level, messages of
every rank, needs the engine: prove/messages.py.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import Config
from megalite.errors import MegaliteError
from megalite.model.context import Context
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.rows import Rows
from megalite.parallel.traffic import Traffic
from megalite.pipeline.pipeline_plan import PipelinePlan
from megalite.plan.device_figures import GIB
from megalite.plan.rank_memory import MemoryTable, RankMemory, SizesByPlace
from megalite.plan.states import DTYPES, recompute_of


class DryRunError(MegaliteError):
    """The error that a run of this config would end with."""


@dataclass(frozen=True)
class PlaceReport:
    """A rank of the pipe axis. rank: the first global rank there. ranks: how many are like it. sent: bytes that it
    sends in the forward and backward of a micro-batch, by axis."""

    rank: int
    ranks: int
    layers: list[list[int]]
    memory: RankMemory
    sent: dict[str, int]


@dataclass
class DryRun:
    """The result of a dry run."""

    world_size: int
    experts: bool = False
    places: list[PlaceReport] = field(default_factory=list)
    schedule: str = "1f1b"
    bubble: float = 0.0
    micro_batches: int = 1
    pipe_messages: int = 0
    matched: dict[str, int] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "world_size": self.world_size,
            "places": [
                {
                    "rank": place.rank,
                    "ranks": place.ranks,
                    "layers": place.layers,
                    "bytes": place.memory.parts,
                    "bytes_by_rank": place.memory.total,
                    "sent_bytes_a_micro_batch": place.sent,
                }
                for place in self.places
            ],
            "schedule": self.schedule,
            "bubble": self.bubble,
            "micro_batches": self.micro_batches,
            "pipe_messages": self.pipe_messages,
            "matched": self.matched,
        }


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Makes this process a rank of a fake world, whose collectives return at once and change nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    hook = sys.excepthook  # init_process_group installs its own, which names the rank
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def dry_run(config: Config, spec: TransformerSpec, memory_bytes: float | None) -> DryRun:
    """Levels 1 and 2 for a resolved config; for a model with experts only memory and schedule. Raises DryRunError for
    the first thing that does not fit or match."""
    table = MemoryTable(config, spec, None, SizesByPlace())
    plan, places = table.plan, config.world_size // config.parallel.pipe
    result = DryRun(config.world_size, spec.mixture is not None)
    for pipe_rank, memory in enumerate(table.ranks):
        rank = pipe_rank * places
        sent: dict[str, int] = {}
        # The number of tokens of an expert is data, which meta tensors do not have.
        if spec.mixture is None:
            with fake_world(config.world_size, rank):
                sent = place_on_meta(config, spec, plan, rank)
        layers = [list(plan.cut.layers[chunk]) for chunk in plan.cut.chunks_of(pipe_rank)]
        result.places.append(PlaceReport(rank, places, layers, memory, sent))
    check_room(result, memory_bytes)
    if plan.pipe > 1:
        check_schedule(result, plan, config.accumulation_steps)
    return result


def check_room(result: DryRun, memory_bytes: float | None) -> None:
    """Raises DryRunError if the rank with the most memory has more than `memory_bytes`."""
    largest = max(result.places, key=lambda place: place.memory.total)
    if memory_bytes is not None and largest.memory.total > memory_bytes:
        needed, room = largest.memory.total / GIB, memory_bytes / GIB
        most = max(largest.memory.parts, key=lambda name: largest.memory.parts[name])
        raise DryRunError(
            f"rank {largest.rank}: needs {needed:.2f} GiB, {needed - room:.2f} GiB more than --memory-gib {room:g}; "
            f"{most}: {largest.memory.parts[most] / GIB:.2f} GiB; tools/plan.py finds a layout that fits"
        )


def check_schedule(result: DryRun, plan: PipelinePlan, micro_batches: int) -> None:
    """Raises ProgramError unless the schedule is complete, ordered and free of deadlock. Records its costs in
    `result`."""
    report = plan.report(micro_batches)
    plan.steps(micro_batches, 0)  # checks the messages of all ranks
    program = plan.program(micro_batches)
    result.schedule, result.bubble, result.micro_batches = (
        plan.schedule,
        report.bubble,
        micro_batches,
    )
    result.pipe_messages = sum(
        program.crosses(program.gives(action)) for _, action in program.all_actions()
    )


def place_on_meta(
    config: Config, spec: TransformerSpec, plan: PipelinePlan, rank: int
) -> dict[str, int]:
    """Runs forward and backward of a rank's chunks on shapes only; returns the bytes that they send, by axis. Raises
    DryRunError if a shape is not what the next chunk takes."""
    axes, length = config.parallel, config.data.sequence_length
    grid = Grid.build(plan.pipe, axes.tensor, axes.context, axes.expert)
    dtype = DTYPES[config.precision]
    with torch.device("meta"):
        recompute, sequence = recompute_of(config), config.parallel.sequence
        stage = Stage(spec, grid, plan.cut, recompute, sequence, config.train.z_loss).to(dtype)
    stage.eval()  # without dropout, which changes no shape
    shape = stage.hidden_shape(config.micro_batch_size, length)
    own = config.micro_batch_size, length // axes.context
    ids = torch.zeros(own, dtype=torch.int64, device="meta")
    rows = Rows.along(grid.context, length, axes.context_attention == "heads")
    with Traffic(grid) as traffic:
        for chunk in plan.cut.chunks_of(grid.pipe.rank):
            first, last = chunk == 0, chunk == plan.cut.last_chunk
            source = ids if first else torch.zeros(shape, dtype=dtype, device="meta")
            if not first:
                source.requires_grad_()
            context = Context(rows=rows, source=config.data.source_length)
            output = stage(source, ids if last else None, context, chunk)
            _check_chunk(stage, chunk, output, source, None if last else shape, rank)
    sent = dict(traffic.bytes)
    # The messages of a chunk: its output to the next chunk, its input's gradient to the previous one.
    home, own = plan.cut.home, plan.cut.chunks_of(grid.pipe.rank)
    crossing = sum(
        home[chunk + step] != home[chunk]
        for chunk in own
        for step in (-1, 1)
        if 0 <= chunk + step < len(home)
    )
    if crossing:
        sent["pipe"] = crossing * dtype.itemsize * shape[0] * shape[1] * shape[2]
    return sent


def _check_chunk(
    stage: Stage,
    chunk: int,
    output: Tensor,
    source: Tensor,
    shape: tuple[int, ...] | None,
    rank: int,
) -> None:
    """Runs a chunk's backward and checks the shapes of its output and gradients. shape: what the next chunk takes; None
    for the last chunk."""
    if shape is not None and tuple(output.shape) != shape:
        raise DryRunError(
            f"rank {rank}: chunk {chunk} returns shape {tuple(output.shape)}, chunk {chunk + 1} takes {shape}"
        )
    output.backward(torch.zeros_like(output))
    if source.is_floating_point() and (source.grad is None or source.grad.shape != source.shape):
        raise DryRunError(f"rank {rank}: chunk {chunk}: its input gets no gradient of its shape")
    for name, value in stage.chunks[str(chunk)].named_parameters():
        if value.grad is None or value.grad.shape != value.shape:
            raise DryRunError(f"rank {rank}: chunk {chunk}: {name} gets no gradient of its shape")
