"""Groups named by the axes that vary in them, compared with their arithmetic definition."""

from itertools import product

import pytest

from megalite.topology.axes import AXES, PLANES, AxisSizes, in_short

GRIDS = [
    AxisSizes(pipe, data, context, tensor, expert)
    for pipe, data, context, tensor, expert in product((1, 2, 3), (1, 2, 4), (1, 2), (1, 3), (1, 2))
    if data % expert == 0
]


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_every_rank_is_in_one_group_of_each_name_at_its_place(sizes: AxisSizes) -> None:
    for name in PLANES:
        groups = sizes.groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(sizes.world_size))
        for group in groups:
            assert len(group) == sizes.along(name)
            assert [sizes.index(rank, name) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_coordinates_and_ranks_are_inverse(sizes: AxisSizes) -> None:
    for rank in range(sizes.world_size):
        assert sizes.rank_at(sizes.coordinates(rank)) == rank
        at = sizes.coordinates(rank)
        data = at["expert_data"] * sizes.expert + at["expert"]
        place = ((at["pipe"] * sizes.data + data) * sizes.context + at["context"]) * sizes.tensor
        assert place + at["tensor"] == rank


def test_the_docstrings_example() -> None:
    sizes = AxisSizes(pipe=2, data=2, tensor=2)
    for name, group in (("tensor", [4, 5]), ("data", [5, 7]), ("pipe", [1, 5])):
        assert group in sizes.groups(name)
    assert sizes.described(5) == "pipe 1, data 0, tensor 1"
    assert sizes.ends() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_groups_that_hold_copies_of_a_weight_and_of_an_experts() -> None:
    sizes = AxisSizes(pipe=1, data=4, context=2, tensor=1, expert=2)
    assert sizes.groups("replica") == [list(range(8))]
    assert sizes.groups("expert") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sizes.groups("expert_replica") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert sizes.described(5) == "pipe 0, data 2, context 1, expert 0, tensor 0"
    assert set(AXES) >= {axis for plane in PLANES.values() for axis in plane}


def test_runs_cut_groups_into_neighbours() -> None:
    assert AxisSizes(data=2, tensor=4).runs("tensor", 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_ranks_are_named_in_short() -> None:
    assert in_short([0, 1, 2, 3, 6, 8, 9]) == "0-3, 6, 8-9"
    assert in_short([4, 5], "–") == "4–5" and in_short([]) == ""
