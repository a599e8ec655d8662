"""Groups along axes: their backend, their timeout, and the order in which communicators are created."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

import megalite.parallel.grid as grid_module
from megalite.config import load_config
from megalite.config.limits import Limits
from megalite.model.families import read_spec
from megalite.parallel.grid import Axis, Grid, backend_of_axes
from megalite.pipeline.pipeline_plan import plan_of
from megalite.pipeline.steps import Send
from tests.ranks import REPOSITORY, run_ranks


def test_groups_along_axes_have_the_devices_backend_alone() -> None:
    assert backend_of_axes("cpu:gloo,cuda:nccl") == ("cuda", "nccl")
    assert backend_of_axes("cpu:gloo,cuda:gloo,mps:gloo") == ("cpu", "gloo")


def timeouts(rank: int, world_size: int) -> set[float]:
    grid = Grid.build(
        world_size, 1, timeout=Limits.model_validate({"step_seconds": 4000}).collective_timeout
    )
    groups = [grid.pipe.group, grid.pipe.back, grid.model.group]
    return {
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups
    }


def test_groups_have_the_timeout() -> None:
    assert run_ranks(2, timeouts) == [{4300.0}] * 2


def runs(rank: int, world_size: int) -> list[list[int]]:
    """Sizes of the runs of the tensor axis, for a number of key heads."""
    built = [Grid.build(1, world_size, key_heads=heads) for heads in (None, 8, 4, 2, 1)]
    return [[axis.size for axis in grid.tensor.runs] for grid in built]


def test_runs_of_the_tensor_axis_are_those_that_hold_one_key_head() -> None:
    """On a GPU each of them is one more communicator."""
    assert run_ranks(4, runs) == [[[2], [], [], [2], []]] * 4  # one key head: the axis itself


class Messages:
    """Replaces torch.distributed on a rank; records its communicators in order."""

    def __init__(
        self, rank: int, world: frozenset[int], members: dict[str, frozenset[int]]
    ) -> None:
        self.rank, self.members, self.order = (
            rank,
            members | {"world": world},
            list[tuple[str, frozenset[int]]](),
        )

    def all_reduce(self, tensor: Any, group: str = "world") -> None:
        self.order.append((group, self.members[group]))

    def send(self, tensor: Any, peer: int, group: str) -> None:
        self.order.append((group, frozenset({self.rank, peer})))

    recv = send


def connected(pipe: int) -> list[list[tuple[str, frozenset[int]]]]:
    """The communicators that `connect` creates on each rank of a pipe axis, in order."""
    everyone, orders = frozenset(range(pipe)), []
    for rank in range(pipe):
        axis = Axis(pipe, rank, tuple(range(pipe)), "up", back="down")
        messages = Messages(rank, everyone, {"up": everyone, "down": everyone})
        with patch.object(grid_module, "dist", messages):
            Grid(pipe=axis, world_size=pipe, rank=rank).connect(torch.device("cpu"))
        orders.append(messages.order)
    return orders


@pytest.mark.parametrize("pipe", range(2, 9))
def test_communicators_are_made_in_an_order_that_cannot_hang(pipe: int) -> None:
    """Creating one blocks a rank until all its members create it."""
    orders = connected(pipe)
    while any(orders):
        ready = [
            key for order in orders if order for key in order[:1]
            if all(orders[member][:1] == [key] for member in key[1])
        ]  # fmt: skip
        assert ready, [order[:1] for order in orders]
        for member in ready[0][1]:
            orders[member].pop(0)


def test_a_group_without_messages_has_no_communicator() -> None:
    """It would cost every rank memory and time: `model` spans pipe and tensor."""
    everyone = frozenset(range(4))
    members = {"tensor": everyone, "model": everyone}
    messages = Messages(1, everyone, members)
    grid = Grid(
        tensor=Axis(4, 1, (0, 1, 2, 3), "tensor", name="tensor"),
        model=Axis(8, 1, tuple(range(8)), "model", name="model"),
    )
    with patch.object(grid_module, "dist", messages):
        grid.connect(torch.device("cpu"))
    assert [group for group, _ in messages.order] == ["world", "tensor"]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_no_message_of_a_step_is_the_first_on_its_communicator(schedule: str) -> None:
    pipe = 4
    keys = [
        f"megalite.parallel.schedule={schedule}",
        f"megalite.parallel.pipe={pipe}",
        "megalite.parallel.tensor=1",
    ]
    config = load_config(
        REPOSITORY / "ds_configs/quickstart.json", keys + ["gradient_accumulation_steps=4"]
    )
    config = config.resolve(pipe)
    spec = read_spec(
        config.model | {"num_hidden_layers": 8} if isinstance(config.model, dict) else config.model
    )
    made = {key for order in connected(pipe) for key in order}
    for rank in range(pipe):
        axis = Axis(pipe, rank, tuple(range(pipe)), "up", back="down")
        for step in plan_of(config, spec).steps(4, rank):
            if isinstance(step, Send):
                assert (axis.towards(rank, step.target), frozenset({rank, step.target})) in made


def connect_on_gloo(rank: int, world_size: int) -> bool:
    Grid.build(world_size, 1).connect(torch.device("cpu"))
    return True


def test_the_groups_connect() -> None:
    assert run_ranks(3, connect_on_gloo) == [True] * 3


def test_places_of_a_large_world_share_what_they_count() -> None:
    """When each rank listed all of them for each axis, 131,072 ranks did not fit into 12 GB."""
    first, last = (Grid.at(rank, 1, 2**17, 1) for rank in (0, 2**17 - 1))
    assert first.data.ranks is last.data.ranks and len(last.data.ranks) == 2**17
    assert last.data.rank == 2**17 - 1
    assert [axis.size for axis in Grid.at(0, 1, 1, 12).tensor.runs] == [2, 3, 4, 6]
