"""Loads weights on all ranks together: every rank reads the ranges that it holds, from a checkpoint of any layout or
from a Hugging Face folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.checkpoint.boxes import boxes_of_shard
from megalite.checkpoint.files import WEIGHT, Checkpoint, verify
from megalite.errors import CheckpointError, UserError
from megalite.parallel.layers import Shard, materialise, placed, zero_buffers

T = TypeVar("T")
ReadBox = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]
"""A source of weights: (our full name, offsets, shape) -> that box."""


def together(work: Callable[[], T]) -> T:
    """Calls `work` on every rank and returns its result (collective). If it raises UserError on any rank, every rank
    raises the first of these errors: a rank that failed alone would leave the others waiting for it."""
    results: list[T] = []
    own: UserError | None = None
    try:
        results.append(work())
    except UserError as error:
        own = error
    errors = [own]
    if dist.is_initialized():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, own)
    for error in errors:
        if error is not None:
            error.agreed = True
            raise error
    return results[0]


def open_together(path: Path) -> Checkpoint:
    """Opens a checkpoint on every rank; its files are checked once, divided among the ranks (collective). Every rank
    raises CheckpointError if any of them finds damage."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def opened() -> Checkpoint:
        verify(path, rank, size)
        return Checkpoint.open(path, rank, size)

    return together(opened)


def load_shards(checkpoint: Checkpoint, shards: Sequence[Shard], moments: bool) -> None:
    """Fills master weights, and with `moments` also moments, with the checkpoint's values (collective over the
    world)."""

    def fill() -> None:
        for shard in shards:
            for kind, values in {
                WEIGHT: shard.master,
                **(shard.state if moments else {}),
            }.items():
                _fill(checkpoint, shard, kind, values)

    together(fill)


def _fill(checkpoint: Checkpoint, shard: Shard, kind: str, values: Tensor) -> None:
    placement = shard.placement
    stored = checkpoint.shape(placement.name, kind)
    if stored != placement.full_shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {kind}/{placement.name}: shape {list(stored)} in the checkpoint, "
            f"{list(placement.full_shape)} in the model: must be equal"
        )
    for box in boxes_of_shard(
        placement.full_shape, placement.shape, placement.offsets, shard.start, values.detach()
    ):
        checkpoint.read_into(box.values, placement.name, box.offsets, kind)


class Named(Protocol):
    """A source of weights that lists their names."""

    folder: Path

    @property
    def names(self) -> list[str]: ...


def check_names(source: Named, names: Sequence[str]) -> None:
    """Raises CheckpointError if a source has a tensor that the model does not have: it belongs to another model."""
    for name in sorted(set(source.names) - set(names)):
        raise CheckpointError(f"{source.folder}: {name}: the model has no such tensor")


def load_module(read: ReadBox, module: nn.Module) -> None:
    """Fills a module's parameters from any source, tensor by tensor, without an engine or moments (collective)."""

    def fill() -> None:
        for value, placement in placed(module):
            value.copy_(read(placement.name, placement.offsets, placement.shape))

    with torch.no_grad():
        together(fill)


def load_onto(read: ReadBox, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module on the meta device its memory and its values, from any source, in `dtype` on `device`
    (collective). Main memory holds one tensor of the source at a time."""

    def fill() -> None:
        for value, placement in placed(module):
            content = torch.empty(placement.shape, dtype=dtype, device=device)
            content.copy_(read(placement.name, placement.offsets, placement.shape))
            materialise(value, content)

    zero_buffers(module, device)
    with torch.no_grad():
        together(fill)


def load_shards_from(read: ReadBox, shards: Sequence[Shard]) -> None:
    """Fills master weights from any source, box by box (collective)."""

    def fill() -> None:
        for shard in shards:
            placement = shard.placement
            for box in boxes_of_shard(
                placement.full_shape, placement.shape, placement.offsets, shard.start, shard.master
            ):
                box.values.copy_(read(placement.name, box.offsets, tuple(box.values.shape)))

    together(fill)
