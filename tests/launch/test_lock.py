"""Two starts of one run folder under real launchers: the second is refused before its ranks start, and the first goes
on as if there had been none; a start again of launcher/run.py does not meet its own dead one."""

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.checkpoint.files import find_checkpoint
from megalite.ranks.launch import DEFAULT_PORT
from tests.launch.starts import Start, checkpoints, rows, write_config

LAST = 10_000


@pytest.mark.timeout(400)
def test_a_second_start_is_refused_and_the_first_keeps_all(
    tmp_path: Path, start: Callable[..., Start]
) -> None:
    config, run = (
        f"--deepspeed_config={write_config(tmp_path, checkpoint_interval=5)}",
        tmp_path / "run",
    )
    first = start(tmp_path, config, f"megalite.train.steps={LAST}")
    first.wait_until(lambda: len(checkpoints(run)) > 1)
    holder = json.loads((run / "lock").read_text())
    assert holder["pid"] == first.ranks[0].pid
    said = f"run_dir: {run}: in use by process {holder['pid']} on {holder['host']} since {holder['since']}: "
    codes = {"deepspeed": 2, "torchrun": 1, "run": 2}
    with socket.socket() as busy:  # as if another run had DeepSpeed's default port
        with contextlib.suppress(OSError):
            busy.bind(("", int(DEFAULT_PORT)))
        more = {
            launcher: start(
                tmp_path, config, launcher=launcher, ranks=1, names_port=launcher != "run"
            )
            for launcher in codes
        }  # all at once
        for launcher, second in more.items():
            assert second.wait() == codes[launcher], second.text
            (line,) = second.lines
            assert said in line
    step = rows(run)[-1]["step"]
    first.wait_until(lambda: rows(run)[-1]["step"] > step + 5)
    first.top.terminate()
    first.wait()
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1)) and checkpoints(run)[-1] == len(steps)
    assert not list((run / "checkpoints").glob("*.damaged")) and not (run / "lock").exists()


@pytest.mark.timeout(300)
def test_run_py_starts_again_over_its_own_dead_start(
    tmp_path: Path, start: Callable[..., Start]
) -> None:
    config, run = write_config(tmp_path, checkpoint_interval=1, steps=LAST), tmp_path / "run"
    one = start(
        tmp_path,
        f"--deepspeed_config={config}",
        launcher="run",
        options=["--num_gpus", "1", "--restarts", "1"],
    )
    one.wait_until(lambda: len(rows(run)) > 3)
    first = json.loads((run / "lock").read_text())
    for rank in one.ranks:
        rank.kill()
    one.wait_until(
        lambda: (
            (run / "lock").exists()
            and json.loads((run / "lock").read_text())["pid"] != first["pid"]
        )
    )
    second = json.loads((run / "lock").read_text())
    assert (second["run"], second["start"] != first["start"]) == (first["run"], True) and first[
        "run"
    ]
    step = rows(run)[-1]["step"]
    one.wait_until(lambda: rows(run)[-1]["step"] > step + 3)
    one.top.terminate()
    assert one.wait() == 143, one.text
    assert "restarting (attempt 2 of 2)" in one.text and find_checkpoint(run)
    assert not (run / "lock").exists()
