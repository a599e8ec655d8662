"""Evaluations of a run: how much of one is held at a time, and that an evaluation postponed by a signal is done
later."""

import contextlib
import functools
import json
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.files import Checkpoint, checkpoints_of, find_checkpoint, named_best
from megalite.data.position import Position
from megalite.parallel import loss
from megalite.pipeline.actions import Pipeline
from megalite.ranks.signals import EXIT_BASE, listen
from megalite.training import batches as reading
from megalite.training.batches import LazyMicroBatches, rows_of
from megalite.training.evaluation import Validation, loss_and_tokens
from megalite.training.step import tokens_that_count
from tests.distributed.test_finetuning import evaluations, watched, with_losses
from tests.distributed.test_waits import Reads
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, rows, train

STOPPED = EXIT_BASE + signal.SIGTERM
LAYOUTS = [
    ({}, 1),
    ({"pipe": 2, "zero": 2}, 2),
    ({"tensor": 2, "zero": 3}, 4),
    ({"pipe": 2, "schedule": "interleaved", "chunks": 2}, 2),
    ({"pipe": 2, "schedule": "zb-v"}, 4),
]


@contextlib.contextmanager
def counting(rank: int, most: dict[str, int]) -> Iterator[None]:
    """Each evaluation must have the same value as with all micro-batches in memory from the start, must not make the
    host read their values, and may hold only so many at a time."""
    own, read = Validation.scores, reading._micro_batch
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def seen(*args: Any, **named: Any) -> Any:
        batch = read(*args, **named)
        alive.append(weakref.ref(batch.labels))
        held.append(sum(label() is not None for label in alive))
        return batch

    def compared(self: Validation, samples: Any, positions: range) -> Tensor:
        held.clear()
        with mock.patch.object(reading, "_micro_batch", seen):
            found = own(self, samples, positions)
        micro, engine, start = self.config.micro_batch_size, self.pipeline.engine, positions.start
        grid, device = engine.grid, torch.device("cpu")
        count, rows_held = len(positions), rows_of(self.config, engine.grid)
        made = LazyMicroBatches(
            samples, start, count, micro, grid.data, device, rows=rows_held
        ).read()
        assert len(held) == len(made) > 2 * most["held"], "each is read once, and there are many"
        assert max(held) <= most["held"], held
        assert torch.equal(found, loss_and_tokens(self.pipeline, made))
        of_devices = mock.patch.object(loss, "_rows_that_count", lambda labels: None)
        with of_devices, Reads() as asked:
            loss_and_tokens(self.pipeline, made)
        assert not asked.found, asked.found
        if engine.stage.head is not None:
            tokens = tokens_that_count(made).double() * grid.data.size
            assert tokens >= found[1] > 0
        return found

    with mock.patch.object(Validation, "scores", compared):
        yield


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_micro_batches_are_read_when_their_turn_comes(
    tmp_path: Path, layout: dict[str, Any], world: int
) -> None:
    """Two parts of one corpus, with separate losses."""
    keys = {"steps": 1, "eval_interval": 1, "eval_steps": 10}
    made = document(tmp_path, "run", layout, train=keys)
    path = made["megalite"]["data"]["train"][0]
    made["megalite"]["data"]["valid"] = [
        {"path": path, "split": [0, 0.5]},
        {"path": path, "split": [0.5, 1]},
    ]
    made["megalite"]["model"]["num_hidden_layers"] = 4
    several = layout.get("schedule") in ("interleaved", "zb-v")
    plant = functools.partial(counting, most={"held": 4 if several else 1})
    assert run_ranks(world, train, [(made, plant)]) == [[0]] * world
    (row,) = [
        row
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "valid_loss" in row
    ]
    assert row["valid_losses"].keys() == {f"{path}:0", f"{path}:1"}


@contextlib.contextmanager
def stopped(rank: int, at: int, losses: list[float] | None = None) -> Iterator[None]:
    """SIGTERM comes to the last rank during step `at` of this start, from 1. losses: of evaluations, as with_losses."""
    step, calls = Pipeline.train_step, 0

    def stop(self: Pipeline, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at and rank == 0:
            listen().stop = signal.SIGTERM
        return step(self, *args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Pipeline, "train_step", stop))
        if losses is not None:
            stack.enter_context(with_losses(rank, losses))
        yield
    listen().stop = 0


@pytest.mark.parametrize(
    ("layout", "world"), [({"pipe": 2, "zero": 2}, 2), ({"zero": 3}, 2), ({"zero": 0}, 1)]
)
def test_an_evaluation_that_a_signal_came_before_is_made_by_the_next_start(
    tmp_path: Path, layout: dict[str, Any], world: int
) -> None:
    def of(run: str) -> dict[str, Any]:
        keys = {"steps": 4, "eval_interval": 2, "early_stop": None, "keep_checkpoints": 0}
        return watched(tmp_path, run, layout, **keys)

    last, middle = (functools.partial(stopped, at=at) for at in (4, 2))
    runs: list[Any] = [(of("whole"), nothing)]
    runs += [(of("last"), last), (of("last"), nothing), (of("last"), nothing)]
    runs += [(of("middle"), middle), (of("middle"), nothing)]
    assert run_ranks(world, train, runs) == [[0, STOPPED, 0, 0, STOPPED, 0]] * world
    whole = tmp_path / "whole"
    wanted = evaluations(whole)
    assert [step for step, _ in wanted] == [2, 4]
    for run in ("last", "middle"):
        assert evaluations(tmp_path / run) == wanted
        assert [(row["step"], row["loss"]) for row in rows(tmp_path / run)] == [
            (row["step"], row["loss"]) for row in rows(whole)
        ]
        one, two = (Checkpoint.open(find_checkpoint(folder)) for folder in (whole, tmp_path / run))
        assert all(one.read(name).equal(two.read(name)) for name in one.names)
        assert two.state["best"] == one.state["best"] and two.state["owes_evaluation"] is False
        assert named_best(tmp_path / run) == named_best(whole)


def test_an_owed_evaluation_may_end_the_run(tmp_path: Path) -> None:
    """The loss rises at the step of the signal: patience 1 ends the run before another step."""
    losses, early = [3.0, 4.0, 5.0], {"patience": 1}
    made = watched(tmp_path, "run", {}, steps=3, early_stop=early)
    runs = [
        (made, functools.partial(stopped, at=2, losses=losses)),
        (made, functools.partial(with_losses, losses=losses)),
        (made, functools.partial(with_losses, losses=losses)),
    ]
    assert run_ranks(1, train, runs) == [[STOPPED, 0, 0]]
    folder = tmp_path / "run"
    assert evaluations(folder) == [(1, 3.0), (2, 4.0)]
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert [path.name for path in checkpoints_of(folder)] == ["step_00000001", "step_00000002"]
    assert named_best(folder) == "step_00000001"
    history = [json.loads(line) for line in (folder / "history.jsonl").open()]
    assert history[-1]["reason"] == "stopped early"


def test_a_run_that_no_longer_evaluates_owes_nothing(tmp_path: Path) -> None:
    made = watched(tmp_path, "run", {}, steps=2, eval_interval=2, early_stop=None)
    off = watched(tmp_path, "run", {}, steps=2, eval_interval=0, early_stop=None, keep_best=False)
    runs = [(made, functools.partial(stopped, at=2)), (off, nothing)]
    assert run_ranks(1, train, runs) == [[STOPPED, 0]]
    assert evaluations(tmp_path / "run") == []


def test_a_checkpoint_from_before_owes_nothing() -> None:
    position = Position.from_state({"step": 3, "consumed_samples": 24, "consumed_tokens": 9})
    assert not position.owes_evaluation and position.faults_in_a_row == 0
