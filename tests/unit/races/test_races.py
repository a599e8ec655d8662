"""tools/benchmark_peers.py: turns, sums over ranks, ratios, and contenders whose results differ."""

import re
from unittest import mock

import pytest

from megalite.errors import ConfigError, UserError
from megalite.races import races
from megalite.races.race_inputs import Shape
from megalite.races.races import RACES, main, report
from megalite.races.referee import Contender, RaceFailed, race

MODULE = "tests.unit.races.race_contender"
TINY = Shape(hidden=128, layers=2, intermediate=64, vocabulary=512, length=32)


def test_ratios_are_of_processor_seconds_of_all_ranks() -> None:
    ours = Contender("megalite", MODULE, 1, {"loss": 2.0, "seconds": 0.05})
    theirs = Contender("other", MODULE, 2, {"loss": 2.00001, "seconds": 0.05})
    teams = race([ours, theirs], rounds=3, warmup=1)
    assert [len(team.steps) for team in teams] == [3, 3]
    assert all(len(step.processor) == 2 for step in teams[1].steps)
    *_, last = report(RACES["one-fp32"], teams)
    found = dict(re.findall(r"(\w+) ([0-9.]+) \(", last))
    assert last.startswith("ratio to other")
    assert float(found["processor"]) == pytest.approx(2, rel=0.2)
    assert float(found["busiest"]) == pytest.approx(1, rel=0.2)


def test_contenders_with_other_losses_are_an_error() -> None:
    teams = race(
        [Contender(name, MODULE, 1, {"loss": loss}) for name, loss in (("a", 2.0), ("b", 2.01))],
        1,
        1,
    )
    with pytest.raises(UserError, match="b: losses differ from ours by 5.0e-03: 2.00000 2.01000"):
        report(RACES["one-fp32"], teams)


def test_a_contender_that_fails_is_reported_with_its_output() -> None:
    with pytest.raises(RaceFailed, match="other: rank 0 exited: it broke"):
        race([Contender("other", MODULE, 1, {"loss": 2.0, "ends": 1})], rounds=2, warmup=1)


def test_a_wrong_row_is_one_line() -> None:
    with pytest.raises(ConfigError, match="one-fp33"):
        main(["one-fp33"])


def tiny(row: str) -> races.Race:
    asked = RACES[row]
    return races.Race(
        asked.told, TINY, asked.batch, asked.micro, asked.bf16, asked.make, asked.figure
    )


@pytest.mark.long
@pytest.mark.parametrize("row", RACES)
def test_the_contenders_make_the_same_steps(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(RACES, {row: tiny(row)}):
        assert main([row, "--rounds", "2", "--warmup", "1"]) == 0
    assert "ratio to" in capsys.readouterr().out
