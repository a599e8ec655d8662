"""`zero_optimization.overlap_comm`: gradients are reduced in buckets while the last backward runs, on any schedule,
bitwise equal, and every rank of a group runs the same collectives in the same order."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megalite.engine.zero import ShardedOptimizer
from tests.ranks import run_ranks
from tests.training_runs import document, rows, train

STEPS = 3
BUCKET = 3000  # elements: some parameters are larger, most share a bucket
Message = tuple[str, tuple[int, ...], int]
RECORDED = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextlib.contextmanager
def recorded(
    messages: list[Message], in_backward: list[int], buffers: list[int | None]
) -> Iterator[None]:
    """Records every collective with its group and size; `in_backward` counts the reductions inside a backward.
    buffers: the memory of each reduction, and None where the step's stream waits for all of them."""
    depth = [0]

    def wrap(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            group = next((v for v in given if isinstance(v, dist.ProcessGroup)), dist.group.WORLD)
            size = next(v.numel() for v in given if isinstance(v, torch.Tensor))
            messages.append((name, tuple(dist.get_process_group_ranks(group)), size))
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    backward, average = torch.Tensor.backward, ShardedOptimizer.average_tensor

    def counted_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            return backward(self, *args, **kwargs)
        finally:
            depth[0] -= 1

    def counted_average(self: Any, tensor: torch.Tensor, *args: Any) -> Any:
        in_backward.append(int(depth[0] > 0 and tensor.numel() > 0))
        if tensor.numel():
            buffers.append(tensor.untyped_storage().data_ptr())
        return average(self, tensor, *args)

    epilogue = ShardedOptimizer.independent_gradient_partition_epilogue

    def joined(self: Any) -> None:
        epilogue(self)
        buffers.append(None)

    with contextlib.ExitStack() as stack:
        for name in RECORDED:
            stack.enter_context(wrap(name))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", counted_backward))
        stack.enter_context(mock.patch.object(ShardedOptimizer, "average_tensor", counted_average))
        name = "independent_gradient_partition_epilogue"
        stack.enter_context(mock.patch.object(ShardedOptimizer, name, joined))
        yield


def run(
    rank: int, world_size: int, documents: list[dict[str, Any]]
) -> list[tuple[list[Message], int, list[int | None]]]:
    results = []
    for keys in documents:
        messages: list[Message] = []
        in_backward: list[int] = []
        buffers: list[int | None] = []
        with recorded(messages, in_backward, buffers):
            assert train(rank, world_size, [(keys, lambda rank: contextlib.nullcontext())]) == [0]
        results.append((messages, sum(in_backward), buffers))
    return results


CASES = [
    ({"zero": 1}, "bf16"), ({"zero": 1, "pipe": 2, "schedule": "interleaved"}, "fp32"),
    ({"zero": 1, "pipe": 2, "schedule": "zb-h1"}, "bf16"), ({"zero": 2, "pipe": 2, "schedule": "zb-h1"}, "fp32"),
    ({"zero": 1, "tensor": 2}, "bf16"),  # an odd vocabulary, whose slices have buckets of their own
]  # fmt: skip


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_overlapped_reductions_change_no_bit(
    tmp_path: Path, layout: dict[str, Any], dtype: str
) -> None:
    documents = []
    for overlap in (False, True):
        keys = document(tmp_path, f"overlap_{overlap}", layout, train={"steps": STEPS})
        keys["zero_optimization"] |= {"overlap_comm": overlap, "reduce_bucket_size": BUCKET}
        keys["megalite"]["model"]["num_hidden_layers"] = 4
        if dtype == "bf16":
            keys["bf16"] = {"enabled": True}
        documents.append(keys)
    ranks = run_ranks(2 * layout.get("pipe", 1) * layout.get("tensor", 1), run, documents)
    plain, overlapped = (rows(tmp_path / f"overlap_{overlap}") for overlap in (False, True))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in plain] == [row[name] for row in overlapped]
    for of_case in zip(*ranks, strict=True):
        same_order([messages for messages, _, _ in of_case])
    for in_order, overlapping in ranks:
        assert overlapping[1] >= STEPS  # on every rank, in every step
        if layout["zero"] == 1:
            assert in_order[1] == 0
        pairs = [*itertools.pairwise(overlapping[2])]
        # Gradients are copied into one buffer while the device reduces another.
        assert not any(one == other for one, other in pairs if one is not None)
        assert any(None not in pair for pair in pairs)


def same_order(of_ranks: list[list[Message]]) -> None:
    groups = {group for messages in of_ranks for _, group, _ in messages}
    assert groups
    for group in groups:
        seen = [[m for m in of_ranks[rank] if m[1] == group] for rank in group]
        assert all(messages == seen[0] for messages in seen), group
