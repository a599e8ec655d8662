"""Signals and deaths under the real launcher, one after another on one run that is gone on with each time; at the
end its metrics equal an unbroken run's bit for bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.starts import Start, checkpoints, rows, train_on_forks, write_config

LAST = 10_000  # a step that no start of these reaches
SAVING = "megalite.train.checkpoint_interval=1"  # so that a kill meets a save
SEEN_STEPS = 3  # of a start, before it is sent something


def to_top(start: Start) -> None:
    start.top.terminate()


def to_a_rank(start: Start) -> None:
    start.ranks[1].send_signal(signal.SIGTERM)


def to_the_launcher(start: Start) -> None:
    start.launcher.send_signal(signal.SIGTERM)


def to_the_group(start: Start) -> None:
    os.killpg(start.top.pid, signal.SIGINT)


def kill_the_launcher(start: Start) -> None:
    start.launcher.kill()


SENT = {  # and what the launcher says of its ranks, where it lives to see their end
    to_top: "exits with return code = 143",
    to_a_rank: "exits with return code = 143",
    to_the_launcher: "",
    to_the_group: "",
    kill_the_launcher: "",
}


@pytest.mark.timeout(500)
def test_a_run_goes_on_bit_for_bit_after_each_signal(
    tmp_path: Path, start: Callable[..., Start], pytestconfig: pytest.Config
) -> None:
    """The long form sends to a rank and to the launcher, and kills all ranks, too."""
    config, all_forms = write_config(tmp_path), pytestconfig.getoption("--long")
    run = tmp_path / "run"

    def begin(*keys: str) -> Start:
        count = len(rows(run))
        one = start(tmp_path, f"--deepspeed_config={config}", f"megalite.train.steps={LAST}", *keys)
        one.wait_until(lambda: len(rows(run)) > count + SEEN_STEPS)
        return one

    step = 0
    for send, said in SENT.items():
        if send in (to_a_rank, to_the_launcher) and not all_forms:
            continue
        one = begin(*([SAVING] if send is kill_the_launcher else []))
        if send is to_top:
            one.ranks[0].send_signal(signal.SIGUSR1)
            one.wait_until(lambda: bool(checkpoints(run)), 20)
            seen = rows(run)[-1]["step"]
            one.wait_until(lambda: rows(run)[-1]["step"] > seen + SEEN_STEPS, 20)  # noqa: B023
        send(one)
        code = one.wait(20)
        assert code != 0 or send is kill_the_launcher, one.text  # that one is `deepspeed`'s own
        assert said in one.text, one.text
        assert (
            "Traceback" not in one.text.partition("KeyboardInterrupt")[0] or send is to_the_group
        ), one.text
        last, step = step, rows(run)[-1]["step"]
        assert step > last + SEEN_STEPS and checkpoints(run)[-1] == step, (send, one.text)
        assert not (run / "lock").exists()

    for first in (
        (1, 0) if all_forms else (1,)
    ):  # of the ranks that kill -9 meets, perhaps inside a save
        one = begin(SAVING)
        for rank in one.ranks[first:]:
            rank.kill()
        assert one.wait(10) == 128 + 128 - 9, one.text  # `deepspeed` hands -9 to exit
        last, step = step, checkpoints(run)[-1]
        assert step > last
    summary = next(run.glob("faults/*/summary.txt")).read_text()
    assert summary.startswith("rank 1 on ") and "did not report; rank 0 waited for it" in summary

    train_on_forks(config, (run, step + 2), (tmp_path / "unbroken", step + 2))
    got = rows(run)
    assert [row["step"] for row in got] == list(range(1, step + 3))
    for broken, unbroken in zip(got, rows(tmp_path / "unbroken"), strict=True):
        assert [broken[key] for key in ("loss", "grad_norm")] == [
            unbroken[key] for key in ("loss", "grad_norm")
        ]
