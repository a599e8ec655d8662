"""The times of the doctor's messages (megalite/doctor/axis_rates.py)."""

import pytest
import torch.distributed as dist

from megalite.doctor import axis_rates
from megalite.parallel import clock


def test_a_warm_up_is_over_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NCCL a call returns before the device has done it, and the barrier is gloo's."""
    done: list[str] = []
    monkeypatch.setattr(clock, "wait_for", lambda device: done.append("waited"))
    monkeypatch.setattr(dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(dist, "all_reduce", lambda seconds, op: None)
    axis_rates.seconds_of(lambda: done.append("message"), "cpu")
    assert done == ["message", "waited", "barrier"] + ["message", "waited"] * axis_rates.REPEATS
