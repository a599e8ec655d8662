"""Moments that a run makes anew when it rewinds (engine/engine.py) take no memory besides the old ones."""

import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megalite.engine.engine import Engine


def test_old_moments_are_freed_before_new_ones_are_made() -> None:
    masters = [torch.ones(5), torch.ones(3)]
    adam = torch.optim.AdamW(masters)
    engine: Any = SimpleNamespace(_adam=adam, _masters=lambda: masters, optimizer=None)
    zeros_like, old = torch.zeros_like, dict[int, list[Any]]()
    Engine.make_moments(engine, 1)
    for value in masters:
        old[id(value)] = [
            weakref.ref(adam.state[value][name]) for name in ("exp_avg", "exp_avg_sq")
        ]

    def checked(value: Any, **keys: Any) -> Any:
        assert not any(moment() is not None for moment in old[id(value)])
        return zeros_like(value, **keys)

    with mock.patch.object(torch, "zeros_like", checked):
        Engine.make_moments(engine, 2)
    assert {int(state["step"]) for state in adam.state.values()} == {2}
    assert all(not moment() for moments in old.values() for moment in moments)
