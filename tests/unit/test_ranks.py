"""The test harness for ranks: results, failures, timeouts, and that no process is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import REPOSITORY, RankFailure, run_ranks


def add_up(rank: int, world_size: int, offset: int) -> tuple[int, float, int]:
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return rank, total.item(), torch.get_num_threads()


def start_deepspeed(rank: int, world_size: int) -> tuple[int, float]:
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    return deepspeed.comm.get_rank(), total.item()


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("a reason of rank one")
    time.sleep(60)


def exit_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def get_stuck_here(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def start_a_child(rank: int, world_size: int, file: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    with open(file, "a") as stream:
        stream.write(f"{os.getpid()}\n{child.pid}\n")
    time.sleep(60)


def return_a_lambda(rank: int, world_size: int) -> object:
    return lambda: None


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, add_up, 10) == [(0, 33.0, 1), (1, 33.0, 1), (2, 33.0, 1)]


@pytest.mark.parametrize("init", [True, False])
def test_deepspeed_starts_on_eight_ranks(init: bool) -> None:
    before = shared_memory()
    assert run_ranks(8, start_deepspeed, init=init) == [(rank, 8.0) for rank in range(8)]
    assert shared_memory() <= before, "DeepSpeed's shared-memory op left its buffers, 69 MB a rank"


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("deepspeed_*")}


def test_an_exception_fails_the_call_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(
        RankFailure, match="rank 1 of 2: error(.|\n)*ValueError: a reason of rank one"
    ):
        run_ranks(2, raise_on_one, init=False)
    assert time.monotonic() - start < 20


def test_a_death_is_reported() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2: death\ndied with exit code 7"):
        run_ranks(2, exit_on_one, init=False)


def test_a_result_that_cannot_be_pickled_is_reported() -> None:
    with pytest.raises(RankFailure, match="(?i)pickle"):
        run_ranks(1, return_a_lambda, init=False)


def test_a_timeout_shows_the_stack_of_the_stuck_rank() -> None:
    with pytest.raises(
        RankFailure, match="rank 0 did not end within 5 s(.|\n)*in get_stuck_here"
    ) as failure:
        run_ranks(2, get_stuck_here, timeout_seconds=5, init=False)
    assert "rank 1 of 2" not in str(failure.value)


def test_no_process_is_left_after_a_timeout(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    with pytest.raises(RankFailure):
        run_ranks(2, start_a_child, str(file), timeout_seconds=4, init=False)
    pids = [int(line) for line in file.read_text().split()]
    assert len(pids) == 4
    assert_gone(pids)


def test_no_rank_outlives_its_caller(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    program = (
        "from tests.ranks import run_ranks\nfrom tests.unit.test_ranks import start_a_child\n"
        f"run_ranks(2, start_a_child, {str(file)!r}, init=False)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().split()) < 4:
        assert time.monotonic() < deadline and caller.poll() is None
        time.sleep(0.1)
    caller.kill()
    caller.wait()
    ranks = [int(line) for line in file.read_text().split()][::2]
    children = [int(line) for line in file.read_text().split()][1::2]
    try:
        assert_gone(ranks)
    finally:
        for (
            pid
        ) in children:  # the children of a rank whose caller is gone are its own responsibility
            os.kill(pid, 9)


def assert_gone(pids: list[int]) -> None:
    """Asserts that each process exits within 20 s; zombies count as exited."""
    deadline = time.monotonic() + 20
    while alive := [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"
    ]:
        assert time.monotonic() < deadline, f"processes {alive} are left"
        time.sleep(0.05)
