"""Rows of metrics: values that JSON has, and rows on a full disk."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalite.data.position import Position
from megalite.training.metrics import MetricsFile, perplexity
from tests.small_disk import Disk


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, read as strict JSON, without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("loss", [0.0, 11.5, 709.0, 710.0, 1e6, 1e300])
def test_a_perplexity_is_a_float_whatever_the_loss(loss: float) -> None:
    assert perplexity(loss) == (math.exp(loss) if loss < 709.5 else sys.float_info.max)


def test_values_that_are_not_finite_are_null_in_a_row(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0, False, print)
    for loss in (math.nan, math.inf, 800.0):
        row = {
            "step": 1,
            "valid_loss": loss,
            "valid_perplexity": perplexity(loss),
            "valid_losses": {"a": loss},
            "interval": [loss, 1.0],
        }
        metrics.write(row)
    metrics.close()
    nothing = {
        "step": 1,
        "valid_loss": None,
        "valid_perplexity": None,
        "valid_losses": {"a": None},
        "interval": [None, 1.0],
    }
    large = {
        "step": 1,
        "valid_loss": 800.0,
        "valid_perplexity": sys.float_info.max,
        "valid_losses": {"a": 800.0},
        "interval": [800.0, 1.0],
    }
    assert strict_rows(tmp_path / "metrics.jsonl") == [nothing, nothing, large]


def test_a_repeated_evaluation_has_one_row(tmp_path: Path) -> None:
    """An earlier start evaluated, but was killed before it saved this."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "valid_loss": 1.0}\n{"step": 2, "loss": 3.0}\n{"step": 2, "valid_loss": 2.0}\n'
    )
    MetricsFile(tmp_path, 2, False, print).close()
    assert len(strict_rows(path)) == 3
    metrics = MetricsFile(tmp_path, 2, False, print, evaluates_first=True)
    assert strict_rows(path) == [{"step": 1, "valid_loss": 1.0}, {"step": 2, "loss": 3.0}]
    metrics.evaluated({"step": 2, "valid_loss": 2.5})
    metrics.went_back(Position(step=2, owes_evaluation=True))
    metrics.evaluated({"step": 2, "valid_loss": 2.5})
    metrics.close()
    assert [row["step"] for row in strict_rows(path) if "valid_loss" in row] == [1, 2]
    assert metrics.best == {"step": 1, "valid_loss": 1.0}


def test_rows_after_a_step_are_removed_on_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(tmp_path, 0, False, print)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    disk.room = 0
    metrics = MetricsFile(tmp_path, 4, False, print)
    assert [row["step"] for row in strict_rows(path)] == [1, 2, 3, 4]
    metrics.went_back(Position(step=2))
    assert [row["step"] for row in strict_rows(path)] == [1, 2]
    disk.room = None
    # Truncated in the middle, by another program.
    path.write_text('{"step": 1}\n{"st\n[7]\n8\n{"step": 2}\n{"step": 3}\n')
    MetricsFile(tmp_path, 2, False, print).close()
    assert [row["step"] for row in strict_rows(path)] == [1, 2]


def test_events_are_read_by_tensorboard(tmp_path: Path, disk: Disk) -> None:
    for first, steps, rooms in ((0, range(1, 6), {2: 0, 4: None}), (3, range(4, 7), {})):
        metrics = MetricsFile(tmp_path, first, True, print)
        for step in steps:
            disk.room = rooms.get(step, disk.room)
            metrics.write(
                {"step": step, "loss": step + first / 2, "loss_scale": None, "weights_bytes": [1]}
            )
        metrics.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss", "memory/weights_bytes"]
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 5.5), (5, 6.5), (6, 7.5)]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == wanted


def test_a_log_on_a_full_disk_costs_lines_but_not_the_exit_code() -> None:
    program = (
        "from megalite.ranks.run_program import run_program\nfrom megalite.training.screen import say\n"
        "def main(arguments):\n    for _ in range(9999): say('a line of progress')\n    return 0\nrun_program(main)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"")
