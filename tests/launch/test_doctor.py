"""tools/doctor.py on hosts: nothing to find, a host that is gone, and all that can be wrong at once."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalite.doctor import gpus
from megalite.doctor.axes import exchange
from megalite.doctor.findings import findings
from megalite.doctor.probe import probe
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
    assert done.stdout.endswith("2 hosts, 2 ranks: 1 findings\n")


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


def test_each_finding_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wanted = {
            "paths": [str(tmp_path / "a"), str(tmp_path / "b")],
            "folders": [str(tmp_path)],
            "port": port,
        }
        first = probe(wanted) | {"clock_error": 0.0}
    assert not first["port_free"]
    other = json.loads(json.dumps(first))
    other["versions"]["torch"], other["versions"]["numpy"] = "1.0", "none"
    other["files"][str(tmp_path / "a")] = None
    other["files"][str(tmp_path / "b")][2] = "x"
    other |= {"memory": 2**30, "gpus": 1, "clock_error": -3.0}
    other["disks"][str(tmp_path)] = 5
    assert [*findings({"h0": first | {"port_free": True}}, {"h0": 1}, port, 0)] == []
    found = "\n".join(findings({"h0": first, "h1": other}, {"h0": 1, "h1": 2}, port, 10))
    for said in (
        f"h0: port {port} is taken", "h1: torch is 1.0, on h0 ", "h1: numpy is not installed", "a: cannot be read",
        "b: another content than on h0", "h1: 1.0 GiB of memory are free for 2 ranks", "slots=2: it has 1 GPUs",
        "checkpoints take", "off by at least -3.0 s",
    ):  # fmt: skip
        assert said in found
    assert len(found.splitlines()) == 9


NVIDIA_SMI = """#!/bin/sh
case "$*" in *memory.used*noheader,nounits) ;; *) echo "Field is not a valid field to query."; exit 2 ;; esac
echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0"
echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 40000, [N/A]"
echo "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 3"
"""


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.facts() == "nvidia-smi is not there"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    seen = gpus.facts()
    assert isinstance(seen, list)
    assert gpus.line(seen) == "3 × NVIDIA H100 80GB HBM3, 81559 MiB, driver 550.54.15"
    assert [*gpus.gpu_findings("h0", seen[:1], "h0", seen[:1])] == []
    older = [{**gpu, "driver": "535.1"} for gpu in seen]
    found = [*gpus.gpu_findings("h1", older, "h0", seen)]
    assert len(found) == 3 and "on h0 3 × NVIDIA H100" in found[0]
    assert "GPU 1: 40000 MiB are in use" in found[1] and "GPU 2: 3 uncorrected" in found[2]
    program.write_text("#!/bin/sh\necho driver/library version mismatch; exit 18\n")
    said = [*gpus.gpu_findings("h1", gpus.facts(), "h0", seen)]
    assert said[0].startswith("h1: nvidia-smi: driver/library version mismatch: ")


def exchanged(rank: int, world_size: int) -> list[list[float]]:
    grid = Grid.build(world_size, 1)
    return [room.tolist() for room in exchange(grid.pipe, torch.tensor([float(rank)]))]


def test_neighbours_send_to_each_other_at_once() -> None:
    assert run_ranks(3, exchanged) == [[[1.0]], [[0.0], [2.0]], [[1.0]]]
