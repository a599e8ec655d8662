"""Converts flat ranges of a tensor, such as ZeRO shards, to boxes, the form in which checkpoints are read.

In row-major order a flat range of a 2-D tensor is at most three boxes: the rest of a row, whole rows, the start of a
row. Next: parts.py, which lists the ranges of all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Part of a full tensor, in memory: a slice of it, or a flat range of a slice.

    offsets: the slice's start in each dim. shape: if not None, `values` [n] are the elements from `start` on of a slice
    of this shape; if None, `values` are the whole slice, in its shape.
    """

    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor
    shape: tuple[int, ...] | None = None
    start: int = 0

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape) if self.shape is None else self.shape


def boxes_of_range(
    shape: tuple[int, ...], start: int, count: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The boxes that tile elements [start, start + count) of a row-major tensor, in order.

    Yields (first index, shape, flat position of the first element); count 0 yields nothing.
    """
    if count <= 0:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (count,) * len(shape), start
        return
    row = 1
    for size in shape[1:]:
        row *= size
    stop = start + count
    # A partial row: recurse into its part of the range, one dim down.
    if start % row or count < row:
        index = start // row
        first_stop = min(stop, (index + 1) * row)
        for offsets, sizes, flat in boxes_of_range(
            shape[1:], start - index * row, first_stop - start
        ):
            yield (index, *offsets), (1, *sizes), flat + index * row
        start = first_stop
    rows = (stop - start) // row
    if rows:
        yield (start // row, *(0 for _ in shape[1:])), (rows, *shape[1:]), start
        start += rows * row
    if start < stop:
        yield from boxes_of_range(shape, start, stop - start)


def boxes_of_shard(
    full_shape: tuple[int, ...],
    slice_shape: tuple[int, ...],
    slice_offsets: tuple[int, ...],
    start: int,
    values: Tensor,
) -> list[Box]:
    """A flat range of a rank's slice as boxes of the full tensor. values [n]: the range's elements, of which the boxes
    are views."""
    result = []
    for offsets, sizes, flat in boxes_of_range(slice_shape, start, values.numel()):
        count = 1
        for size in sizes:
            count *= size
        begin = tuple(a + b for a, b in zip(offsets, slice_offsets, strict=True))
        result.append(Box(full_shape, begin, values.narrow(0, flat - start, count).view(sizes)))
    return result
