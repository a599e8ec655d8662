"""The simulation of failures, compared with Young's and Daly's formulas and Llama 3's training run."""

import pytest

from megalite.plan.failures import (
    BACKGROUND,
    HOUR,
    WAITING,
    Saving,
    best_interval,
    daly,
    mean_seconds_to_failure,
    useful_share,
    young,
)


def test_llamas_run() -> None:
    """419 interruptions in 54 days on 16,384 GPUs, and more than 90 % of useful time (arXiv 2407.21783)."""
    mean = mean_seconds_to_failure(16_384)
    assert mean == pytest.approx(3.09 * HOUR, rel=0.01)
    assert best_interval(BACKGROUND, mean)[1] > 0.9


@pytest.mark.parametrize("ranks", [512, 16_384])
@pytest.mark.parametrize("saving", [BACKGROUND, WAITING])
def test_the_best_interval_is_youngs_and_dalys(saving: Saving, ranks: int) -> None:
    mean = mean_seconds_to_failure(ranks)
    interval, share = best_interval(saving, mean)
    assert interval == pytest.approx(young(saving, mean), rel=0.25)
    assert useful_share(daly(saving, mean), saving, mean) > share - 0.002


def test_a_longer_restart_costs_its_share() -> None:
    """If a restart takes as long as the time between failures, half of the time is lost."""
    saving = Saving(stall=0.001, write=0.0, restart=HOUR)
    assert useful_share(10.0, saving, HOUR) == pytest.approx(0.5, abs=0.01)


def test_saving_too_seldom_or_too_often_costs() -> None:
    mean = mean_seconds_to_failure(16_384)
    interval, share = best_interval(WAITING, mean)
    assert useful_share(interval / 5, WAITING, mean) < share - 0.02
    assert useful_share(interval * 5, WAITING, mean) < share - 0.02
