"""launcher/slurm.sh under a real Slurm, on hosts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.hosts import Cluster, require
from tests.launch.slurm import PACKAGES, Job, Slurm
from tests.launch.starts import START_SECONDS, Start, checkpoints, rows, write_config
from tests.launch.test_hosts import losses

LAST = 10_000  # a step that no start of these reaches
SEEN_STEPS = 20


@pytest.fixture
def slurm(cluster: Cluster) -> Slurm:
    require(**PACKAGES)
    return Slurm(cluster)


def submit(slurm: Slurm, ranks: int, *words: str, options: tuple[str, ...] = ()) -> Job:
    """So many ranks on each of two hosts without a GPU."""
    return slurm.submit(
        *options, f"--ntasks-per-node={ranks}", "--gpus-per-node=0", "launcher/slurm.sh", *words
    )


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_is_the_run_of_one_machine(
    tmp_path: Path, slurm: Slurm, start: Callable[..., Start]
) -> None:
    where = f"--deepspeed_config={write_config(tmp_path)}"
    for ranks, layout in {1: "megalite.parallel.pipe=1", 2: "megalite.parallel.pipe=2"}.items():
        job = submit(slurm, ranks, where, layout, f"megalite.train.run_dir={tmp_path}/job{ranks}")
        assert job.wait_for("COMPLETED", START_SECONDS)["ExitCode"] == "0:0"
        alone = start(
            tmp_path,
            where,
            layout,
            f"megalite.train.run_dir={tmp_path}/alone{ranks}",
            ranks=2 * ranks,
        )
        assert alone.wait() == 0, alone.text
        assert len(rows(tmp_path / f"job{ranks}")) == 4
        assert losses(tmp_path / f"job{ranks}") == losses(tmp_path / f"alone{ranks}")

    job = submit(slurm, 1, where, "megalite.train.stepz=3")
    assert job.wait_for("FAILED")["ExitCode"] == "2:0"
    assert job.text.count("pretrain.py: megalite.train.stepz: unknown key") == 1, job.text


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_that_ends_early_goes_on(
    tmp_path: Path, slurm: Slurm, cluster: Cluster, start: Callable[..., Start]
) -> None:
    """One job through its time limit, requeues, SIGUSR1, a lost node, kill -9 and SIGTERM; at the end its metrics equal
    an unbroken run's bit for bit."""
    where, run = f"--deepspeed_config={write_config(tmp_path, steps=LAST)}", tmp_path / "run"
    limit = "megalite.train.limits.step_seconds=8"
    job = submit(slurm, 1, where, limit, options=("--time=1", "--signal=TERM@30"))

    def last_step() -> int:
        return rows(run)[-1]["step"]

    def goes_on(saved: int, times: int = 1) -> None:
        def has_gone() -> bool:
            starts = job.text.split(f"resuming from step {saved}\n")
            return len(starts) == 1 + times and starts[-1].count("\nstep ") > SEEN_STEPS

        slurm.wait_until(has_gone, START_SECONDS, job)

    def ends(code: str, seconds: float) -> None:
        assert job.wait_for("FAILED", seconds)["ExitCode"] == code, job.text
        assert not job.ranks

    ends("143:0", 90)  # at its time limit
    assert checkpoints(run) == [last_step()] and last_step() > SEEN_STEPS, job.text
    slurm.tell("scontrol", "requeue", job.number)
    slurm.tell("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    goes_on(checkpoints(run)[-1])

    slurm.tell("scontrol", "requeue", job.number)  # while it runs: SIGTERM
    job.wait_for("PENDING")  # its ranks have ended
    goes_on(checkpoints(run)[-1])

    slurm.tell("scancel", "--signal=USR1", job.number)
    slurm.wait_until(lambda: len(checkpoints(run)) == 3, 20, job)
    saved = checkpoints(run)[-1]
    slurm.wait_until(lambda: last_step() > saved + SEEN_STEPS, 60, job)
    cluster.link(cluster.hosts[1], "down")
    job.wait_for("PENDING", 120)
    cluster.link(cluster.hosts[1], "up")
    goes_on(saved)

    _, second = job.ranks
    second.kill()
    ends("137:0", 15)
    assert checkpoints(run)[-1] == saved

    slurm.tell("scontrol", "requeue", job.number)
    goes_on(saved, times=2)
    slurm.tell("scancel", "--signal=TERM", job.number)
    ends("143:0", 20)
    assert checkpoints(run)[-1] == last_step()

    words = [
        f"megalite.train.steps={last_step()}",
        f"megalite.train.run_dir={tmp_path / 'unbroken'}",
    ]
    unbroken = start(tmp_path, where, *words)
    assert unbroken.wait(300) == 0, unbroken.text
    assert [row["step"] for row in rows(run)] == list(range(1, last_step() + 1))
    assert losses(run) == losses(tmp_path / "unbroken")
