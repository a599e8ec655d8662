"""The cost of each further micro-batch, layer and rank (megalite/races/growth.py)."""

import re
from typing import Any
from unittest import mock

import pytest

from megalite.errors import ConfigError
from megalite.races import growth


def test_growth_is_the_cost_of_each_further_one(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(config: Any, world_size: int, steps: int) -> list[dict[str, Any]]:
        ms = 5 + 2 * config.accumulation_steps + 3 * config.model["num_hidden_layers"]
        return [{"processor_seconds": [1e-3 * ms] * steps}] * world_size

    with mock.patch.object(growth, "measured", measured):
        assert growth.main(["micro-batches", "layers", "ranks"]) == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if re.match(r"\| \d", line)]
    further = [row[2].strip(" |") for row in rows]
    assert [float(value) for value in further[1:6]] == pytest.approx([2] * 5)
    assert [float(value) for value in further[7:11]] == pytest.approx([3] * 4)
    assert [float(value) for value in further[12:]] == pytest.approx([0] * 3, abs=1e-9)


def test_growth_of_something_else_is_one_line() -> None:
    with pytest.raises(ConfigError, match="WHAT: tokens: must be one of micro-batches, layers"):
        growth.main(["tokens"])
