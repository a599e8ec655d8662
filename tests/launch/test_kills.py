"""kill -9 under the real launcher, a checkpoint saved at every step: of all ranks, of one, of the launcher."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.checkpoint.files import checkpoints_of, find_checkpoint
from tests.launch.starts import Start, rows, train_on_forks, write_config

LAST = 10_000
SAME = ("step", "loss", "grad_norm", "consumed_samples")


def kill_all_ranks(start: Start) -> None:
    for rank in start.ranks:
        rank.kill()


def kill_one_rank(start: Start) -> None:
    start.ranks[1].kill()


def kill_the_launcher(start: Start) -> None:
    start.launcher.kill()


KILLS = (kill_all_ranks, kill_one_rank, kill_the_launcher)


@pytest.mark.parametrize("count", [10, 100])
@pytest.mark.timeout(4 * 3600)
@pytest.mark.long  # a few are in test_signals.py
def test_no_kill_leaves_a_run_that_cannot_go_on(
    tmp_path: Path, start: Callable[..., Start], count: int
) -> None:
    config = write_config(tmp_path, checkpoint_interval=1, keep_checkpoints=1)
    run, moments = tmp_path / "run", random.Random(count)
    inside = 0
    for number in range(count):
        seen = len(rows(run))
        one = start(tmp_path, f"--deepspeed_config={config}", f"megalite.train.steps={LAST}")
        one.wait_until(lambda: len(rows(run)) > seen + 2, 600)  # noqa: B023
        time.sleep(moments.random() / 4)
        KILLS[number % 3](one)
        one.wait(120)
        inside += any(path.name.startswith(".step") for path in (run / "checkpoints").iterdir())
        find_checkpoint(run)
        assert len(checkpoints_of(run)) <= 2, (
            "the one before, where a kill came before it was removed"
        )
    last = rows(run)[-1]["step"] + 2
    one = start(tmp_path, f"--deepspeed_config={config}", f"megalite.train.steps={last}")
    assert one.wait(600) == 0, one.text
    print(f"{count} kills, {inside} of them inside a save, {last} steps, 0 unusable runs")
    train_on_forks(config, (tmp_path / "whole", last))
    got, wanted = (
        [[row[key] for key in SAME] for row in rows(folder)] for folder in (run, tmp_path / "whole")
    )
    assert got == wanted
    shutil.rmtree(run)
