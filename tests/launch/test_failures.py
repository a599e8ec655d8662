"""A rank that stops answers nobody: the others end with 1 and name it, and the launcher leaves nothing behind."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.starts import Start, rows, write_config

LIMIT_SECONDS = 4


@pytest.mark.timeout(150)
def test_a_stopped_rank_is_named(tmp_path: Path, start: Callable[..., Start]) -> None:
    limit = f"megalite.train.limits.step_seconds={LIMIT_SECONDS}"
    config = write_config(tmp_path, steps=10_000)
    one = start(tmp_path, f"--deepspeed_config={config}", "megalite.parallel.pipe=2", limit)
    one.wait_until(lambda: len(rows(tmp_path / "run")) > 3)
    one.ranks[0].send_signal(signal.SIGSTOP)
    sent = time.monotonic()
    assert one.wait(30) == 1, one.text
    assert time.monotonic() - sent < LIMIT_SECONDS + 10
    summary = next(tmp_path.glob("run/faults/*/summary.txt")).read_text()
    assert summary.startswith("rank 0 on ") and "did not report; rank 1 waited for it" in summary
    assert "waits for rank 0" in summary and f"limit of {LIMIT_SECONDS} s" in summary
    assert [summary.splitlines()[0] in line for line in one.lines] == [True], one.text
    assert " in _step\n" in next(tmp_path.glob("run/faults/*/rank_00001.txt")).read_text()
