"""Which steps count as faulty (megalite/guard/health.py)."""

from types import SimpleNamespace
from typing import Any

import pytest

from megalite.config.limits import Faults
from megalite.data.position import Position
from megalite.guard.health import Fault, Health


@pytest.mark.parametrize(
    "recent, spike", [((0.0, 0.0, 0.0), None), ((0.0, 0.1, 0.1), "5.00 times the median 0.1000")]
)
def test_a_median_of_zero_is_no_measure_of_a_spike(
    recent: tuple[float, ...], spike: str | None
) -> None:
    """A loss is 0 if no token of the batch counts."""
    faults = Faults.model_validate({"spike_factor": 2.0, "spike_window": 3})
    health: Any = SimpleNamespace(
        faults=faults,
        position=Position(recent_losses=recent),
        engine=SimpleNamespace(can_lower_loss_scale=False),
        scale=1.0,
    )
    fault: Fault | None = Health._fault_of(health, 0.5, 1.0)
    assert (fault is None) if spike is None else (fault is not None and spike in fault.text)
