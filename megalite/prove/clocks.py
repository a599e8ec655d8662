"""Clocks for measuring on a machine that others use too: time on the wall, a process's own processor time, and how much
of this machine's processor time went to somebody else.

On a quiet machine a step takes what the wall's clock says. On one that others use, only processor time is the step's
own: it leaves out every wait, for a core as for another rank. Next: calibrate_rank.py.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch

QUIET = 0.1  # share of the processor time that others may take before the wall's clock counts for nothing
BATCHES = 5
BATCH_SECONDS = 4e-3


@dataclass(frozen=True)
class Times:
    """Seconds: on the wall; of this process's processor time, all threads; of all work on this machine's cores."""

    wall: float
    processor: float
    machine: float

    @classmethod
    def now(cls) -> "Times":
        """Since whenever: two of them have a difference."""
        return cls(time.perf_counter(), time.process_time(), _machine_seconds())

    def since(self, begin: "Times") -> dict[str, float]:
        """The difference, as JSON values."""
        return {
            "wall_seconds": self.wall - begin.wall,
            "processor_seconds": self.processor - begin.processor,
            "machine_seconds": self.machine - begin.machine,
        }


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def _machine_seconds() -> float:
    """Not idle, of the cores that this process may run on."""
    per_core: Any = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0)
    return sum(
        sum(core) - core.idle - getattr(core, "iowait", 0.0) - core.guest - core.guest_nice
        for number, core in enumerate(per_core)
        if number in allowed
    )


def others_share(wall: float, machine: float, own: float) -> float:
    """Of the processor time that this machine had in `wall` seconds, what went to neither `own` nor idleness."""
    return max(0.0, (machine - own) / (wall * cores()))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, without what the first takes more: the median over some batches of calls. On a CPU processor time,
    since one thread that computes waits for nothing but other programs."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    work()
    count, seconds = 1, 0.0
    while True:
        wait_for(device)
        start = clock()
        for _ in range(count):
            work()
        wait_for(device)
        seconds = clock() - start
        if seconds >= BATCH_SECONDS:
            break
        count *= 2
    found = [seconds / count]
    for _ in range(BATCHES - 1):
        start = clock()
        for _ in range(count):
            work()
        wait_for(device)
        found.append((clock() - start) / count)
    return median(found)
