"""Loading, all ranks together: every rank reads the ranges that it holds, from a checkpoint of any layout or from
a Hugging Face folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from megalite.checkpoint.boxes import boxes_of_shard
from megalite.checkpoint.files import WEIGHT, Checkpoint, verify
from megalite.checkpoint.storage import BoxDict, BoxLoadPlanner, BoxReader
from megalite.errors import CheckpointError, UserError
from megalite.parallel.layers import Shard, placed

T = TypeVar("T")
ReadBox = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]
"""A source of weights: (our full name, first index, shape) -> that box."""


def together(work: Callable[[], T]) -> T:
    """What `work` makes, on every rank (collective). Where it raises UserError on any rank, every rank raises the first
    of these: a rank that failed alone would leave the others waiting for it."""
    made: list[T] = []
    own: UserError | None = None
    try:
        made.append(work())
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
    return made[0]


def open_together(path: Path) -> Checkpoint:
    """Opens a checkpoint on every rank; its files are checked once, shared out among the ranks (collective).
    Every rank raises CheckpointError where any of them found damage."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def opened() -> Checkpoint:
        verify(path, rank, size)
        return Checkpoint.open(path)

    return together(opened)


def load_shards(checkpoint: Checkpoint, shards: Sequence[Shard], moments: bool) -> None:
    """Fills masters, and moments where asked, with the checkpoint's values (collective over the world)."""
    wanted: BoxDict = {}
    for shard in shards:
        kinds = {WEIGHT: shard.master, **(shard.state if moments else {})}
        place = shard.placement
        for kind, values in kinds.items():
            # A name may be twice on a rank only if tied there, and then it is one parameter.
            wanted[f"{kind}/{place.name}"] = boxes_of_shard(
                place.full_shape, place.shape, place.offsets, shard.start, values
            )
    try:
        load(
            wanted,
            storage_reader=BoxReader(checkpoint.folder, checkpoint.index),
            planner=BoxLoadPlanner(),
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, CheckpointError):
                raise CheckpointError(f"{checkpoint.folder}: {failure}") from None
        raise


class Named(Protocol):
    """A source of weights that says which it has."""

    folder: Path

    @property
    def names(self) -> list[str]: ...


def check_names(source: Named, names: Sequence[str]) -> None:
    """CheckpointError where the model does not have all tensors of a source: it is of another model."""
    for name in sorted(set(source.names) - set(names)):
        raise CheckpointError(f"{source.folder}: {name}: a tensor that the model does not have")


def load_module(read: ReadBox, module: nn.Module) -> None:
    """Fills a module's slices from any source, tensor by tensor; no engine, no moments (collective)."""

    def fill() -> None:
        for value, place in placed(module):
            value.copy_(read(place.name, place.offsets, place.shape))

    with torch.no_grad():
        together(fill)


def load_shards_from(read: ReadBox, shards: Sequence[Shard]) -> None:
    """Fills masters from any source, box by box (collective)."""

    def fill() -> None:
        for shard in shards:
            place = shard.placement
            for box in boxes_of_shard(
                place.full_shape, place.shape, place.offsets, shard.start, shard.master
            ):
                box.values.copy_(read(place.name, box.offsets, tuple(box.values.shape)))

    together(fill)
