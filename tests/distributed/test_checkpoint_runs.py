"""Whole training runs that are interrupted by kill -9 inside a save, or resumed with another layout or batch size. The
result equals an uninterrupted run's, and every sample is seen once."""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.data.loader import TrainData
from tests.ranks import RankFailure, run_ranks
from tests.training_runs import document, nothing, rows, train
from tests.writer_points import kill_at, watch_writer

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SAME = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "consumed_samples",
    "consumed_tokens",
    "skipped_steps",
)
ALL = "all"


def assert_same(run: Path, unbroken: Path) -> None:
    """Rows, state, weights and moments are bitwise equal."""
    ours, theirs = rows(run), rows(unbroken)
    assert [[row[key] for key in SAME] for row in ours] == [
        [row[key] for key in SAME] for row in theirs
    ]
    one, two = (Checkpoint.open(find_checkpoint(folder)) for folder in (run, unbroken))
    assert one.state == two.state and one.names == two.names
    for name, kind in itertools.product(one.names, KINDS):
        assert torch.equal(one.read(name, kind=kind), two.read(name, kind=kind)), (kind, name)


@contextlib.contextmanager
def killing(rank: int, victim: int | str, point: int) -> Iterator[None]:
    """Kills a rank with SIGKILL, or all ranks at rank 0, before the given operation of its writer in this start."""
    pids = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if rank == (0 if victim == ALL else victim):
        watch_writer(kill_at(point, pids if victim == ALL else [os.getpid()]))
    yield


def killed_run(
    folder: Path, layout: dict[str, int], kills: list[tuple[int | str, int]], steps: int
) -> int:
    """A run that saves at each step, is killed repeatedly and finally completes, equals one that was never killed.
    Returns how many kills were during a save."""
    saving = {"steps": steps, "checkpoint_interval": 1, "keep_checkpoints": 1}
    run = document(folder, "killed", layout, train=saving)
    met = 0
    for victim, point in kills:
        with contextlib.suppress(RankFailure):
            plant = functools.partial(killing, victim=victim, point=point)
            results = run_ranks(2, train, [(run, plant)])
            assert results == [[0], [0]]
            continue
        met += 1
        find_checkpoint(folder / "killed")
    whole = document(folder, "whole", layout, train={**saving, "checkpoint_interval": 3})
    assert run_ranks(2, train, [(run, nothing), (whole, nothing)]) == [[0, 0], [0, 0]]
    assert_same(folder / "killed", folder / "whole")
    return met


def test_a_run_killed_inside_saves_equals_one_that_was_not(tmp_path: Path) -> None:
    assert killed_run(tmp_path, {"zero": 1}, [(0, 45), (1, 4), (ALL, 60)], 8) == 3


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layout", [{"zero": 2}, {"pipe": 2}], ids=str)
def test_runs_killed_at_every_point_of_a_save(tmp_path: Path, layout: dict[str, int]) -> None:
    """Points 30 to 75 lie in a start's second save, where the first is removed; of rank 1, 3 to 5."""
    kills: list[Any] = [(ALL, point) for point in range(30, 75)] + [
        (0, point) for point in range(30, 75)
    ]
    assert (
        killed_run(tmp_path, layout, kills + [(1, point) for point in range(1, 6)], 150)
        == len(kills) + 5
    )


LAYOUTS = {"data": {}, "tensor": {"tensor": 2}, "pipe": {"pipe": 2}}
COMBINATIONS = [
    (axis, zero, dtype, background)
    for axis, zero, dtype, background in itertools.product(
        LAYOUTS, range(4), ("fp32", "bf16"), (True, False)
    )
    if not (axis == "pipe" and zero not in (1, 2)) and not (zero == 0 and dtype == "bf16")
]
SOME = [
    ("data", 0, "fp32", False), ("data", 3, "bf16", True), ("tensor", 1, "fp32", True), ("pipe", 2, "bf16", False),
]  # fmt: skip


@pytest.mark.parametrize(
    "wanted", [SOME, pytest.param(COMBINATIONS, marks=pytest.mark.long)], ids=["some", "all"]
)
@pytest.mark.timeout(1800)
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path, wanted: list[Any]) -> None:
    runs = []
    for axis, zero, dtype, background in wanted:
        keys: dict[str, Any] = {"bf16": {"enabled": dtype == "bf16"}}
        saving = {"checkpoint_interval": 1, "checkpoint_copy_gib": 1.0 if background else 0}
        name = f"{axis}{zero}{dtype}{background}"
        for run, steps in ((f"{name}_whole", 4), (name, 2), (name, 4)):
            layout = {**LAYOUTS[axis], "zero": zero}
            runs.append(
                (document(tmp_path, run, layout, train={**saving, "steps": steps}, **keys), nothing)
            )
    assert run_ranks(2, train, runs, timeout_seconds=1500) == [[0] * len(runs)] * 2
    for axis, zero, dtype, background in wanted:
        run = tmp_path / f"{axis}{zero}{dtype}{background}"
        assert_same(run, Path(f"{run}_whole"))
        saved = [row for row in rows(Path(f"{run}_whole")) if "checkpoint_write_seconds" in row]
        assert saved and all(row["checkpoint_seconds"] > 0 for row in saved)
        assert all((row["checkpoint_copy_bytes"] > 0) == background for row in saved)


@contextlib.contextmanager
def noting(rank: int, log: Path) -> Iterator[None]:
    """Records the positions in the corpus order of all samples that this rank reads."""
    whole = TrainData.batch

    def batch(self: TrainData, positions: Any) -> Any:
        with log.with_suffix(f".{rank}").open("a") as file:
            file.writelines(f"{position}\n" for position in positions)
        return whole(self, positions)

    with mock.patch.object(TrainData, "batch", batch):
        yield


def test_no_sample_is_seen_twice_or_left_out_on_other_layouts_and_batches(tmp_path: Path) -> None:
    starts = [  # layout, samples of a step and of a micro-batch, precision
        ({"zero": 1}, 8, 2, "fp32"), ({"tensor": 2, "zero": 3}, 12, 3, "fp32"), ({"pipe": 2, "zero": 2}, 4, 1, "bf16"),
        ({"zero": 3}, 16, 4, "bf16"), ({"zero": 0}, 8, 2, "fp32"),
    ]  # fmt: skip
    runs = []
    for number, (layout, batch, micro, dtype) in enumerate(starts):
        keys: dict[str, Any] = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro}
        keys["bf16"] = {"enabled": dtype == "bf16"}
        one = document(tmp_path, "run", layout, train={"steps": 2 * number + 2}, **keys)
        runs.append((one, functools.partial(noting, log=tmp_path / f"seen{number}")))
    assert run_ranks(2, train, runs) == [[0] * len(starts)] * 2
    seen: list[int] = []
    for number, (layout, batch, _, _) in enumerate(starts):
        of_ranks = [(tmp_path / f"seen{number}.{rank}").read_text().split() for rank in range(2)]
        if "tensor" in layout or "pipe" in layout:
            assert of_ranks[0] == of_ranks[1]
            of_ranks.pop()
        here = sorted(int(position) for of_rank in of_ranks for position in of_rank)
        assert len(here) == 2 * batch
        seen += here
    assert seen == list(range(len(seen)))
    counts = list(itertools.accumulate(batch for _, batch, *_ in starts for _ in (0, 1)))
    assert [row["consumed_samples"] for row in rows(tmp_path / "run")] == counts
