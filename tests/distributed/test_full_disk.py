"""A whole run whose disk is full for a while: it continues, reports it once, and writes the pending data later."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalite.checkpoint.files import checkpoints_of, find_checkpoint, step_of
from megalite.pipeline.actions import Pipeline
from tests.ranks import run_ranks
from tests.small_disk import fill, small_disk
from tests.training_runs import document, rows, spoilt, train

STEPS, FULL, FREE = (
    40,
    3,
    31,
)  # the disk is full from the update of step FULL on, and has room again from that of FREE on


@contextlib.contextmanager
def full_for_a_while(rank: int, filler: Path, until: int) -> Iterator[None]:
    """The disk is full for a while; a batch is not finite meanwhile, and faults.jsonl has a line about it."""
    with spoilt(rank, on=1, at={25}, factor=math.nan):
        whole, calls = Pipeline.train_step, 0

        def counted(self: Pipeline, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == 0 and calls == FULL:
                fill(filler)
            if rank == 0 and calls == until:
                filler.unlink()
            return whole(self, *args)

        with mock.patch.object(Pipeline, "train_step", counted):
            yield


def run_on(disk: Path) -> dict[str, Any]:
    saving = {
        "steps": STEPS,
        "checkpoint_interval": 10,
        "checkpoint_copy_gib": 0,
        "tensorboard": True,
    }
    made = document(
        disk, "run", {}, train={**saving, "eval_interval": 20, "faults": {"not_finite": "skip"}}
    )
    made["megalite"]["data"]["valid"] = made["megalite"]["data"]["train"]
    return made


def test_a_run_continues_while_its_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        plant = functools.partial(full_for_a_while, filler=disk / "filler", until=FREE)
        assert run_ranks(2, train, [(run_on(disk), plant)]) == [[0], [0]]
        run, lines = disk / "run", capsys.readouterr().out.splitlines()
        assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
        whole = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in whole if "valid_loss" in row] == [20, 40]
        (fault,) = map(json.loads, (run / "faults.jsonl").read_text().splitlines())
        assert (fault["step"], fault["kind"]) == (25, "not_finite")
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/learning_rate")] == list(
            range(1, STEPS + 1)
        )
        assert [step_of(path) for path in checkpoints_of(run)] == [40]
        assert find_checkpoint(run).name == "step_00000040"
    full = [line for line in lines if "No space left on device" in line]
    assert [
        sum(name in line for line in full) for name in ("metrics.jsonl", "faults.jsonl", "tfevents")
    ] == [1, 1, 1]
    saving = [line.partition(" could")[0] for line in full if line.startswith("checkpoint of step")]
    assert saving == ["checkpoint of step 10", "checkpoint of step 20", "checkpoint of step 30"]
    assert (
        sum("metrics.jsonl: can be written again; no rows were lost" in line for line in lines) == 1
    )


def test_a_run_whose_disk_stays_full_ends_with_one_and_says_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        plant = functools.partial(full_for_a_while, filler=disk / "filler", until=0)
        (said, other) = run_ranks(2, train, [(run_on(disk), plant)])
        assert said == other and str(said[0]).startswith(
            "checkpoint of step 40 could not be saved: rank "
        )
        steps = [
            json.loads(line)["step"]
            for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, len(steps) + 1)) and FULL <= len(steps) < 20
        assert list((disk / "run" / "checkpoints").glob("*")) == []
    # Two of evaluations.
    assert f"metrics.jsonl: {STEPS + 2 - len(steps)} rows were lost" in capsys.readouterr().out
