"""The ranks' reports when one of them fails or is busy for too long (lost ranks: tests/launch)."""

import contextlib
import errno
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import megalite.guard.watchdog as watchdog_module
from megalite.config.limits import Limits
from megalite.errors import DataError
from megalite.guard.flight import Stay
from megalite.guard.watchdog import Watchdog
from megalite.parallel.grid import Grid
from megalite.pipeline.actions import Pipeline
from megalite.pipeline.cut import LayerCosts, ModelCosts
from megalite.pipeline.pipeline_plan import make_plan
from tests.ranks import RankFailure, run_ranks

STEP_SECONDS = 2.0


class FaultyEngine:
    """A stage without weights whose second forward on rank 1 never returns."""

    device, hands_over_by_chunk = "cpu", False

    def __init__(self, rank: int, fault: str) -> None:
        self.rank, self.fault, self.forwards = rank, fault, 0

    def __call__(self, source: Tensor, labels: Tensor | None, context: Any, chunk: int) -> Tensor:
        self.forwards += 1
        if self.rank == 1 and self.forwards == 2:
            if self.fault == "failed":
                raise ValueError("the reason")
            time.sleep(60)
        output = source if source.is_floating_point() else source.float().requires_grad_()
        return output * 2 if labels is None else output.sum()

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def begin_step(self) -> None:
        pass

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def step(self) -> None:
        pass


def step(rank: int, world_size: int, run_dir: Path, fault: str) -> None:
    engine: Any = FaultyEngine(rank, fault)
    plan = make_plan(
        "1f1b",
        world_size,
        1,
        (1,) * world_size,
        ModelCosts((LayerCosts(1.0, 0.0),) * world_size, 0.0),
    )
    pipeline = Pipeline(engine, Grid.build(world_size, 1).pipe, plan, (1, 4), torch.float32)
    with (
        Watchdog(run_dir, Limits.model_validate({})) as watchdog,
        watchdog.watching("step 7", STEP_SECONDS),
    ):
        watchdog.instruction = lambda: pipeline.instruction
        watchdog.waits_for = lambda: pipeline.waits_for
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        pipeline.train_step([(tokens, tokens)] * 4, 1.0)


@pytest.mark.parametrize("fault", ["failed", "was busy"])
def test_each_rank_says_where_it_was_and_whom_it_waited_for(tmp_path: Path, fault: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailure, match="died with exit code 1"):
        run_ranks(3, step, tmp_path, fault, timeout_seconds=30)
    assert time.monotonic() - begin < 20
    folder = next(tmp_path.glob("faults/*"))
    head, *lines = (folder / "summary.txt").read_text().splitlines()
    assert head.startswith("rank 1 on ") and head.endswith(f" {fault}; ranks 0, 2 waited for it")
    doing = ["backward of micro-batch 0", "forward of micro-batch 1", "forward of micro-batch 1"]
    # All limits end at once: the busy rank reports whichever its watchdog sees first.
    busy = ("longer than its limit of 2 s", "when another rank was lost or had failed")
    own = busy if fault == "was busy" else ("the reason",)
    waits = ("in recv, waits for rank 1",)
    for rank, said in enumerate((waits, own, waits)):
        assert f"step 7, {doing[rank]}, for " in lines[rank], lines
        assert any(words in lines[rank] for words in said), lines
        assert " in step\n" in (folder / f"rank_{rank:05d}.txt").read_text()


def broken(rank: int, world_size: int, run_dir: Path, how: str) -> None:
    """A part exceeds its limit, and the report cannot be written."""
    limits = Limits.model_validate({})
    with Watchdog(run_dir, limits) as watchdog:
        if how == "a file system that hangs":
            stack = mock.patch.object(watchdog, "_write", lambda *args: time.sleep(60))
        elif how == "a bug":
            stack = mock.patch.object(watchdog, "_write", lambda *args: [][0])
        else:  # the folder cannot be read now
            stale = mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
            stack = mock.patch.object(type(watchdog.folder), "exists", stale)
        soon = mock.patch.object(watchdog_module, "REPORT_SECONDS", 1.0)
        with stack, soon, watchdog.watching("step 7", STEP_SECONDS + 1):
            time.sleep(60)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a file system that hangs", "no report: not written within 1 s"),
        ("a bug", "no report: IndexError"),
        ("a folder that is away", "longer than its limit of 3 s"),
    ],
)
def test_a_report_that_does_not_come_through_keeps_no_rank(
    tmp_path: Path, how: str, said: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailure, match="died with exit code 1") as failure:
        run_ranks(1, broken, tmp_path, how, timeout_seconds=30)
    assert time.monotonic() - begin < 20
    told = str(failure.value)
    if how == "a folder that is away":
        told = next(tmp_path.glob("faults/*/rank_00000.txt")).read_text()
    assert said in told, told


def step_on_a_device(rank: int, world_size: int, run_dir: Path) -> None:
    """Each host waits for its device; rank 1 has not queued the collective that the others wait in."""
    everyone = tuple(range(world_size))
    came = (
        Stay(everyone, last=6)
        if rank == 1
        else Stay(everyone, last=7, waits_in=7, name="all_reduce")
    )
    with mock.patch.object(watchdog_module, "own_flight", lambda: {"0": came}):
        limits = Limits.model_validate({})
        with (
            Watchdog(run_dir, limits) as watchdog,
            watchdog.watching("step 7", 1.0 if rank == 0 else 60.0),
        ):
            time.sleep(60)


def test_under_nccl_the_rank_that_has_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="died with exit code 1"):
        run_ranks(3, step_on_a_device, tmp_path, timeout_seconds=30)
    head, *lines = (next(tmp_path.glob("faults/*")) / "summary.txt").read_text().splitlines()
    assert head.startswith("rank 1 on ") and head.endswith(" was busy; ranks 0, 2 waited for it"), (
        head
    )
    assert "in all_reduce 7 of ranks 0, 1, 2; longer than its limit of 1 s" in lines[0]
    assert "when another rank was lost or had failed" in lines[1], "it was told by a signal"


def step_without_a_neighbour(rank: int, world_size: int, run_dir: Path) -> None:
    """Rank 1's process ends while rank 0's host waits for its device, which waits for rank 1's."""
    with (
        Watchdog(run_dir, Limits.model_validate({})) as watchdog,
        watchdog.watching("step 7", 60.0),
    ):
        if rank == 0:
            time.sleep(60)


def test_under_nccl_a_rank_that_has_gone_is_seen(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailure, match="died with exit code 1"):
        run_ranks(2, step_without_a_neighbour, tmp_path, timeout_seconds=30)
    assert time.monotonic() - begin < 15
    head, own, _ = (next(tmp_path.glob("faults/*")) / "summary.txt").read_text().splitlines()
    assert head.startswith("rank 1 on ") and " did not report" in head
    assert "step 7" in own and own.endswith("when a rank of this node was gone")


def step_without_another_node(rank: int, world_size: int, run_dir: Path) -> None:
    """Each rank is on its own node. Only rank 1 raises an error on purpose, and its process stays, as with a launcher
    that waits for other ranks."""
    with (
        contextlib.suppress(DataError),
        mock.patch("socket.gethostname", lambda: f"node{rank}"),
        Watchdog(run_dir, Limits.model_validate({})) as watchdog,
        watchdog.watching("step 7", 60.0),
    ):
        if rank == 1:
            raise DataError("data/train.bin: token 9 is beyond\nthe vocabulary")
        time.sleep(60)
    time.sleep(60)


def test_under_nccl_an_error_on_another_node_is_seen(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RankFailure):
        run_ranks(2, step_without_another_node, tmp_path, timeout_seconds=30)
    assert time.monotonic() - begin < 15
    head, own, other = (next(tmp_path.glob("faults/*")) / "summary.txt").read_text().splitlines()
    assert head == "rank 1 on node1 failed"
    assert own.startswith("rank 0 on node0: step 7") and own.endswith("another rank had failed")
    assert other.endswith("data/train.bin: token 9 is beyond the vocabulary")
