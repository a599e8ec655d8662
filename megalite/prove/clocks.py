"""Clocks for measurements on a shared machine: wall-clock time, a process's CPU time, and the share of the machine's
CPU time that other programs used.

On a quiet machine the wall clock measures a step. On a shared one only CPU time belongs to the step, but it leaves out
every wait, for a core and for another rank. Next: calibrate_rank.py.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch

from megalite.parallel.clock import wait_for

QUIET = 0.1  # others may use this share of the CPU time before the wall clock is not trusted
BATCHES = 5
BATCH_SECONDS = 4e-3


@dataclass(frozen=True)
class Times:
    """Seconds. wall: wall clock. processor: CPU time of this process, all threads. machine: CPU time of all
    programs."""

    wall: float
    processor: float
    machine: float

    @classmethod
    def now(cls) -> "Times":
        """The clocks now; only differences are meaningful."""
        return cls(time.perf_counter(), time.process_time(), _machine_seconds())

    def since(self, begin: "Times") -> dict[str, float]:
        """The difference, as JSON values."""
        return {
            "wall_seconds": self.wall - begin.wall,
            "processor_seconds": self.processor - begin.processor,
            "machine_seconds": self.machine - begin.machine,
        }


def cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _machine_seconds() -> float:
    """Busy seconds of the cores that this process may run on."""
    per_core: Any = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0)
    return sum(
        sum(core) - core.idle - getattr(core, "iowait", 0.0) - core.guest - core.guest_nice
        for number, core in enumerate(per_core)
        if number in allowed
    )


def others_share(wall: float, machine: float, own: float) -> float:
    """The share of the machine's CPU time in `wall` seconds that other programs used."""
    return max(0.0, (machine - own) / (wall * cores()))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call after a warm-up: the median over batches of calls. On a CPU it is CPU time, since a single
    computing thread waits only for other programs."""
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
