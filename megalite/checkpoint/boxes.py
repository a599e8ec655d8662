"""A ZeRO shard is a flat range of a tensor; a file holds boxes. From one to the other.

Row-major, a flat range of a 2-D tensor is at most three boxes: the rest of a row, whole rows, the start of a row.
Next: parts.py, which lists what ranks hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Part of a full tensor that lies in memory: a slice of it, or a flat range of a slice.

    offsets: the slice's first index in each dim. shape: of the slice, of which `values` [n] are the elements from
    `start` on; None: `values` are the slice, in its own shape.
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
    # A row that is not whole: its part within this range, one dim down.
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
    """A flat range of a rank's slice as boxes of the full tensor: views of `values`, the range's elements [n]."""
    result = []
    for offsets, sizes, flat in boxes_of_range(slice_shape, start, values.numel()):
        count = 1
        for size in sizes:
            count *= size
        place = tuple(a + b for a, b in zip(offsets, slice_offsets, strict=True))
        result.append(Box(full_shape, place, values.narrow(0, flat - start, count).view(sizes)))
    return result
