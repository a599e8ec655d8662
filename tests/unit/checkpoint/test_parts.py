"""The index in parts (checkpoint/parts.py): ranges of slices can be read as any box, incomplete tensors are refused, a
large run's index is small and quickly built, and checkpoints in the earlier format still load."""

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalite.checkpoint.boxes import Box, boxes_of_shard
from megalite.checkpoint.files import Checkpoint, verify
from megalite.checkpoint.folder import INDEX, Entry, Index, StoredBox, Transaction
from megalite.checkpoint.parts import BoxDict, Packed, Part, PartIndex, Slice, Table, rows_of
from megalite.checkpoint.storage import _write
from megalite.checkpoint.tensors_file import write_tensors
from megalite.checkpoint.weights import load_shards
from megalite.errors import CheckpointError
from megalite.parallel.layers import Placement, Shard

STATE = {"step": 3, "consumed_samples": 12, "consumed_tokens": 96, "seed": 1, "model": {}}
SHAPES = {"vector": (7,), "matrix": (5, 9), "cube": (3, 4, 5), "uneven": (11, 3)}
CUT = {"matrix": 1, "uneven": 0}  # the dim that is split over two tensor ranks
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def full(name: str, kind: str) -> Tensor:
    count = math.prod(SHAPES[name])
    first = 1000 * list(SHAPES).index(name) + 10000 * KINDS.index(kind)
    return torch.arange(first, first + count, dtype=torch.float32).view(SHAPES[name])


def slices(name: str) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(tensor rank, offsets, shape) of the slices on two tensor ranks; a whole tensor is only on the first."""
    shape, dim = SHAPES[name], CUT.get(name)
    if dim is None:
        return [(0, (0,) * len(shape), shape)]
    half = shape[dim] // 2
    ends = [(0, half), (half, shape[dim])]
    return [
        (
            rank,
            tuple(start if d == dim else 0 for d in range(len(shape))),
            tuple(stop - start if d == dim else n for d, n in enumerate(shape)),
        )
        for rank, (start, stop) in enumerate(ends)
    ]


def ranks_boxes(data: int) -> list[BoxDict]:
    """The parts that 2 tensor × `data` ranks own with ZeRO-3; sizes are rounded up, so some ranks own nothing."""
    ranks: list[BoxDict] = [{} for _ in range(2 * data)]
    for name in SHAPES:
        for tensor_rank, offsets, shape in slices(name):
            count = math.prod(shape)
            part = -(-count // data)
            for d in range(data):
                start, stop = min(count, d * part), min(count, (d + 1) * part)
                for kind in KINDS if start < stop else ():
                    place = tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))
                    values = full(name, kind)[place].reshape(-1)[start:stop]
                    box = Box(SHAPES[name], offsets, values, shape, start)
                    ranks[2 * d + tensor_rank][f"{kind}/{name}"] = [box]
    return ranks


def write_parts(folder: Path, ranks: list[BoxDict]) -> Checkpoint:
    transaction = Transaction(folder, STATE)
    transaction.begin()
    written = [
        _write(boxes, transaction, transaction.partial.name, rank)
        for rank, boxes in enumerate(ranks)
    ]
    index = PartIndex.unpacked((file, part) for file, _, part in written)
    transaction.publish(index, {file: digest for file, digest, _ in written if digest})
    verify(folder)
    return Checkpoint.open(folder)


def write_before(folder: Path, ranks: list[BoxDict]) -> Checkpoint:
    """The same in the earlier format: ranges are cut into boxes, and the index lists every box."""
    transaction, index, digests = Transaction(folder, STATE), Index(), {}
    transaction.begin()
    for rank, boxes in enumerate(ranks):
        file, tensors = f"tensors_{rank:05d}.safetensors", {}
        for name, some in boxes.items():
            for owned in some:
                for box in boxes_of_shard(
                    owned.full_shape, owned.slice_shape, owned.offsets, owned.start, owned.values
                ):
                    key = f"{name}@{','.join(map(str, box.offsets))}"
                    tensors[key] = box.values
                    chunk = StoredBox(box.offsets, tuple(box.values.shape), file, key)
                    index.add(name, Entry(box.full_shape, torch.float32), chunk)
        digests[file] = write_tensors(transaction.partial / file, tensors)
    transaction.publish(index, digests)
    verify(folder)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("write", [write_parts, write_before])
@pytest.mark.parametrize("data", [1, 3, 8])
def test_ranges_are_read_back_whole_and_on_any_other_layout(
    tmp_path: Path, write: Any, data: int
) -> None:
    checkpoint = write(tmp_path / "c", ranks_boxes(data))
    assert checkpoint.state["format"] == (2 if write is write_parts else 1)
    assert sorted(checkpoint.names) == sorted(SHAPES) and checkpoint.moments == set(KINDS[1:])
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(checkpoint.read(name, kind=kind), full(name, kind)), name
    assert torch.equal(
        checkpoint.read("cube", (1, 2, 1), (2, 2, 3)), full("cube", "weight")[1:3, 2:4, 1:4]
    )
    for parts in (1, 2, 5):
        for rank in range(parts):
            load_onto(checkpoint, rank, parts)


def load_onto(checkpoint: Checkpoint, rank: int, parts: int) -> None:
    """Loads a rank that holds one of `parts` flat ranges of each whole tensor."""
    shards, wanted = [], []
    for name, shape in SHAPES.items():
        count = math.prod(shape)
        start, stop = rank * count // parts, (rank + 1) * count // parts
        place = Placement(shape, (), None, 0.0, counted=True, name=name)
        moments = {kind: torch.full((stop - start,), -1.0) for kind in KINDS[1:]}
        shards.append(Shard(place, start, torch.full((stop - start,), -1.0), moments))
        wanted.append({kind: full(name, kind).reshape(-1)[start:stop] for kind in KINDS})
    load_shards(checkpoint, shards, moments=True)
    for shard, values in zip(shards, wanted, strict=True):
        assert torch.equal(shard.master, values["weight"])
        assert all(torch.equal(shard.state[kind], values[kind]) for kind in KINDS[1:])


def index_of(ranges: list[tuple[int, int]], shape: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    row = [["weight"], "a", "float32", list(shape), [0] * len(shape), list(shape)]
    parts = [[f"f{number}", 0, [start], [count]] for number, (start, count) in enumerate(ranges)]
    return {"tables": [[row]], "parts": parts}


def test_ranks_share_the_requests_to_the_file_system(tmp_path: Path) -> None:
    """Of n ranks each looks up an n-th of the files when it opens a checkpoint, and none when it reads a box of a file
    that is open."""
    folder, looked, stat = (
        write_parts(tmp_path / "c", ranks_boxes(3)).folder,
        list[str](),
        Path.stat,
    )

    def counted(path: Path, **keys: Any) -> Any:
        looked.extend([path.name] * (path.suffix == ".safetensors"))
        return stat(path, **keys)

    every = sorted(path.name for path in folder.glob("*.safetensors"))
    with mock.patch.object(Path, "stat", counted):
        for rank in range(4):
            checkpoint = Checkpoint.open(folder, rank, 4)
        assert sorted({*looked}) == every and max(Counter(looked).values()) <= 2
        looked.clear()
        for _ in range(3):
            for name in checkpoint.names:
                checkpoint.read(name)
        assert not looked


def test_each_element_must_be_stored_exactly_once() -> None:
    PartIndex.from_json(index_of([(0, 2), (2, 4)])).check_whole()
    PartIndex.from_json(index_of([(3, 3), (0, 3), (6, 0)])).check_whole()
    for ranges, said in (
        ([(0, 2), (3, 3)], "5 of 6 elements"),
        ([(0, 4), (2, 2)], "overlap"),
        ([(0, 3), (0, 3)], "overlap"),
        ([(0, 7), (7, -1)], "overlap|must be"),
        ([(1, 6)], "overlap"),
        ([], "0 of 6 elements"),
    ):
        with pytest.raises(CheckpointError, match=f"weight/a: .*({said})"):
            PartIndex.from_json(index_of(ranges)).check_whole()


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 3),
    st.integers(0, 4), st.integers(0, 12), st.integers(1, 8),
)  # fmt: skip
def test_ranges_of_some_rows_are_found(
    counts: list[int], width: int, offset: int, first: int, height: int
) -> None:
    """By bisection, with empty ranges, and ranks in any order; expected: those with an element in these rows."""
    counts[-1] += -sum(counts) % width
    shape = (sum(counts) // width, width)
    piece = Slice(("weight",), "a", "float32", (99, width), (offset, 0), shape)
    table, rows = Table([piece]), range(first, first + height)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    for number in reversed(range(len(counts))):
        table.parts.append(Part(f"f{number}", table, [starts[number]], [counts[number]]))
    wanted = [
        f"f{number}"
        for number, (start, count) in enumerate(zip(starts, counts, strict=True))
        if any(offset + element // width in rows for element in range(start, start + count))
    ]
    assert [part.file for part in table.parts_with(0, rows)] == wanted
    assert [part.file for part in table.parts_with(0, None)] == [
        f"f{number}" for number, count in enumerate(counts) if count
    ]


def test_ranks_that_disagree_on_a_tensor_are_refused() -> None:
    packed = []
    for number, shape in enumerate(((2, 3), (3, 2))):
        boxes: BoxDict = {"weight/a": [Box(shape, (0, 0), torch.zeros(shape))]}
        rows, starts, counts, _ = rows_of(boxes)
        packed.append((f"f{number}", Packed.of(rows, starts, counts)))
    with pytest.raises(
        CheckpointError, match=r"weight/a: float32 \[3, 2\] on one rank, torch.float32 \[2, 3\]"
    ):
        PartIndex.unpacked(packed)


def test_forged_parts_are_refused(tmp_path: Path) -> None:
    checkpoint = write_parts(tmp_path / "c", ranks_boxes(2))
    value = json.loads((checkpoint.folder / INDEX).read_text())

    def changed(**changes: Any) -> dict[str, Any]:
        part = dict(zip(("file", "table", "starts", "counts"), value["parts"][0], strict=True))
        return {**value, "parts": [list({**part, **changes}.values()), *value["parts"][1:]]}

    for forged in (
        changed(file="../x"), changed(table=9), changed(table="0"), changed(starts=[]), changed(starts=None),
        changed(counts=[True] * len(value["parts"][0][3])), {"tables": value["tables"]}, {"parts": value["parts"]},
        {**value, "tables": [[["weight", "a"]]]}, {**value, "tables": [[[["weight"], "a", "object", [1], [0], [1]]]]},
        {**value, "tables": [[[["weight"], "a", "float32", [1.5], [0], [1]]]]},
    ):  # fmt: skip
        with pytest.raises((ValueError, KeyError, IndexError, TypeError, CheckpointError)):
            PartIndex.from_json(forged).check_whole()


def llama_70b(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.tokens.weight": (128256, 8192), "final_norm.weight": (8192,), "head.weight": (128256, 8192),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.{name}": shape
            for name, shape in {
                "attention_norm.weight": (8192,), "mlp_norm.weight": (8192,),
                "attention.query.weight": (8192, 8192), "attention.key.weight": (1024, 8192),
                "attention.value.weight": (1024, 8192), "attention.output.weight": (8192, 8192),
                "mlp.gate.weight": (28672, 8192), "mlp.up.weight": (28672, 8192), "mlp.down.weight": (8192, 28672),
            }.items()
        }  # fmt: skip
    return shapes


def meta_boxes(shapes: dict[str, tuple[int, ...]], rank: int, data: int) -> BoxDict:
    """The parts that a rank owns with ZeRO-3, on the meta device."""
    boxes: BoxDict = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        part = -(-count // data)
        start, stop = min(count, rank * part), min(count, (rank + 1) * part)
        for kind in KINDS if start < stop else ():
            values = torch.empty(stop - start, device="meta")
            boxes[f"{kind}/{name}"] = [Box(shape, (0,) * len(shape), values, shape, start)]
    return boxes


@pytest.mark.parametrize(
    ("layers", "ranks"), [(8, 32), pytest.param(80, 1024, marks=pytest.mark.long)]
)
def test_a_large_run_s_index_is_small_and_quickly_made(
    layers: int, ranks: int, tmp_path: Path
) -> None:
    """Llama 70B on 1,024 ranks with ZeRO-3: rank 0 merges the parts of all ranks; each rank opens the checkpoint and
    looks up its own shards. Figures are in docs/checkpoints.md."""
    shapes = llama_70b(layers)
    packed = []
    start = time.perf_counter()
    for rank in range(ranks):
        rows, starts, counts, _ = rows_of(meta_boxes(shapes, rank, ranks))
        packed.append((f"tensors_{rank:05d}.safetensors", Packed.of(rows, starts, counts)))
    own = (time.perf_counter() - start) / ranks
    sent = sum(len(part.table) + len(part.numbers) for _, part in packed)

    start = time.perf_counter()
    index = PartIndex.unpacked(packed)
    index.check_whole()
    text = json.dumps(index.to_json(), separators=(",", ":"))
    planned = time.perf_counter() - start

    start = time.perf_counter()
    opened = PartIndex.from_json(json.loads(text))
    opened.check_whole()
    parsed = time.perf_counter() - start
    start = time.perf_counter()
    for name, shape in shapes.items():
        # The shards of a rank in the middle of a data axis of another size.
        first, width = math.prod(shape) // 3, math.prod(shape[1:])
        last = first + math.prod(shape) // (ranks - 1)
        for kind in KINDS:
            rows = range(first // width, (last - 1) // width + 1)
            held = sum(math.prod(chunk.shape) for chunk in opened.chunks(f"{kind}/{name}", rows))
            assert held >= last - first
    looked_up = time.perf_counter() - start
    runs = 3 * sum(len(part.starts) for table in opened.tables for part in table.parts)
    print(
        f"{runs:,} runs: a rank's part {1e3 * own:.1f} ms, sent {sent / 1e6:.1f} MB, rank 0 {planned:.2f} s, index "
        f"{len(text) / 1e6:.1f} MB, opened in {parsed:.2f} s, looked up in {looked_up:.2f} s"
    )
    assert len(text) < 24 * runs / 3 + 3000 * len(shapes)
    if ranks == 1024:
        assert planned < 5 and len(text) < 50e6
