"""No stream of a run, with its evaluations and a rewind, reads what another may still write, writes what another may
still read, or frees what another may still use; checked on a CPU that DeepSpeed takes for a device with streams."""

import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megalite.training.loop import Run
from tests.ranks import run_ranks
from tests.stream_races import Races
from tests.streams import Stream, like_a_gpu
from tests.training_runs import document, spoilt, train

STEPS = 2
BUCKET = 1500  # elements: the MLP's matrices and the embedding are larger, others share a bucket


def spoils_a_step(rank: int) -> contextlib.AbstractContextManager[None]:
    """Makes the run rewind once, to its first checkpoint."""
    return spoilt(rank, on=0, at={2}, factor=math.nan)


def races_of(rank: int, world_size: int, keys: dict[str, Any]) -> Counter[str]:
    with like_a_gpu() as streams:
        races, run = Races(streams), Run._train

        def watched(self: Run) -> Any:
            with races:
                return run(self)

        with (
            mock.patch.object(Run, "_train", watched),
            mock.patch.object(torch.Tensor, "record_stream", lambda t, s: races.told(t, s)),
        ):
            assert train(rank, world_size, [(keys, spoils_a_step)]) == [0]
    return races.found


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_PARAM = {"offload_param": {"device": "cpu"}}
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"zero": 1}, {"overlap_comm": True}), ({"zero": 2}, {"overlap_comm": True}),
    ({"zero": 2}, {"overlap_comm": True, "contiguous_gradients": False}),
    ({"zero": 2}, {"overlap_comm": True, "reduce_scatter": False}),
    ({"zero": 2, "pipe": 2, "schedule": "zb-h1"}, {"overlap_comm": True}),
    ({"zero": 3}, {}), ({"zero": 3}, {"stage3_param_persistence_threshold": 0}),
    ({"zero": 1, "tensor": 2, "sequence": True}, {"overlap_comm": True}),
    ({"zero": 2, "tensor": 2}, {"overlap_comm": True}),
    # Query, key and value are one product, whose gradients are larger than a bucket.
    ({"zero": 2, "tensor": 2}, {"overlap_comm": True, "reduce_bucket_size": 100}),
    ({"zero": 1}, {"overlap_comm": True, **OFFLOAD}), ({"zero": 2}, {"overlap_comm": True, **OFFLOAD}),
    ({"zero": 3}, OFFLOAD), ({"zero": 3}, OFFLOAD_PARAM), ({"zero": 3}, {**OFFLOAD, **OFFLOAD_PARAM}),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("layout", "zero"), WAYS, ids=str)
def test_streams_are_ordered(
    tmp_path: Path, layout: dict[str, Any], zero: dict[str, Any], precision: str
) -> None:
    several: dict[str, Any] = {
        "steps": STEPS,
        "eval_interval": 1,
        "eval_steps": 1,
        "checkpoint_interval": 1,
    }
    several["faults"] = {"not_finite": "rewind"}
    keys = document(tmp_path, "run", layout, train=several)
    keys["megalite"]["data"]["valid"] = keys["megalite"]["data"]["train"]
    keys["zero_optimization"] |= {"reduce_bucket_size": BUCKET} | zero
    keys["bf16"] = {"enabled": precision == "bf16"}
    world = 2 * layout.get("pipe", 1) * layout.get("tensor", 1)
    for found in run_ranks(world, races_of, keys):
        assert not found, found
    assert (tmp_path / "run/faults.jsonl").exists()  # it has rewound


def test_the_watch_sees_races() -> None:
    """Each of the three kinds, and none once the streams wait for each other or the allocator is told."""
    for waits in (False, True):
        with like_a_gpu() as streams, Races(streams) as races:
            other = Stream(streams)
            values = torch.zeros(4)
            if waits:
                other.wait_stream(streams.step)
            with streams.entered(other):
                total = values.sum()
            values.add_(1) if not waits else races.told(values, other)
            del values
            torch.zeros(4)
            del total
        kinds = {
            "sum while another stream may still be in zeros",
            "freed while another stream may still be in sum",
        }
        kinds.add("add_ while another stream may still be in sum")
        assert set(races.found) == (set() if waits else kinds)


def races_around_a_sum(rank: int, world_size: int) -> list[set[str]]:
    found = []
    for waits in (False, True):
        with like_a_gpu() as streams, Races(streams) as races:
            values = torch.ones(4)
            work = dist.all_reduce(values, async_op=True)
            assert work is not None
            if waits:
                work.wait()
            values.mul_(2)
            work.wait()
            dist.all_reduce(values)
            values.mul_(2)
        found.append(set(races.found))
    return found


def test_the_watch_sees_collectives_that_are_not_waited_for() -> None:
    late = {"mul_ while another stream may still be in allreduce_"}
    assert run_ranks(2, races_around_a_sum) == [[late, set()]] * 2
