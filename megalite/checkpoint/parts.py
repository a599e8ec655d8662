"""The index of a checkpoint that several ranks wrote: one part per rank, whose size does not grow with boxes.

A rank holds flat ranges of slices (ZeRO cuts a slice anywhere), and stores each as one run of numbers. Its slices are
listed in a table, which most ranks of a large run share; a rank's own part is a start and a count for each row of it:

    {"tables": [[[["weight", "exp_avg"], "layers.0.mlp.up.weight", "float32", full shape, offsets, shape], …], …],
     "parts": [["tensors_00000.safetensors", number of its table, [starts], [counts]], …]}

Llama 70B with ZeRO-3 on 1,024 ranks has 2.2 million runs of numbers, which would be 4.4 million boxes; its index takes
some 13 MB (docs/checkpoints.md). Next: storage.py, which writes it.
"""

import json
import math
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megalite.checkpoint.boxes import Box, boxes_of_range
from megalite.checkpoint.folder import (
    FORMAT_OF_PARTS,
    MOST_DIMS,
    Entry,
    Index,
    StoredBox,
    check_file_name,
    check_tiled,
    dtype_named,
)
from megalite.errors import CheckpointError

BoxDict = dict[str, list[Box]]
"""The data that a rank stores: `kind/name` (such as `exp_avg/final_norm.weight`) -> its parts of that tensor."""


class Slice(NamedTuple):
    """A row of a table: a slice of a tensor, of which ranks hold the same ranges for each of the kinds."""

    kinds: tuple[str, ...]
    name: str
    dtype: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Elements per row of the slice."""
        return math.prod(self.shape[1:])


@dataclass
class Table:
    """Slices, and the parts that hold ranges of them."""

    slices: list[Slice]
    parts: list["Part"] = field(default_factory=list)
    _ranges: dict[int, tuple[list[int], list["Part"]]] = field(default_factory=dict, init=False)
    """Of a row that was looked up: the first elements of its ranges, in order, and their parts."""

    def parts_with(self, row: int, rows: range | None) -> list["Part"]:
        """The parts that have elements of a slice, in their order; rows: only of these rows of the full tensor (its
        first dim). Ranges do not overlap, so those of some rows are neighbours: a rank of a large run looks up
        thousands of boxes, of as many parts as there are ranks."""
        piece = self.slices[row]
        if row not in self._ranges:
            some = [part for part in self.parts if part.counts[row]]
            some.sort(key=lambda part: part.starts[row])
            self._ranges[row] = [part.starts[row] for part in some], some
        starts, parts = self._ranges[row]
        if rows is None or not piece.shape:
            return parts
        first, stop = ((at - piece.offsets[0]) * piece.width for at in (rows.start, rows.stop))
        begin = max(0, bisect_right(starts, first) - 1)
        if begin < len(parts) and starts[begin] + parts[begin].counts[row] <= first:
            begin += 1
        return parts[begin : bisect_left(starts, stop)]


@dataclass
class Part:
    """The content of one file: elements [start, start + count) of each slice of its table."""

    file: str
    table: Table
    starts: list[int]
    counts: list[int]


def key_of(kind: str, piece: Slice, start: int) -> str:
    """The key of a run of numbers in its file."""
    return f"{kind}/{piece.name}@{','.join(map(str, piece.offsets))}+{start}"


def rows_of(boxes: BoxDict) -> tuple[list[Slice], list[int], list[int], list[list[Box]]]:
    """A rank's boxes as slices, starts and counts, with the boxes of each row, one for each kind."""
    merged: dict[tuple[Any, ...], dict[str, Box]] = {}
    for full_name, some in boxes.items():
        kind, _, name = full_name.partition("/")
        for box in some:
            key = (name, box.values.dtype, box.full_shape, box.offsets, box.slice_shape)
            merged.setdefault((*key, box.start, box.values.numel()), {})[kind] = box
    slices, starts, counts, of_rows = [], [], [], []
    for (name, dtype, full, offsets, shape, start, count), of_kinds in merged.items():
        dtype_name = str(dtype).removeprefix("torch.")
        slices.append(Slice(tuple(of_kinds), name, dtype_name, full, offsets, shape))
        starts.append(start)
        counts.append(count)
        of_rows.append(list(of_kinds.values()))
    return slices, starts, counts, of_rows


class Packed(NamedTuple):
    """A rank's part in compressed form, to send to the rank that writes the index: some 10 KB for ZeRO-3 with 723
    tensors."""

    table: bytes
    numbers: bytes

    @classmethod
    def of(cls, slices: list[Slice], starts: list[int], counts: list[int]) -> "Packed":
        table = json.dumps(slices, separators=(",", ":")).encode()
        return cls(zlib.compress(table, 1), zlib.compress(array("q", starts + counts).tobytes(), 1))


class PartIndex(Index):
    """An index of parts; see `Index`. The box lists of its entries are empty: `chunks` computes them."""

    format = FORMAT_OF_PARTS

    def __init__(self, tables: Iterable[Table]) -> None:
        super().__init__()
        self.tables = list(tables)
        self._rows: dict[str, list[tuple[Table, int]]] = defaultdict(list)
        for table in self.tables:
            for row, piece in enumerate(table.slices):
                self._rows[piece.name].append((table, row))
                for kind in piece.kinds:
                    self._add_entry(f"{kind}/{piece.name}", piece)

    def _add_entry(self, full_name: str, piece: Slice) -> None:
        entry = Entry(piece.full_shape, dtype_named(piece.dtype))
        known = self.entries.setdefault(full_name, entry)
        if (known.shape, known.dtype) != (entry.shape, entry.dtype):
            raise CheckpointError(
                f"{full_name}: {piece.dtype} {list(entry.shape)} on one rank, {known.dtype} {list(known.shape)} on "
                "another: must be equal"
            )

    @classmethod
    def unpacked(cls, packed: Iterable[tuple[str, Packed]]) -> "PartIndex":
        """Builds the index from (file name, part) of all ranks."""
        tables: dict[bytes, Table] = {}
        for file, part in packed:
            if part.table not in tables:
                rows = json.loads(zlib.decompress(part.table))
                tables[part.table] = Table([_slice(row) for row in rows])
            table, numbers = tables[part.table], array("q", zlib.decompress(part.numbers)).tolist()
            half = len(numbers) // 2
            table.parts.append(Part(file, table, numbers[:half], numbers[half:]))
        return cls(tables.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "tables": [table.slices for table in self.tables],
            "parts": [
                [part.file, number, part.starts, part.counts]
                for number, table in enumerate(self.tables)
                for part in table.parts
            ],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PartIndex":
        tables = [Table([_slice(row) for row in rows]) for rows in value["tables"]]
        for file, number, starts, counts in value["parts"]:
            check_file_name(file)
            table = tables[number]
            for numbers in (starts, counts):
                if len(numbers) != len(table.slices) or any(type(n) is not int for n in numbers):
                    raise ValueError(f"{file}: must have an integer for each row of its table")
            table.parts.append(Part(file, table, starts, counts))
        return cls(tables)

    def chunks(self, name: str, rows: range | None = None) -> Iterator[StoredBox]:
        kind, _, base = name.partition("/")
        for table, row in self._rows[base]:
            piece = table.slices[row]
            if kind not in piece.kinds:
                continue
            for part in table.parts_with(row, rows):
                yield from _boxes(kind, piece, part.file, part.starts[row], part.counts[row])

    def bytes_by_file(self) -> dict[str, int]:
        result: dict[str, int] = defaultdict(int)
        for table in self.tables:
            sizes = [len(p.kinds) * dtype_named(p.dtype).itemsize for p in table.slices]
            for part in table.parts:
                result[part.file] += sum(
                    size * count for size, count in zip(sizes, part.counts, strict=True)
                )
        return result

    def boxes_by_file(self) -> dict[str, int]:
        result: dict[str, int] = defaultdict(int)
        for table in self.tables:
            for part in table.parts:
                result[part.file] += sum(len(piece.kinds) for piece in table.slices)
        return result

    def check_whole(self) -> None:
        """See `Index.check_whole`: ranges must fill each slice without gaps, and slices the tensor."""
        for name, rows in self._rows.items():
            of_rows = {table.slices[row].kinds for table, row in rows}
            kinds = sorted({kind for kinds in of_rows for kind in kinds})
            # If every row has all kinds, all are stored in the same ranges, so checking one of them is enough.
            for kind in kinds[:1] if len(of_rows) == 1 else kinds:
                of_kind = [(table, row) for table, row in rows if kind in table.slices[row].kinds]
                self._check_tensor(f"{kind}/{name}", of_kind)

    def _check_tensor(self, name: str, rows: list[tuple[Table, int]]) -> None:
        ranges: dict[tuple[Any, Any], list[tuple[int, int]]] = defaultdict(list)
        for table, row in rows:
            piece = table.slices[row]
            ranges[piece.offsets, piece.shape] += [
                (part.starts[row], part.counts[row]) for part in table.parts
            ]
        held = sum(count for some in ranges.values() for _, count in some)
        shape = self.entries[name].shape
        check_tiled(name, shape, list(ranges), held)
        for (_, slice_shape), some in ranges.items():
            end = 0
            for start, count in sorted(some):
                if start != end or count < 0:
                    raise CheckpointError(
                        f"{name}: its boxes overlap: each element must be stored once"
                    )
                end += count
            if end != math.prod(slice_shape):
                raise CheckpointError(
                    f"{name}: {end} of {math.prod(slice_shape)} elements of a slice stored: each must be stored once"
                )


def _slice(row: list[Any]) -> Slice:
    """A row of a table from its JSON. Raises ValueError if it is malformed."""
    kinds, name, dtype, *sizes = row
    full, offsets, shape = (tuple(numbers) for numbers in sizes)
    if not len(full) == len(offsets) == len(shape) <= MOST_DIMS:
        raise ValueError(f"{name}: {len(full)} dims: must be at most {MOST_DIMS}")
    if any(type(number) is not int for number in (*full, *offsets, *shape)):
        raise ValueError(f"{name}: a box must be given by integers")
    if type(name) is not str or any(type(kind) is not str for kind in kinds):
        raise ValueError(f"{name}: name and kinds must be strings")
    return Slice(tuple(kinds), name, dtype, full, offsets, shape)


def _boxes(kind: str, piece: Slice, file: str, start: int, count: int) -> Iterator[StoredBox]:
    key = key_of(kind, piece, start)
    for offsets, sizes, flat in boxes_of_range(piece.shape, start, count):
        start_of_box = tuple(a + b for a, b in zip(offsets, piece.offsets, strict=True))
        yield StoredBox(start_of_box, sizes, file, key, (count, flat - start))
