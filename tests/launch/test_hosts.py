"""Runs over several hosts, with launcher/run.py and with what it starts alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.hosts import Cluster, require
from tests.launch.starts import BIN, Start, checkpoints, rows, train_on_forks, write_config
from tests.ranks import REPOSITORY

LAST = 12
EVERY = 3  # steps between two checkpoints
HOSTILE = [
    "-oProxyCommand=touch {0}", "; touch {0}", "$(touch {0})", "`touch {0}`", "a\ntouch {0}", "../../x",
    "a && touch {0}",
    'x"; touch {0}; "', "x'; touch {0}; '", "%h %n %u %%", "%h", "\\", "a\\", "$HOME", "a $HOME `touch {0}`", '"', "'",
    "", " ", "*", "~", "a  b", "é|&>{0}", '["a b", "c"]', "!1",
]  # fmt: skip


def losses(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows(run) if "loss" in row]


@pytest.mark.timeout(200)
def test_nothing_hostile_runs_and_all_arrives(
    tmp_path: Path, cluster: Cluster, start: Callable[..., Start]
) -> None:
    touched = tmp_path / "touched"
    words = [word.format(touched) for word in HOSTILE]
    values = {f"HF_OWN{i}": word for i, word in enumerate(words) if "\n" not in word}
    values["NCCL_OWN"] = f"$(touch {touched})"
    secrets = {
        "HF_TOKEN": "hidden-1",
        "MLFLOW_URI": "https://me:hidden-2@there",
        "MLFLOW_PASSWORD": "hidden-3",
    }
    (tmp_path / ".deepspeed_env").write_text("OWN_API_KEY=hidden-4\nNCCL_FILE=seen\n")
    program = tmp_path / "a b;touch touched;$(touch touched)"
    program.write_text((REPOSITORY / "tests/launch/echo.py").read_text())
    logs = "$(touch touched) ; touch touched"
    one = start(
        tmp_path, str(tmp_path / "got"), *words, launcher="run", hosts=cluster.hosts, program=str(program),
        options=["--hostfile", str(cluster.hostfile()), "--enable_each_rank_log", logs], variables=values | secrets,
    )  # fmt: skip
    assert one.wait() == 0, one.text
    assert len([*(tmp_path / logs).glob("*_rank?.log")]) == 2
    # DeepSpeed logs the whole command line.
    assert "hidden" not in one.text and "NCCL_FILE" in one.text, one.text
    assert [line.rpartition(": ")[2] for line in one.lines] == [
        "HF_TOKEN, MLFLOW_PASSWORD, MLFLOW_URI, OWN_API_KEY"
    ]
    for rank in (0, 1):
        got_words, got_values = json.loads((tmp_path / f"got{rank}").read_text())
        assert got_words == words
        assert got_values == values
    assert not touched.exists()


@pytest.mark.timeout(300)
def test_a_run_over_hosts_is_that_of_one_and_goes_on_after_a_death(
    tmp_path: Path, cluster: Cluster, start: Callable[..., Start]
) -> None:
    config = write_config(tmp_path, steps=LAST, checkpoint_interval=EVERY)
    where = f"--deepspeed_config={config}"
    layout = "megalite.parallel.pipe=2"
    options = ["--hostfile", str(cluster.hostfile()), "--restarts", "1"]
    one = start(tmp_path, where, layout, launcher="run", hosts=cluster.hosts, options=options)
    one.wait_until(lambda: bool(checkpoints(tmp_path / "run")))
    one.ranks[1].kill()
    assert one.wait() == 0, one.text
    assert "run.py: rank 1 on h1 was killed; restarting (attempt 2 of 2)" in one.lines, one.text
    assert "resuming from step" in one.text

    train_on_forks(config, (tmp_path / "alone", LAST), pipe=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, LAST + 1))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_every_launcher_gives_the_same_run(
    tmp_path: Path, cluster: Cluster, start: Callable[..., Start]
) -> None:
    """pipe 2 × data 2 on one machine, over four hosts by pdsh and over two by torchrun without ssh."""
    where = f"--deepspeed_config={write_config(tmp_path)}"

    def begin(name: str, **how: Any) -> Start:
        run = f"megalite.train.run_dir={tmp_path / name}"
        return start(tmp_path, where, "megalite.parallel.pipe=2", run, **how)

    def end(*starts: Start) -> None:
        for one in starts:
            assert one.wait(300) == 0, one.text

    hosts = cluster.hosts
    end(begin("alone", ranks=4))
    end(
        begin(
            "four",
            launcher="deepspeed",
            hosts=hosts,
            options=["--hostfile", str(cluster.hostfile())],
        )
    )
    meet = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "h0:31400",
    ]
    end(
        *(
            begin("torchrun", launcher="torchrun", hosts=hosts[i : i + 1], options=meet)
            for i in range(2)
        )
    )
    for name in ("four", "torchrun"):
        assert len(rows(tmp_path / name)) == 4 and losses(tmp_path / name) == losses(
            tmp_path / "alone"
        ), name


MPI = {  # Debian's package of the launcher that `deepspeed --launcher` needs, its mpirun, and what it is told beside
    "openmpi": ("openmpi-bin", "mpirun.openmpi", "--allow-run-as-root --oversubscribe -x MASTER_ADDR=h0"),
    "mpich": ("mpich", "mpirun.mpich", ""),
    "impi": ("mpich", "mpirun.mpich", ""),  # Intel's is not Debian's, but takes the same options
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", MPI)
def test_mpi_gives_the_same_run(
    tmp_path: Path, cluster: Cluster, start: Callable[..., Start], kind: str
) -> None:
    """pipe 2 × data 2 over two hosts, and on one machine."""
    package, mpirun, given = MPI[kind]
    require(**{mpirun: package})
    (tmp_path / "mpirun").write_text(f'#!/bin/sh\nexec {mpirun} "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    where = f"--deepspeed_config={write_config(tmp_path)}"
    options = ["--hostfile", str(cluster.hostfile(2)), "--launcher", kind, "--launcher_args", given]
    variables = {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    one = start(
        tmp_path, where, "megalite.parallel.pipe=2", hosts=cluster.hosts, options=options, variables=variables
    )  # fmt: skip
    assert one.wait(200) == 0, one.text
    alone = start(
        tmp_path,
        where,
        "megalite.parallel.pipe=2",
        f"megalite.train.run_dir={tmp_path / 'x'}",
        ranks=4,
    )
    assert alone.wait(200) == 0, alone.text
    assert len(rows(tmp_path / "run")) == 4 and losses(tmp_path / "run") == losses(tmp_path / "x")
