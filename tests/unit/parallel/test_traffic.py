"""Bytes by axis (megalite/parallel/traffic.py), compared with formulas, on groups that send nothing."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megalite.parallel.grid import Grid
from megalite.parallel.traffic import Traffic
from megalite.plan.dry_run import fake_world

NUMBERS = 240  # fp32


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    """Rank 1 of pipe 2 × data 3 × tensor 2."""
    with fake_world(12, 1):
        yield Grid.build(2, 2)


def test_each_collective_counts_its_share_on_its_axis(grid: Grid) -> None:
    whole, third = torch.zeros(NUMBERS), torch.zeros(NUMBERS // 3)
    data, tensor = grid.data.group, grid.tensor.group
    with Traffic(grid) as traffic:
        dist.all_reduce(whole, group=data)
    assert traffic.bytes == {"data": 2 * 2 / 3 * 4 * NUMBERS}
    with Traffic(grid) as traffic:
        dist.all_gather_into_tensor(whole, third, group=data)
        dist.reduce_scatter_tensor(third, whole, group=data)
        dist.broadcast(whole, grid.data.ranks[0], group=data)
    assert traffic.bytes == {"data": 3 * 2 / 3 * 4 * NUMBERS}
    with Traffic(grid) as traffic:
        dist.all_reduce(whole.bfloat16(), group=tensor)
        dist.all_gather([torch.zeros(8), torch.zeros(8)], torch.zeros(8), group=tensor)
        dist.all_reduce(whole)
    assert traffic.bytes["tensor"] == 2 / 2 * 2 * NUMBERS + 1 / 2 * 4 * 16
    assert traffic.bytes["other"] == pytest.approx(2 * 11 / 12 * 4 * NUMBERS, abs=1)


def test_messages_count_in_both_directions_for_the_one_who_sends(grid: Grid) -> None:
    pipe, value = grid.pipe, torch.zeros(NUMBERS)
    with Traffic(grid) as traffic:
        dist.send(value, pipe.ranks[1], group=pipe.group)
        dist.send(value, pipe.ranks[1], group=pipe.back)
        dist.recv(value, pipe.ranks[1], group=pipe.back)
        value += 1
    assert traffic.bytes == {"pipe": 2 * 4 * NUMBERS}
