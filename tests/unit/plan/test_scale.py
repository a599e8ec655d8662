"""Predictions for thousands of ranks (megalite/plan/scale.py), and the table in docs/scale.md."""

import pytest

from megalite.plan import scale
from megalite.plan.scale import BATCH, best, planner_of, table


def test_the_best_fits_and_none_of_its_neighbours_is_faster() -> None:
    planner = planner_of("8 B", 64)
    found = best(planner)
    assert found is not None
    one = found.candidate
    assert found.memory.total <= planner.memory_bytes
    assert one.pipe * one.tensor * one.context * found.config.data_size == 64
    assert BATCH % (found.config.data_size * one.micro) == 0
    for other in (
        one._replace(tensor=2 * one.tensor, sequence=True),
        one._replace(recompute="full"),
    ):
        if other != one:
            assert planner.exact(other).time.seconds >= found.time.seconds


def test_a_model_that_fits_nowhere_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "MODELS", {"405 B": scale.MODELS["405 B"]})
    monkeypatch.setattr(scale, "RANKS", (8,))
    assert best(planner_of("405 B", 8)) is None
    assert table()[2:] == ["| 405 B | 8 | none of these fits | | | | | | |"]
