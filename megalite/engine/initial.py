"""Initial weights of a rank's stage, written directly into the storage that the rank will use.

A stage is built without memory (on torch's meta device). Its parameters are then allocated one by one: whole with ZeRO
0 to 2, as a shard with ZeRO-3. At most one parameter is whole besides the shards, for a moment two copies of it: as it
is received, along the tensor axis before it is cut, and as ZeRO-3 pads it.

Values are parallel/layers.py's `initial_slice`, the same on every layout. All ranks with parts of the same parameters,
along the data and the tensor axis, share the work: of every n parameters on n ranks, each rank draws one and sends it
to the others. A run that gets its weights from a checkpoint draws nothing. Next: build.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from megalite.parallel.grid import ALONE, Axis, Grid
from megalite.parallel.layers import Placement, initial_slice, materialise, placed

T = TypeVar("T")
Receive = Callable[[nn.Parameter, Tensor | None, Axis, int], None]
"""Takes a parameter, this rank's slice of its values or None, the axis of the ranks that hold the same slice, and the
index on that axis of those that have the values."""


def make_whole(
    stage: nn.Module, grid: Grid, dtype: torch.dtype, device: torch.device, seed: int | None
) -> None:
    """Gives a stage on the meta device its weights, whole, for ZeRO 0 to 2 (collective over the data and tensor axes).
    seed: None if they come from elsewhere; they are then 0 or 1."""

    def receive(value: nn.Parameter, values: Tensor | None, axis: Axis, source: int) -> None:
        if values is not None:
            value.copy_(values)
        if axis.size > 1:
            dist.broadcast(_bytes_of(value), axis.ranks[source], group=axis.group)

    for value, placement in placed(stage):
        constant = placement.fill if placement.std is None else 0.0
        materialise(value, torch.full(placement.shape, constant, dtype=dtype, device=device))
    _fill(stage, grid, seed, dtype, device, receive)


def make_shards(
    stage: nn.Module,
    grid: Grid,
    keys: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
) -> None:
    """Gives a stage on the meta device its weights as ZeRO-3's shards (collective over the data and tensor axes).
    keys: DeepSpeed's config. seed: as in `make_whole`."""
    # On an empty module: this sets up DeepSpeed's conversion without any parameters. It also replaces F.linear by one
    # that does not keep a gathered weight for backward, as for an engine made of a module with whole weights.
    init = Init(
        module=nn.Module(),
        data_parallel_group=grid.get_data_parallel_group(),
        config_dict_or_path=keys,
        dtype=dtype,
        mpu=grid,
    )

    def receive(value: Any, values: Tensor | None, axis: Axis, source: int) -> None:
        shard = value.ds_tensor
        # On the device, since NCCL sends only its memory: with offload_param the shards are in main memory.
        whole = torch.zeros(shard.numel() * axis.size, dtype=dtype, device=device)
        if values is not None:
            whole[: values.numel()].copy_(values.reshape(-1))
        if axis.size > 1:
            # Not dist.scatter: NCCL has none, so torch sends a message from the source to each rank. With every rank as
            # a source once, each would connect to all others.
            dist.broadcast(_bytes_of(whole), axis.ranks[source], group=axis.group)
        shard.copy_(whole.narrow(0, axis.rank * shard.numel(), shard.numel()))

    for value, placement in placed(stage):
        whole = torch.empty(placement.shape, dtype=dtype, device=device)
        if placement.std is None:
            whole.fill_(placement.fill)
        materialise(value, whole)
        init._convert_to_deepspeed_param(value)
        value.partition()  # type: ignore[attr-defined]  # added by DeepSpeed
        if placement.std is not None:
            value.ds_tensor.zero_()  # type: ignore[attr-defined]  # padding stays 0
    _fill(stage, grid, seed, dtype, device, receive)


def _fill(
    stage: nn.Module,
    grid: Grid,
    seed: int | None,
    dtype: torch.dtype,
    device: torch.device,
    receive: Receive,
) -> None:
    """Draws the random parameters. seed: as in `make_whole`."""
    if seed is None:
        return
    values = [(value, placement) for value, placement in placed(stage) if placement.std is not None]
    kinds = sorted({(placement.replicas, placement.drawn_apart) for _, placement in values})
    for name, apart in kinds:
        axis: Axis = getattr(grid, name)
        # Experts are drawn and cut one at a time, since all of them may not fit into memory.
        tensor = ALONE if apart else grid.tensor
        of_kind = [
            (value, placement)
            for value, placement in values
            if (placement.replicas, placement.drawn_apart) == (name, apart)
        ]
        with torch.no_grad():
            for turn in _turns(of_kind, axis.size * tensor.size):
                _take_turn(turn, axis, tensor, seed, dtype, device, receive)


def _take_turn(
    turn: Sequence[tuple[nn.Parameter, Placement]],
    axis: Axis,
    tensor: Axis,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    receive: Receive,
) -> None:
    """Each rank draws one parameter of the turn, then all ranks receive their slices of all of them."""
    number, mine = axis.rank * tensor.size + tensor.rank, None
    # Before the first message, so that all ranks draw at the same time.
    if number < len(turn):
        placement = turn[number][1]
        drawn = placement if tensor.size == 1 else replace(placement, cuts=())
        mine = initial_slice(drawn, seed)
    for k, (value, placement) in enumerate(turn):
        source, index = divmod(k, tensor.size)
        part = mine if k == number else None
        if tensor.size > 1 and axis.rank == source:
            # Zeros for a dry run, whose groups send nothing.
            full = torch.zeros(placement.full_shape, dtype=dtype, device=device)
            part = placement.cut(_sent(full, part, tensor, index))
        receive(value, part, axis, source)


def _sent(full: Tensor, values: Tensor | None, axis: Axis, source: int) -> Tensor:
    """`full` with the values that the rank at index `source` of the axis has."""
    if values is not None:
        full.copy_(values)
    dist.broadcast(_bytes_of(full), axis.ranks[source], group=axis.group)
    return full


def _turns(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes, which every backend can send."""
    return tensor.detach().view(-1).view(torch.uint8)
