"""Deaths under launcher/run.py, on hosts: the others end soon, the code is not 0, the rank and its host are named, and
no process of the run is left on any host."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.hosts import Cluster
from tests.launch.starts import Start, checkpoints, rows, write_config
from tests.launch.test_hosts import losses

LAST = 10_000  # a step that no start of these reaches
LIMIT = "megalite.train.limits.step_seconds=4"


@pytest.fixture
def begin(tmp_path: Path, start: Callable[..., Start], cluster: Cluster) -> Callable[..., Start]:
    """A run over the hosts that has taken some steps."""

    def make(*arguments: str, options: tuple[str, ...] = (), steps: int = LAST) -> Start:
        config = write_config(tmp_path, steps=steps, checkpoint_interval=5)
        one = start(
            tmp_path, f"--deepspeed_config={config}", *arguments, launcher="run", hosts=cluster.hosts,
            options=["--hostfile", str(cluster.hostfile()), *options],
        )  # fmt: skip
        one.wait_until(lambda: bool(checkpoints(tmp_path / "run")), 200)
        return one

    return make


@pytest.mark.long
@pytest.mark.timeout(200)
def test_the_top_process_dies(tmp_path: Path, begin: Callable[..., Start]) -> None:
    one = begin()
    one.run.kill()
    assert one.wait(60) == 128 + signal.SIGKILL
    assert checkpoints(tmp_path / "run")[-1] == rows(tmp_path / "run")[-1]["step"]


def stop_a_rank(one: Start, cluster: Cluster) -> None:
    one.ranks[1].send_signal(signal.SIGSTOP)


def kill_a_launcher(one: Start, cluster: Cluster) -> None:
    next(p for p in one.of("deepspeed.launcher.launch") if p in cluster.hosts[1].processes()).kill()


def kill_deepspeed(one: Start, cluster: Cluster) -> None:
    one.of("deepspeed.launcher.runner")[0].kill()


def take_a_link_down(one: Start, cluster: Cluster) -> None:
    cluster.link(cluster.hosts[1], "down")


SAID = {
    stop_a_rank: "rank 1 on h1 did not end by itself",
    kill_a_launcher: "rank 1 on h1 lost the launcher of its host",
    kill_deepspeed: "deepspeed ended with -9 before the ranks",
    take_a_link_down: "host h1 was lost",
}


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fail", SAID)
def test_a_failure_is_named_and_nothing_stays(
    fail: Callable[[Start, Cluster], None], begin: Callable[..., Start], cluster: Cluster
) -> None:
    one = begin(LIMIT)
    fail(one, cluster)
    assert one.wait(120) == 1, one.text
    assert f"run.py: {SAID[fail]}; attempt 1 of 1 failed, no more restarts" in one.lines, one.text


@pytest.mark.long
@pytest.mark.timeout(400)
def test_signals_to_the_top_reach_every_host(tmp_path: Path, begin: Callable[..., Start]) -> None:
    one = begin(options=("--restarts", "2"))
    one.run.send_signal(signal.SIGINT)
    one.run.send_signal(signal.SIGTERM)
    assert one.wait(60) == 130, one.text
    assert checkpoints(tmp_path / "run")[-1] == rows(tmp_path / "run")[-1]["step"]
    assert "stopped by signal 2" in one.text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_goes_on_with_the_hosts_that_are_left(
    tmp_path: Path, begin: Callable[..., Start], start: Callable[..., Start], cluster: Cluster
) -> None:
    last = 150
    one = begin(LIMIT, options=("--restarts", "1"), steps=last)
    cluster.link(cluster.hosts[1], "down")
    one.wait_until(lambda: "; continuing with 1 rank on h0" in one.text, 120)
    assert one.wait(300) == 0, one.text
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, last + 1))
    where = f"--deepspeed_config={tmp_path / 'config.json'}"
    whole = start(tmp_path, where, f"megalite.train.run_dir={tmp_path / 'x'}")
    assert whole.wait(200) == 0
    for (a, _), (b, _) in zip(losses(tmp_path / "run"), losses(tmp_path / "x"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_launcher_killed_in_the_middle_is_no_success(
    tmp_path: Path, start: Callable[..., Start]
) -> None:
    """Stock `deepspeed` ends with 0 here."""
    config = write_config(tmp_path, steps=LAST)
    one = start(tmp_path, f"--deepspeed_config={config}", launcher="run")
    one.wait_until(lambda: len(rows(tmp_path / "run")) > 2)
    one.launcher.kill()
    assert one.wait(60) == 1, one.text
    lost = "rank 0 on localhost, rank 1 on localhost lost the launcher of its host"
    assert f"run.py: {lost}; attempt 1 of 1 failed, no more restarts" in one.lines, one.text
