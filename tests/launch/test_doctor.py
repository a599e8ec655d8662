"""tools/doctor.py on hosts: nothing to find, a host that is gone, and all that can be wrong at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalite.doctor.axis_rates import exchange
from megalite.parallel.grid import Grid
from tests.launch.hosts import Cluster
from tests.launch.starts import write_config
from tests.programs import run_program
from tests.ranks import REPOSITORY, run_ranks


def doctor(cluster: Cluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tools/doctor.py", *arguments]
    return subprocess.run(
        cluster.hosts[0].inside(REPOSITORY, *command), capture_output=True, text=True, timeout=150
    )


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_host_that_does_not_answer(tmp_path: Path, cluster: Cluster) -> None:
    cluster.link(cluster.hosts[1], "down")
    done = doctor(
        cluster,
        "--hostfile",
        str(cluster.hostfile()),
        "--deepspeed_config",
        str(write_config(tmp_path)),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("h1: no answer: ssh: connect to host h1 port 22: "), done.stdout
    assert done.stdout.endswith("2 hosts, 2 ranks: 1 finding\n")


@pytest.mark.timeout(300)
def test_hosts_that_are_well(tmp_path: Path, cluster: Cluster) -> None:
    config = str(write_config(tmp_path))
    done = doctor(cluster, "--hostfile", str(cluster.hostfile()), "--deepspeed_config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data axis, 2 ranks: all-reduce of 16 MiB in " in done.stdout
    assert done.stdout.endswith("2 hosts, 2 ranks: all well\n")


def test_a_mistake_is_one_line() -> None:
    done = run_program("tools/doctor.py")
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "--hostfile or --num_gpus" in done.stderr
    )


def exchanged(rank: int, world_size: int) -> list[list[float]]:
    grid = Grid.build(world_size, 1)
    return [room.tolist() for room in exchange(grid.pipe, torch.tensor([float(rank)]))]


def test_neighbours_send_to_each_other_at_once() -> None:
    assert run_ranks(3, exchanged) == [[[1.0]], [[0.0], [2.0]], [[1.0]]]
