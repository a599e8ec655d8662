"""The cut of the layers into chunks."""

from itertools import product

import pytest

from megalite.model.chunks import layers_of
from megalite.pipeline.cut import LayerCosts, ModelCosts, cut_by_cost, even_counts
from megalite.programs.check import check
from megalite.programs.schedules import home_of, make_program, straight


def cuts(layers: int, chunks: int) -> list[list[int]]:
    """Every cut in which only the last chunk may have no layer."""
    ways = product(range(1, layers + 1), repeat=chunks - 1)
    return [[*first, layers - sum(first)] for first in ways if sum(first) <= layers]


@pytest.mark.parametrize("schedule, p, layers", [
    ("1f1b", 2, 9), ("1f1b", 4, 9), ("zb-h1", 3, 10), ("interleaved", 2, 8), ("interleaved", 3, 7), ("zb-v", 2, 8),
])  # fmt: skip
@pytest.mark.parametrize("head, recomputes", [(0.0, False), (2.2, False), (8.0, True)])
def test_no_cut_has_a_shorter_step(
    schedule: str, p: int, layers: int, head: float, recomputes: bool
) -> None:
    costs = ModelCosts(tuple(LayerCosts(1.0, 0.1) for _ in range(layers)), head, recomputes)
    home = home_of(schedule, p, 2)

    def length(counts: list[int]) -> float:
        cost = costs.of_chunks(counts)
        return check(make_program(schedule, p, 2 * p, 2, cost), cost).length

    found = cut_by_cost(costs, home, lambda cost: make_program(schedule, p, 2 * p, 2, cost))
    counts = [len(part) for part in found.layers]
    assert sum(counts) == layers and found.layers == layers_of(counts)
    assert length(counts) <= min(map(length, cuts(layers, len(home)))) * 1.01


def test_equal_layers_without_a_head_are_cut_evenly() -> None:
    costs = ModelCosts((LayerCosts(1.0, 0.0),) * 12, head=0.0)
    for p in (2, 3, 4):
        found = cut_by_cost(
            costs, straight(p), lambda cost, p=p: make_program("1f1b", p, 2 * p, 1, cost)
        )
        assert [len(part) for part in found.layers] == even_counts(12, p)


def test_layers_with_windows_weigh_less() -> None:
    """Six layers with short windows and two without: the two take longer than the six."""
    costs = ModelCosts((*(LayerCosts(1.0, 0.1),) * 6, *(LayerCosts(1.0, 3.0),) * 2), head=0.0)
    found = cut_by_cost(costs, straight(2), lambda cost: make_program("1f1b", 2, 4, 1, cost))
    assert [len(part) for part in found.layers] == [6, 2]


def test_interleaving_pays_only_with_the_right_cut() -> None:
    """Llama-3-8B's proportions: 32 layers, and a head that takes as long as 2.2 layers."""
    costs = ModelCosts((LayerCosts(1.0, 0.0),) * 32, head=6.6)

    def length(schedule: str, counts: list[int] | None) -> float:
        home = home_of(schedule, 4, 2)
        counts = counts or [len(part) for part in cut_by_cost(
            costs, home, lambda cost: make_program(schedule, 4, 8, 2, cost)).layers]  # fmt: skip
        cost = costs.of_chunks(counts)
        return check(make_program(schedule, 4, 8, 2, cost), cost).length

    plain = length("1f1b", None)
    assert length("interleaved", even_counts(32, 8)) > 0.95 * plain
    assert length("interleaved", None) < 0.85 * plain
