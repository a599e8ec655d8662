"""All ranks write a checkpoint together: each its safetensors file and its part of the index, rank 0 the rest.

Rank 0 gathers two things: beforehand the number of bytes that each rank will write, so that room can be made; and
afterwards each rank's part of the index, some kilobytes. An error on any rank is raised on every rank. Next: save.py,
which does this in the background.
"""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.folder import Transaction
from megalite.checkpoint.parts import BoxDict, Packed, PartIndex, key_of, rows_of
from megalite.checkpoint.tensors_file import write_tensors
from megalite.errors import CheckpointError

T = TypeVar("T")
RUN_BYTES, OTHER_BYTES = 256, 1 << 16
"""Estimated bytes of a checkpoint besides its tensors: for each box, and in total."""


class SaveFailed(Exception):
    """A checkpoint could not be written. failures: the error and its stack trace, by rank."""

    def __init__(self, failures: dict[int, tuple[Exception, Any]]) -> None:
        super().__init__("a checkpoint could not be written", failures)
        self.failures = failures


def write_together(
    boxes: BoxDict,
    transaction: Transaction,
    group: Any,
    before: Callable[[int], None],
    after: Callable[[], None],
    ready: Callable[[], None],
) -> None:
    """Writes every rank's boxes to a checkpoint's folder and makes it visible (collective over `group`; None: this
    process alone). Boxes of different ranks must not overlap: each element has one owner.

    before: called on rank 0 at the start, with the total bytes to write; after: called on rank 0 at the end. ready:
    called on every rank, returns when the boxes have their values. If any rank fails, raises SaveFailed on every rank,
    with the failures of all ranks.
    """
    ranks = _Ranks(group)
    needed = OTHER_BYTES + sum(
        box.values.nbytes + RUN_BYTES for some in boxes.values() for box in some
    )

    def begin(needed_by_ranks: list[int]) -> str:
        before(sum(needed_by_ranks))
        transaction.begin()
        return transaction.partial.name  # random, so it must be the same for all ranks

    def wait() -> int:
        ready()
        return needed

    folder = ranks.in_turn(wait, begin)

    def publish(written: list[tuple[str, str | None, Packed]]) -> None:
        index = PartIndex.unpacked((file, part) for file, _, part in written)
        transaction.publish(index, {file: digest for file, digest, _ in written if digest})
        after()

    ranks.in_turn(lambda: _write(boxes, transaction, folder, ranks.rank), publish)


def _write(
    boxes: BoxDict, transaction: Transaction, folder: str, rank: int
) -> tuple[str, str | None, Packed]:
    """Writes this rank's file. Returns its name, its SHA-256 (None: no file, since the rank has no data), and the
    rank's part of the index."""
    path = transaction.folder.parent / folder / f"tensors_{rank:05d}.safetensors"
    slices, starts, counts, of_rows = rows_of(boxes)
    if not slices:
        return path.name, None, Packed.of([], [], [])
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path.parent}: not found, though rank 0 created it: must be on a file system that all ranks share"
        )
    tensors: dict[str, Tensor] = {}
    for piece, start, some in zip(slices, starts, of_rows, strict=True):
        for kind, box in zip(piece.kinds, some, strict=True):
            tensors[key_of(kind, piece, start)] = box.values.reshape(-1)
    return path.name, write_tensors(path, tensors), Packed.of(slices, starts, counts)


class _Ranks:
    """The ranks of a group, or this process alone."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def in_turn(self, each: Callable[[], Any], first: Callable[[list[Any]], T]) -> T:
        """Every rank calls `each`, then rank 0 calls `first` with the ranks' results. Returns its result on every
        rank."""
        own = _attempt(each)
        gathered: list[Any] = [own] * self.size
        if self.group is not None:
            gathered = [None] * self.size if self.rank == 0 else []
            dist.gather_object(own, gathered or None, 0, self.group)
        answer: list[Any] = [None, {}]
        if self.rank == 0:
            failures = {
                rank: error for rank, (_, error) in enumerate(gathered) if error is not None
            }
            if not failures:
                answer[0], error = _attempt(lambda: first([result for result, _ in gathered]))
                failures = {} if error is None else {0: error}
            answer[1] = failures
        if self.group is not None:
            dist.broadcast_object_list(answer, 0, self.group)
        if answer[1]:
            raise SaveFailed(answer[1])
        return answer[0]  # type: ignore[return-value]  # broadcast from rank 0


def _attempt(work: Callable[[], T]) -> tuple[T | None, Any]:
    """The result of `work`, and its failure: (error, stack trace) as in SaveFailed, or None."""
    try:
        return work(), None
    except Exception as error:
        return None, (error, traceback.extract_tb(error.__traceback__))
