"""Bytes of model states, predicted from the config alone: weights, gradients, optimizer state, and DeepSpeed's buffers.

Per parameter of a rank's (pipe, tensor) shard, with d replicas over data × context (in fp32 DeepSpeed's ZeRO keeps
master weights besides the equal weights):

                                ZeRO-0   ZeRO-1     ZeRO-2     ZeRO-3
    16 bits, sums in fp32                6 + 12/d   2 + 16/d   18/d
    fp32                        16       8 + 12/d   4 + 16/d   20/d

and exactly, byte for byte, with DeepSpeed's rounding:

- ZeRO-1 and 2 flatten a parameter group and pad it to a multiple of 2·d elements; a rank owns 1/d of that. In fp32 a
  rank has the whole gradients of the parameters that overlap its part, and zeros for the padding.
- ZeRO-3 gives each parameter's shard ⌈n/d⌉ elements, and if d > 1 keeps parameters of at most
  `stage3_param_persistence_threshold` elements whole besides their shards.
- With offload_optimizer ZeRO-1 and 2 hold gradients twice, on the device and in main memory, and have a third buffer
  for the updated weights, in their dtype, and two of the largest parameter's size.
- With its device nvme the optimizer's memory is buffers of the largest sub-group's size, plus the sub-groups that are
  too small for files; a file is rounded up to 1 KiB for each thread that reads it.
- Gradients are the most held after a micro-batch's backward: with ZeRO-1 and several micro-batches, all of them.
- An expert axis of e ranks divides experts by e; ZeRO shards the rest, a separate parameter group, over d / e ranks.
- The bucket in which gradients are reduced has `reduce_bucket_size` elements, however small the model; on a CPU, pages
  of it that are never written take no memory.

The parameters are those of a Stage on torch's meta device, which has shapes and no memory.
"""

import resource
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megalite.config import Config, resolved
from megalite.config.optimizer_rules import moments_kept
from megalite.config.rules import machine_has_gpu
from megalite.config.zero_keys import Aio
from megalite.model.parameter_groups import parameter_groups
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Recompute, Stage
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis, Grid
from megalite.pipeline.pipeline_plan import plan_of
from megalite.plan.activations import Forward
from megalite.plan.kept import Kept, kept_by
from megalite.topology.axes import in_short

FP32 = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default (runtime/zero/config.py)
FILE_UNIT_BYTES, LEAST_FILE_BYTES = 1024, 2**20  # DeepSpeed's (runtime/swap_tensor/utils.py)


@dataclass(frozen=True)
class States:
    """Bytes on one rank. buckets: DeepSpeed's buffers for reducing gradients, on the device. files: optimizer state in
    files."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    files: int = 0


def recompute_of(config: Config) -> Recompute:
    """`megalite.train.activation_checkpointing` as a Stage takes it."""
    kept = config.train.activation_checkpointing
    return {"none": 0, "full": 1}[kept] if kept in ("none", "full") else kept  # type: ignore[return-value]


def routed_spec(config: Config, spec: TransformerSpec) -> TransformerSpec:
    """The spec with the router settings of `megalite.train.router`."""
    router, mixture = config.train.router, spec.mixture
    if mixture is None or router is None:
        return spec
    return replace(spec, mixture=replace(mixture, balance=router.balance, z_loss=router.z_loss))


class GroupSizes(NamedTuple):
    """One of the optimizer's groups. numbers: elements of each parameter. replicas: the axis over which ZeRO shards
    it."""

    numbers: list[int]
    replicas: str


Sizes = list[GroupSizes]
"""All of the optimizer's groups."""


def parameter_sizes(config: Config, spec: TransformerSpec, grid: Grid) -> Sizes:
    """Sizes of a rank's stage; the data and context axes do not matter."""
    with torch.device("meta"):
        stage = Stage(spec, grid, plan_of(config, spec).cut)
    decay = config.optimizer.params.weight_decay
    groups = parameter_groups(stage, decay, config.train.parameter_groups)
    return [
        GroupSizes(
            [value.numel() for value in group["params"]],
            "expert_replica" if group.get("moe") else "replica",
        )
        for group in groups
    ]


def predicted_states(config: Config, sizes: Sizes, grid: Grid) -> States:
    """What a rank of a resolved config will hold; grid: its coordinates (`Grid.at`)."""
    e, d = DTYPES[config.precision].itemsize, grid.replica.size
    match config.zero_stage:
        case 0:
            count = all_numbers(sizes)
            return States(e * count, FP32 * count, _moments(config) * FP32 * count, 0)
        case 3:
            return _fully_sharded(config, sizes, e, d)
    parts = partition_sizes(sizes, grid)
    axes: list[Axis] = [getattr(grid, group.replicas) for group in sizes]
    gradients = owned_gradients(config, sizes, grid)
    if config.zero_stage == 1 and config.accumulation_steps > 1:
        gradients = max(gradients, FP32 * all_numbers(sizes))
    if offloads(config):
        gradients += (FP32 + e) * sum(parts) + offload_buffers(config, sizes)
    bucket = FP32 if config.zero_stage == 1 else e
    if config.zero.overlap_comm:
        bucket *= 2  # one is filled while the other is reduced
    return States(
        e * sum(axis.size * part for axis, part in zip(axes, parts, strict=True)),
        gradients,
        (1 + _moments(config)) * FP32 * sum(parts),
        bucket * bucket_numbers(config),
    )


def partition_sizes(sizes: Sizes, grid: Grid) -> list[int]:
    """Elements of a rank's partition of each of the optimizer's groups, with ZeRO-1 and 2."""
    axes: list[Axis] = [getattr(grid, group.replicas) for group in sizes]
    return [
        -(-sum(group.numbers) // (2 * axis.size)) * 2
        for group, axis in zip(sizes, axes, strict=True)
    ]


def owned_gradients(config: Config, sizes: Sizes, grid: Grid) -> int:
    """Bytes of the gradients that a rank owns with ZeRO-1 and 2 once they are reduced."""
    parts = partition_sizes(sizes, grid)
    if config.precision != "fp32":
        return FP32 * sum(parts)
    axes: list[Axis] = [getattr(grid, group.replicas) for group in sizes]
    return FP32 * sum(
        _owned(group.numbers, part, axis.rank)
        for group, part, axis in zip(sizes, parts, axes, strict=True)
    )


def offload_buffers(config: Config, sizes: Sizes) -> int:
    """Bytes of the buffers through which gradients are copied to main memory."""
    return 2 * DTYPES[config.precision].itemsize * max(max(group.numbers) for group in sizes)


def all_numbers(sizes: Sizes) -> int:
    """Elements of all parameters of a rank."""
    return sum(sum(group.numbers) for group in sizes)


def offloads(config: Config) -> bool:
    """Whether the optimizer's state is offloaded from the device."""
    offload = config.zero.offload_optimizer
    return offload is not None and offload.device != "none"


def _owned(sizes: list[int], part: int, rank: int) -> int:
    """Elements of the parameters that overlap a rank's part of their flat group, and of the part's padding."""
    first, last, start, count = rank * part, (rank + 1) * part, 0, 0
    for size in sizes:
        count += size if start < last and start + size > first else 0
        start += size
    return count + max(0, last - max(start, first))


def persistence_threshold(config: Config) -> int:
    """Parameters of at most this many elements stay whole with ZeRO-3."""
    threshold = config.zero.stage3_param_persistence_threshold
    return PERSISTENCE_THRESHOLD if threshold is None else threshold


def _fully_sharded(config: Config, sizes: Sizes, e: int, d: int) -> States:
    """The states with ZeRO-3."""
    threshold = persistence_threshold(config)
    numbers = [size for group in sizes for size in group.numbers]
    shards = sum(-(-size // d) for size in numbers)
    # With one rank the shard itself is whole.
    whole = sum(size for size in numbers if size <= threshold) if d > 1 else 0
    optimizer, files = (1 + _moments(config)) * FP32 * shards, 0
    if config.swap_folder is not None:
        swapped = swap_sizes(config, sizes, d)
        optimizer, files = sum(swapped.buffers) + swapped.memory, swapped.files
    return States(
        e * (shards + whole), FP32 * shards, optimizer, FP32 * bucket_numbers(config), files
    )


@dataclass(frozen=True)
class SwapSizes:
    """Bytes of a rank whose optimizer states are in files. buffers: of each that they are read into. memory: of the
    states that stay in memory because their sub-groups are small."""

    buffers: list[int]
    memory: int
    files: int


def swap_sizes(config: Config, sizes: Sizes, d: int) -> SwapSizes:
    """Sizes for a resolved config with device nvme. d: ranks over which ZeRO shards."""
    offload, aio = config.zero.offload_optimizer, config.document.aio or Aio.model_validate({})
    buffer_count = resolved(offload and offload.buffer_count)
    limit = resolved(config.zero.sub_group_size)
    unit = FILE_UNIT_BYTES * (aio.intra_op_parallelism or 1)
    least = max(LEAST_FILE_BYTES, aio.block_size or 0)
    groups = [FP32 * numbers for group in sizes for numbers in _sub_groups(group.numbers, d, limit)]
    rounded, kept = [-(-size // unit) * unit for size in groups], 1 + _moments(config)
    return SwapSizes(
        [max(rounded)] * buffer_count,
        kept * sum(size for size in groups if size < least),
        kept * sum(file for size, file in zip(groups, rounded, strict=True) if size >= least),
    )


def _sub_groups(sizes: list[int], d: int, limit: int) -> list[int]:
    """Elements of a rank in each sub-group of one of the optimizer's groups."""
    result, numbers = [], 0
    for size in sizes:
        numbers += -(-size // d)
        if numbers >= limit:
            result.append(numbers)
            numbers = 0
    return [*result, numbers] if numbers else result


def bucket_numbers(config: Config) -> int:
    """Elements of the bucket in which gradients are reduced; 0 without one."""
    if config.zero.contiguous_gradients is False:
        return 0
    return resolved(config.zero.reduce_bucket_size)


def _moments(config: Config) -> int:
    """Number of tensors that the optimizer keeps for each weight."""
    return moments_kept(config.optimizer)


def predicted_activations(config: Config, spec: TransformerSpec, grid: Grid) -> Kept:
    """The most that a rank's forwards keep for its backwards."""
    at = forward_of(config, grid)
    return kept_by(
        routed_spec(config, spec),
        plan_of(config, spec),
        grid.pipe.rank,
        recompute_of(config),
        at,
        config.accumulation_steps,
    )


def grid_at(config: Config, rank: int) -> Grid:
    """The coordinates of a rank of a resolved config."""
    parallel = config.parallel
    return Grid.at(
        rank,
        parallel.pipe,
        config.data_size,
        parallel.tensor,
        parallel.context,
        parallel.expert,
    )


def forward_of(config: Config, grid: Grid, device: str | None = None) -> Forward:
    """A micro-batch on a rank. device: "cpu" or "cuda"; default: this machine's."""
    return Forward(
        config.micro_batch_size,
        config.data.sequence_length // config.parallel.context,
        DTYPES[config.precision],
        Split(grid.tensor, config.parallel.sequence),
        config.data.reset_attention,
        device or ("cuda" if machine_has_gpu() else "cpu"),
        config.parallel.context,
        config.parallel.context_attention == "heads",
        grid.expert.size,
        config.train.compile,
        config.data.source_length,
        config.data.objective == "prefix",
    )


def memory_lines(config: Config, spec: TransformerSpec) -> list[str]:
    """The printed table of the bytes that each rank of a resolved config will hold; equal ranks share a line."""
    by_coordinates: dict[tuple[int, int], tuple[Sizes, int]] = {}
    ranks: dict[tuple[int, ...], list[int]] = {}
    for rank in range(config.world_size):
        grid = grid_at(config, rank)
        coordinates = grid.pipe.rank, grid.tensor.rank
        if coordinates not in by_coordinates:
            by_coordinates[coordinates] = (
                parameter_sizes(config, spec, grid),
                predicted_activations(config, spec, grid).bytes,
            )
        sizes, kept = by_coordinates[coordinates]
        states = predicted_states(config, sizes, grid)
        row = states.weights, states.gradients, states.optimizer, kept, states.buckets
        row += (states.files,) if config.swap_folder else ()
        ranks.setdefault(row, []).append(rank)
    names = {row: in_short(members) for row, members in ranks.items()}
    head = "bytes, predicted, of rank"
    width = max(len(head), *map(len, names.values()))
    columns = ["weights", "gradients", "optimizer", "activations", "bucket"]
    if config.swap_folder:
        columns.append("in files")
    lines = [f"{head:{width}}" + "".join(f"  {column:>16}" for column in columns)]
    return lines + [
        f"{name:{width}}" + "".join(f"  {size:16,}" for size in row) for row, name in names.items()
    ]


def peak_line(peaks: list[int]) -> str:
    """The peaks of all ranks in a line."""
    most, least = max(peaks), min(peaks)
    line = f"memory peak in the first step: {most / 2**30:.3f} GiB"
    if len(peaks) == 1:
        return line
    return (
        f"{line} on rank {peaks.index(most)}, {least / 2**30:.3f} GiB on rank {peaks.index(least)}"
    )


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on its device, or on the CPU its resident set, libraries included."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated()
