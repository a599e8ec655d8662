"""Times by a device's events (megalite/parallel/clock.py, timeline.py), with events of a device that is not there."""

from collections.abc import Callable

import pytest
import torch

import megalite.parallel.clock as clock_module
from megalite.parallel.clock import Clock
from megalite.parallel.timeline import Timeline


class Device:
    """now: ms of its work so far. done: ms that it has finished. waits: how often the host waited for it."""

    def __init__(self) -> None:
        self.now, self.done, self.waits = 100.0, 0.0, 0

    def synchronize(self, *args: object) -> None:
        self.done, self.waits = self.now, self.waits + 1

    def event_class(self) -> Callable[..., object]:
        device = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def query(self) -> bool:
                return self.at <= device.done

            def elapsed_time(self, end: "Event") -> float:
                if not (self.query() and end.query()):
                    raise RuntimeError("both events must be completed")
                return end.at - self.at

        return Event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch, "Event", made.event_class())
    monkeypatch.setattr(torch.accelerator, "synchronize", made.synchronize)
    monkeypatch.setattr(clock_module, "machine_has_gpu", lambda: True)
    return made


def test_a_clock_reads_events_without_waiting(device: Device) -> None:
    """10 ms in forward, 3 of them in waits, one inside the other; a wait outside of it does not count."""
    clock = Clock()
    clock.on = True
    for is_finished in (
        False,
        True,
    ):  # the device is read only after the norm, which comes after forward
        with clock.computing():
            device.now += 5
            with clock.waiting():
                device.now += 2
                with clock.waiting():
                    device.now += 1
            device.now += 2
        with clock.waiting():
            device.now += 50
        if is_finished:
            device.done = device.now
            assert clock.take() == pytest.approx(0.007) and clock.take() == 0
        else:
            with pytest.raises(RuntimeError, match="must be completed"):
                clock.take()
    assert device.waits == 0


def test_spans_are_in_seconds_of_the_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device has not finished is left out, unless the host waits for it."""
    monkeypatch.setattr("time.perf_counter", lambda: 50.0)
    timeline = Timeline()
    for wait in (False, True):
        timeline.begin(torch.device("cuda"))
        with timeline.span("action", "F0"):
            device.now += 20
        device.done = device.now
        with timeline.span("update", "norm"):
            device.now += 30
        waits = device.waits
        spans = timeline.take(wait)
        assert device.waits == waits + wait and not timeline.on
        assert (spans[0].start, spans[0].end) == pytest.approx((50.0, 50.02))
        assert [span.kind for span in spans] == ["action", "update"][: 1 + wait]
    assert (spans[1].start, spans[1].end) == pytest.approx((50.02, 50.05))
