"""Rows of metrics: what JSON can hold, and what a spike is measured by."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.config.sections import Faults
from megalite.training.health import Fault, Health
from megalite.training.metrics import MetricsFile, perplexity
from megalite.training.position import Position


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file by a reader that knows neither NaN nor Infinity, as JSON does not."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("loss", [0.0, 11.5, 709.0, 710.0, 1e6, 1e300])
def test_a_perplexity_is_a_float_whatever_the_loss(loss: float) -> None:
    assert perplexity(loss) == (math.exp(loss) if loss < 709.5 else sys.float_info.max)


def test_what_is_not_finite_is_null_in_a_row(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0, tensorboard=False)
    for loss in (math.nan, math.inf, 800.0):
        row = {"step": 1, "valid_loss": loss, "valid_perplexity": perplexity(loss), "valid_losses": {"a": loss}}
        metrics.write(row)
    metrics.close()
    nothing = {"step": 1, "valid_loss": None, "valid_perplexity": None, "valid_losses": {"a": None}}
    large = {"step": 1, "valid_loss": 800.0, "valid_perplexity": sys.float_info.max, "valid_losses": {"a": 800.0}}
    assert strict_rows(tmp_path / "metrics.jsonl") == [nothing, nothing, large]


@pytest.mark.parametrize("recent, spike", [((0.0, 0.0, 0.0), None), ((0.0, 0.1, 0.1), "5.00 times the median 0.1000")])
def test_a_median_of_zero_is_no_measure_of_a_spike(recent: tuple[float, ...], spike: str | None) -> None:
    """Losses are 0 where no token of a batch counts."""
    faults = Faults.model_validate({"spike_factor": 2.0, "spike_window": 3})
    health: Any = SimpleNamespace(
        faults=faults, position=Position(recent_losses=recent), engine=SimpleNamespace(dynamic_scaler=None), scale=1.0
    )
    fault: Fault | None = Health._fault_of(health, 0.5, 1.0)
    assert (fault is None) if spike is None else (fault is not None and spike in fault.text)
