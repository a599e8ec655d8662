"""Watchers of the ranks (megalite/training/guards.py, expert_load.py) and of time (speed.py)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalite.data.position import Position
from megalite.errors import TrainingError
from megalite.guard.replicas import ReplicaDifference
from megalite.training import expert_load, guards, speed
from megalite.training.expert_load import ExpertLoad
from megalite.training.guards import PaceGuard, ReplicaGuard
from megalite.training.mfu import Utilisation
from megalite.training.speed import Speed


class Replicas:
    """A stub for the comparison of copies; `found` is its result."""

    found: ReplicaDifference | None = None

    def __init__(self, stage: Any) -> None:
        self.compared = 0

    def difference(self, device: torch.device) -> ReplicaDifference | None:
        self.compared += 1
        return self.found


def replica_guard(interval: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(guards, "Replicas", Replicas)
    faults = SimpleNamespace(replica_check_interval=interval)
    config: Any = SimpleNamespace(train=SimpleNamespace(faults=faults))
    engine: Any = SimpleNamespace(stage=None, device=None)
    health: Any = SimpleNamespace(fault=None, hosts=["a", "b"])
    return ReplicaGuard(config, engine, health)


@pytest.mark.parametrize(("interval", "compared"), [(0, 0), (1, 9), (4, 2)])
def test_copies_are_compared_at_their_interval(
    interval: int, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = replica_guard(interval, monkeypatch)
    for step in range(1, 10):
        guard.after_step({"step": step})
    assert guard.replicas.compared == compared


def test_a_difference_stops_the_run_and_names_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = replica_guard(4, monkeypatch)
    guard.replicas.found = ReplicaDifference("head.weight", (1,), False)
    guard.after_step({"step": 7})
    guard.health.fault = "a step that is left out"
    guard.after_step({"step": 8})
    guard.health.fault = None
    with pytest.raises(TrainingError) as raised:
        guard.after_step({"step": 8})
    text = str(raised.value)
    assert text.startswith("step 8: head.weight: rank 1 on b holds another value: ")
    assert text.endswith("; checkpoints of steps after 4 may contain it")


def test_pace_is_begun_before_the_step_that_it_measures() -> None:
    calls: list[Any] = []

    def end(step: int) -> tuple[dict[str, Any], list[str]]:
        calls.append(("end", step))
        return {"slowest_rank": 1}, ["rank 1 is slow"]

    pace: Any = SimpleNamespace(begin=lambda step: calls.append(("begin", step)), end=end)
    told: list[str] = []
    guard, row = PaceGuard(pace, told.append), {"step": 5}
    guard.before_step(Position(step=4))
    guard.after_step(row)
    assert calls == [("begin", 5), ("end", 5)]
    assert row == {"step": 5, "slowest_rank": 1} and told == ["rank 1 is slow"]


def loads(counts: list[list[int]], interval: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows and log lines of steps 1 to 4 of a model with these counts by layer."""
    monkeypatch.setattr(expert_load, "expert_counts", lambda *_: torch.tensor(counts))
    mixture = SimpleNamespace(layers=tuple(range(1, 2 * len(counts), 2)))
    stage = SimpleNamespace(spec=SimpleNamespace(mixture=mixture))
    engine: Any = SimpleNamespace(stage=stage, grid=None, device=None)
    told: list[str] = []
    watcher = ExpertLoad(engine, interval, told.append)
    rows: list[dict[str, Any]] = [{"step": step} for step in range(1, 5)]
    for row in rows:
        watcher.after_step(row)
    return rows, told


def test_load_is_logged_by_layer_at_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, told = loads([[4, 4, 4], [6, 3, 3]], 2, monkeypatch)
    assert rows[0] == {"step": 1} and rows[2] == {"step": 3} and told == []
    assert rows[1]["expert_tokens"] == {"1": [4, 4, 4], "3": [6, 3, 3]}
    # The fullest expert over the mean, of the worst layer.
    assert rows[3]["expert_imbalance"] == 6 / 4
    assert loads([[0, 0]], 0, monkeypatch) == ([{"step": step} for step in range(1, 5)], [])


def test_experts_without_a_token_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, told = loads([[0, 5, 0], [1, 1, 1], [0, 1, 1], [2, 0, 1], [1, 1, 0]], 4, monkeypatch)
    line = "layer 1: 0, 2; layer 5: 0; layer 7: 1; and in 1 more layers"
    assert told == [f"step 4: experts without tokens: {line}"]
    rows, _ = loads([[0, 0]], 4, monkeypatch)
    assert rows[3]["expert_imbalance"] == 0.0


def test_tokens_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    watcher = Speed(Utilisation(flops_per_token=6e9, peak=4e13, ranks=2))
    row: dict[str, Any] = {"consumed_tokens": 5000}
    watcher.before_step(Position(consumed_tokens=1000))
    watcher.after_step(row)
    assert (row["step_seconds"], row["tokens_per_second"]) == (2.5, 1600.0)
    assert row["mfu"] == pytest.approx(1600 * 6e9 / 4e13)
